"""SHA-256 of files and models."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # programs that only hash files start without torch
    from torch import nn

CHUNK = 1 << 20  # bytes


def sha256_of_file(path: str | Path) -> str:
    """SHA-256 of a file, 64 hex digits, read in chunks. Raises OSError if the file cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(module: "nn.Module", config: dict[str, Any]) -> str:
    """SHA-256 of a model, VAE or router: of its `config` and of every tensor of its state dict as float32."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in module.state_dict().items():
        digest.update(f"{name} {list(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()
