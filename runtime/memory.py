"""How much memory is used, and whether it ran out."""

from pathlib import Path


def out_of_memory(error):
    """Whether an exception of NumPy or torch says that memory did not suffice; on a CPU torch's is a RuntimeError."""
    import torch

    texts = "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def peak_resident():
    """Bytes: the largest resident set of this process so far, since its program began."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux; its getrusage counts what the process took before it became this program, too
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource  # which only Unix has
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
