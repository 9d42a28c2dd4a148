"""Peak memory of this process, and whether an exception means that memory ran out."""

import errno
import re
import sys
from pathlib import Path

# What torch and the libraries of CUDA say. They cannot be initialised if no memory is left for them on the GPU.
TEXTS = re.compile(
    "out of memory|can(no|')t allocate memory|not enough memory|memory allocation failed|unable to mmap memory"
    "|bad_alloc|ALLOC(ATION)?_FAILED|(CUBLAS|CUDNN|CUSOLVER)_STATUS_NOT_INITIALIZED",
    re.IGNORECASE,
)


def out_of_memory(error):
    """Whether an exception of Python, NumPy or torch means that memory ran out; most of torch's are RuntimeErrors."""
    import torch

    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(TEXTS.search(str(error)))


def peak_resident():
    """Largest resident set of this process since its program started, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage would also count the process that forked this one
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource  # Unix only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
