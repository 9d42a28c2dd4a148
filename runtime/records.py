"""Records: JSON files of measured figures and of all that they depend on."""

import json
import platform
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import torch

from runtime.devices import device_name
from runtime.files import atomic_write



def _commit() -> str | None:
    """The commit of this repository, "-dirty" where code is not as committed; None where there is no git."""
    git = partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True)
    try:
        commit = git(["git", "rev-parse", "HEAD"]).stdout.strip()
        # Records are what a measurement leaves, not what it depends on.
        changed = git(["git", "diff", "--quiet", "HEAD", "--", ":/", ":(exclude,top)benchmarks/results"]).returncode
    except OSError:
        return None
    return commit + "-dirty" * bool(changed) if commit else None


def write_record(path: str | Path, flags: dict[str, Any], device: torch.device, figures: dict[str, Any]) -> None:
    """Writes `figures`, a dict that was measured on `device`, and all that they depend on, as JSON to args.record."""
    record = {
        "device": device_name(device),
        "dtype": "tf32" if device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32 else "float32",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "flags": {name: value for name, value in flags.items() if name not in ("out", "record", "table")},
        **figures,
    }
    with atomic_write(path) as part:
        part.write_text(json.dumps(record, indent=2) + "\n")
    print(f"Record: {path}")
