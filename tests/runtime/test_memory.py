"""Which exceptions mean that memory ran out, and their line for the user."""

import errno

import numpy as np
import pytest
import torch

from runtime.errors import UserError, explain
from runtime.memory import out_of_memory

ACCELERATOR = getattr(torch, "AcceleratorError", RuntimeError)  # since torch 2.8
# As torch 2.6 to 2.14 and its libraries word them.
ERRORS = [
    torch.OutOfMemoryError("of a new wording"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"),
    ACCELERATOR("CUDA error: out of memory\nCUDA kernel errors might be reported at some other API call."),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA ran out of memory outside PyTorch's allocator. If this workload uses many dynamic shapes, ..."),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 5 GB, other allocations: 2 GB, max allowed: 7 GB)"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough memory: you tried to ..."),
    RuntimeError("unable to mmap 4096 bytes from file <x>: Cannot allocate memory (12)"),
    RuntimeError("$ Torch: unable to mmap memory: you tried to mmap 8GB."),
    RuntimeError("Caught RuntimeError in pin memory thread for device 0.\nRuntimeError: CUDA error: out of memory"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    OSError(errno.ENOMEM, "Cannot allocate memory", "weights.pt"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error)[:50])
def test_every_wording_of_no_memory_is_one_line_with_the_flag(error):
    assert out_of_memory(error)
    assert explain(error, "a smaller --batch-size") == "out of memory: pass a smaller --batch-size"


@pytest.mark.parametrize(
    "function",
    [
        lambda: torch.empty(1 << 58, dtype=torch.uint8),
        lambda: np.empty(1 << 58, np.uint8),
        lambda: bytearray(1 << 58),
    ],
)
def test_what_really_is_raised_without_memory_is_recognised(function):
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        function()
    assert out_of_memory(raised.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
        RuntimeError("Default process group has not been initialized"),
        KeyError("out of memory"),
    ],
)
def test_a_bug_stays_a_bug(error):
    assert not out_of_memory(error) and explain(error) is None


def test_other_errors_keep_their_own_line():
    assert not out_of_memory(UserError("no such file: out of memory.pt"))
    assert explain(UserError("no such file: out of memory.pt")) == "no such file: out of memory.pt"
    assert explain(FileNotFoundError(errno.ENOENT, "No such file", "out of memory.pt")).startswith(
        "out of memory.pt cannot"
    )
    lost = explain(RuntimeError("Pin memory thread exited unexpectedly"))
    assert "--num-workers" in lost and "perhaps for lack of memory" in lost
