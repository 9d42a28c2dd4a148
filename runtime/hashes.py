"""SHA-256 of models."""

import hashlib
import json
from typing import Any

from torch import nn


def fingerprint(module: nn.Module, config: dict[str, Any]) -> str:
    """The SHA-256 of a model, VAE or router: of its `config` (a dict) and of every value of its tensors as float32."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in module.state_dict().items():
        digest.update(f"{name} {list(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()
