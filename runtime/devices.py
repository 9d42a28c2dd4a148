"""Where a model runs and in which precision, and what a record of times says of that."""

import os
import platform
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from runtime.errors import UserError
from runtime.memory import peak_resident

if TYPE_CHECKING:
    from runtime.processes import Processes

# What --dtype may name; "tf32" is float32 whose products use the matrix units of a GPU, where it has them.
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_dtype(name: str | None, device: torch.device) -> str:
    """The name of the precision that is meant; None means as published, tf32, which on a CPU is fp32."""
    name = name or "tf32"
    return "fp32" if (name, device.type) == ("tf32", "cpu") else name


def set_precision(module: nn.Module, dtype: str) -> Any:
    """`module` with its weights in a precision of `DTYPES`, and the float32 of a GPU with or without TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype != "fp32"
    return module.to(DTYPES[dtype])


def speed_up_vae(vae: Any, device: torch.device, dtype: str) -> Any:
    """`vae` as it decodes fastest on `device` with at most one grey level of difference, beside a DiT in `dtype`.

    On a GPU that is channels last, and fp16 where that is asked for; bf16 differs by more (docs/performance.md).
    """
    if device.type != "cuda":
        return vae
    return vae.to(DTYPES["fp16" if dtype == "fp16" else "fp32"], memory_format=torch.channels_last)


def compile_blocks(blocks: nn.ModuleList, backend: str = "inductor") -> None:
    """Compiles each block of a DiT with `torch.compile` and its `backend`, the model around them staying as it is.

    Raises UserError where a CPU's compiler is missing.
    """
    compiler = os.environ.get("CXX", "g++")
    if next(blocks.parameters()).device.type == "cpu" and not shutil.which(compiler):
        raise UserError(f"--compile needs the C++ compiler {compiler}: install it, name one in CXX, or leave it out")
    # Four graphs a shape and precision, of which a process may have several; by itself torch stops at 8. The name is
    # the one that older versions know, too.
    torch._dynamo.config.cache_size_limit = 64  # type: ignore[attr-defined]
    for block in blocks:
        block.compile(fullgraph=True, backend=backend)


def pick_device(name: str, processes: "Processes | None" = None, cuda_graphs: bool = False) -> torch.device:
    """torch.device of "auto" (CUDA where there is one), "cpu", "cuda:1". Raises UserError where it cannot be used.

    processes: where they are several, each takes the GPU of its number on its machine, and makes it its default.
    cuda_graphs: whether it is to have CUDA graphs.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if processes and processes.size > 1 and name.startswith("cuda"):
        name = f"cuda:{processes.local_rank}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("the programs run on cpu and cuda")
        device = torch.empty(0, device=device).device  # with the index that "cuda" alone leaves open
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {name!r} cannot be used here: {str(error).splitlines()[0]}; pass --device cpu"
        ) from error
    if cuda_graphs and device.type != "cuda":
        raise UserError(f"--cuda-graphs needs a CUDA device and this is {device}: leave it out")
    return device


def make_deterministic(device: torch.device) -> None:
    """The same numbers each time from the same calls on `device`; before anything ran there."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def device_name(device: torch.device) -> str:
    """What a record of times says about the hardware: its model, on a CPU with the threads in use."""
    return device_model(device) + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else "")


def device_model(device: torch.device) -> str:
    """The name of the GPU, or of the processor and its instruction set, on which the last bits of results depend."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def synchronize(device: torch.device) -> None:
    """Waits for the work of a CUDA device; nothing to wait for elsewhere."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a CUDA device so far, elsewhere the largest resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident()


@torch.inference_mode()
def matmul_rate(layers: Sequence[nn.Linear], rows: int, seconds: float = 1.0) -> float:
    """Multiply-adds per second of plain matrix products of the block's own shapes, for `samples` in a batch.

    The four linear layers of a block in turn, preallocated, on the device and in the precision of `dit`: what a perfect
    loop could reach.
    """
    weights = [layer.weight for layer in layers]
    device = weights[0].device
    inputs = [weight.new_empty(rows, weight.shape[1]).normal_() for weight in weights]
    outputs = [weight.new_empty(rows, weight.shape[0]) for weight in weights]

    def once() -> None:
        for x, weight, out in zip(inputs, weights, outputs):
            torch.mm(x, weight.t(), out=out)

    once()
    synchronize(device)
    # A GPU is given its work ahead, as in a loop that waits for nothing.
    ahead = 50 if device.type == "cuda" else 1
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(ahead):
            once()
        synchronize(device)
        count += ahead
    return count * rows * sum(weight.numel() for weight in weights) / (time.perf_counter() - start)
