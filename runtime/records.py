"""Records: JSON files of measured figures and of the circumstances they were measured in."""

import json
import os
import platform
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import torch

from runtime.devices import device_name
from runtime.files import atomic_write


def _commit() -> str | None:
    """Commit of this repository, with "-dirty" if code differs from it; without git the variable COMMIT, or None."""
    git = partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True)
    try:
        commit = git(["git", "rev-parse", "HEAD"]).stdout.strip()
        # Records come out of a measurement: they do not change it.
        changed = git(["git", "diff", "--quiet", "HEAD", "--", ":/", ":(exclude,top)benchmarks/results"]).returncode
    except OSError:
        commit = ""
    return commit + "-dirty" * bool(changed) if commit else os.environ.get("COMMIT")


def write_record(path: str | Path, flags: dict[str, Any], device: torch.device, figures: dict[str, Any]) -> None:
    """Write `figures`, measured on `device`, and all that they depend on, as JSON to `path`.

    flags: the arguments of the program; those that only name its output are left out.
    """
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
