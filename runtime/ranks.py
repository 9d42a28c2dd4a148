"""The place of this process in its job, from the environment variables that torchrun sets. Imports no torch."""

import os
import re
import sys
from typing import NamedTuple

from runtime.errors import UserError


class Ranks(NamedTuple):
    """Process `rank` of `size`, and its rank on this machine."""

    rank: int
    size: int
    local_rank: int


def find_ranks() -> Ranks:
    """Return the place of this process, 0 of 1 without torchrun; an empty variable counts as unset.

    Raises UserError if the variables do not fit together, or if srun or mpirun started several processes without them.
    """
    rank, size, local_rank = (_whole_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if rank is None and size in (None, 1):
        _check_launchers()
    if size is None and rank:
        raise _refusal(f"RANK is {rank}, but WORLD_SIZE is not set")
    if size == 0:
        raise _refusal("WORLD_SIZE is 0, not a whole number of at least 1")
    if rank is None and size not in (None, 1):
        raise _refusal(f"WORLD_SIZE is {size}, but RANK is not set")
    rank, size = rank or 0, size or 1
    if rank >= size:
        raise _refusal(f"RANK is {rank}, but WORLD_SIZE is {size}: ranks count from 0 to WORLD_SIZE - 1")
    return Ranks(rank, size, local_rank or 0)


def main_address() -> tuple[str, int]:
    """Return host and port of rank 0. Raises UserError if MASTER_ADDR or MASTER_PORT is missing or wrong."""
    host, port = os.environ.get("MASTER_ADDR", "").strip(), _whole_number("MASTER_PORT")
    for name, value in (("MASTER_ADDR", host), ("MASTER_PORT", port)):
        if value in ("", None):
            raise _refusal(f"WORLD_SIZE is {os.environ.get('WORLD_SIZE')}, but {name} is not set")
    if not 0 < port < 2**16:
        raise _refusal(f"MASTER_PORT is {port}, not a port from 1 to 65535")
    return host, port


def number_or(name: str, default: int) -> int:
    """Return the number in a variable, `default` if there is none or a wrong one, which `find_ranks` refuses."""
    try:
        number = _whole_number(name)
    except UserError:
        return default
    return default if number is None else number


def _whole_number(name):
    """The whole number in an environment variable, None if it is unset or empty."""
    text = os.environ.get(name, "").strip()
    if text and not re.fullmatch("[0-9]{1,9}", text):
        raise _refusal(f"{name} is {text!r}, not a whole number")
    return int(text) if text else None


def _refusal(problem):
    return UserError(f"{problem}: start with torchrun, which sets it, or unset RANK and WORLD_SIZE for one process")


def _check_launchers():
    """Raise UserError if a launcher started several processes, each of which would do all the work."""
    if "SLURM_PTY_PORT" in os.environ:  # a shell of srun --pty
        return
    # In shells and batch scripts SLURM_NTASKS is what srun would start, and SLURM_PROCID is 0 or unset.
    in_step = "SLURM_STEP_ID" in os.environ or number_or("SLURM_PROCID", 0) > 0
    tasks = "SLURM_NTASKS" if in_step and "SLURM_STEP_NUM_TASKS" not in os.environ else "SLURM_STEP_NUM_TASKS"
    for variable in (tasks, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if (size := number_or(variable, 1)) > 1:
            launcher, program = "srun" if variable == tasks else "mpirun", os.path.basename(sys.argv[0])
            raise UserError(
                f"{launcher} started {size} processes that do not know each other ({variable}): start them with "
                f"torchrun --nproc_per_node={size} {program}, on several machines as in docs/clusters.md"
            )
