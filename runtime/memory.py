"""Peak memory of this process, and whether an exception means that memory ran out."""

import sys
from pathlib import Path


def out_of_memory(error):
    """Whether an exception of NumPy or torch means that memory ran out; torch's on a CPU is a plain RuntimeError."""
    import torch

    texts = "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def peak_resident():
    """Largest resident set of this process since its program started, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage would also count the process that forked this one
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource  # Unix only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
