"""Devices and precision: choosing them, compiling for them, naming and measuring them."""

import contextlib
import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from runtime.errors import UserError, first_line
from runtime.memory import peak_resident
from runtime.ranks import number_or

if TYPE_CHECKING:
    from runtime.processes import Processes

# The choices of --dtype; "tf32" is float32 whose products use the matrix units of a GPU that has them.
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_dtype(name: str | None, device: torch.device) -> str:
    """Resolve --dtype: None is tf32, as published, and tf32 is fp32 on a CPU and on GPUs that do not have it."""
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    name = name or "tf32"
    return "fp32" if name == "tf32" and not has_tf32 else name


def set_precision(module: nn.Module, dtype: str) -> Any:
    """Convert the weights of `module` to a precision of `DTYPES`, and switch TF32 of the GPU on or off; return it."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype != "fp32"
    return module.to(DTYPES[dtype])


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """In this block, products and convolutions of float32 use neither TF32 nor bf16, whatever was allowed before."""
    backends, name, exact = [torch.backends.cudnn, torch.backends.cuda.matmul], "allow_tf32", False
    if hasattr(torch.backends.cudnn, "conv"):  # since 2.9, which refuses to read the older flags once these were set
        backends = [getattr(torch.backends, path).conv for path in ("cudnn", "mkldnn")]
        backends += [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
        name, exact = "fp32_precision", "ieee"
    before = [getattr(backend, name) for backend in backends]
    try:
        for backend in backends:
            setattr(backend, name, exact)
        yield
    finally:
        for backend, value in zip(backends, before):
            setattr(backend, name, value)


def speed_up_vae(vae: Any, device: torch.device, dtype: str, experimental: Collection[str] = ()) -> Any:
    """Convert a VAE on a GPU to channels last, and to fp16 if `dtype`, the precision of the DiT, is fp16.

    This decodes fastest with at most one grey level of difference; bf16 would differ by more (docs/performance.md).
    experimental: "vae-fp16" takes fp16 for any `dtype`.
    """
    if device.type != "cuda":
        return vae
    half = dtype == "fp16" or "vae-fp16" in experimental
    # Not vae.to: diffusers would print a warning about modules in float32, of which this model has none.
    return nn.Module.to(vae, DTYPES["fp16" if half else "fp32"], memory_format=torch.channels_last)


class Float8Linear(nn.Module):
    """A linear layer over tokens (N, T, K), whose product takes float8 (e4m3) and adds up in float32; no gradients.

    Each token and each row of the weight has a scale of its own. So the result for one image does not depend on the
    others of its batch, and a GPU can compute the scales where it computes the input, without another pass over it.
    The weight stays beside its float8 copy, for all that asks the model for its weights.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        rows, scale = _to_float8(self.weight.detach())
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, scale = _to_float8(x.flatten(0, 1))
        how = {"bias": self.bias, "out_dtype": x.dtype, "use_fast_accum": True}  # an H100 is slower without the last
        product = torch._scaled_mm(rows, self.rows.t(), scale, self.scale.t(), **how)
        return product.unflatten(0, x.shape[:2])


def _to_float8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (R, K) -> the rows in float8, the largest value of each at float8's largest, and scales (R, 1) in float32.

    rows * scales is about x.
    """
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (x / scale).to(torch.float8_e4m3fn), scale


@torch.no_grad()
def speed_up_blocks(blocks: Iterable[Any], experimental: Collection[str]) -> None:
    """Switch the blocks of a DiT to "gelu" or "fp8", if `experimental` names one.

    Raises UserError if this device or version of torch cannot compute the four products of a block in float8.
    """
    for block in blocks:
        if "gelu" in experimental:
            block.mlp.fused = True
        if "fp8" not in experimental:
            continue
        for layer, name in (block.attn, "qkv"), (block.attn, "proj"), (block.mlp, "fc1"), (block.mlp, "fc2"):
            linear = Float8Linear(getattr(layer, name))
            try:
                linear(linear.weight.new_zeros(1, 1, linear.weight.shape[1]))
            except (RuntimeError, ValueError) as error:
                reason = f"{linear.weight.device} ({first_line(error)})"
                raise UserError(f"--experimental fp8 cannot run on {reason}: leave it out") from error
            setattr(layer, name, linear)


def compile_blocks(blocks: nn.ModuleList, backend: str = "inductor", experimental: Collection[str] = ()) -> None:
    """Compile each block of a model with `torch.compile`. Raises UserError if the GPU or the compiler cannot.

    experimental: "autotune" times several kernels for each product and takes the fastest.
    """
    weight = next(blocks.parameters())
    if backend == "inductor":
        _check_compiler(weight.device, weight.dtype)
    import torch._inductor.config as inductor

    # A block has four graphs per shape and precision; the default limit is 8. Old versions know this name only.
    torch._dynamo.config.cache_size_limit = 64  # type: ignore[attr-defined]
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        # Each process starts up to 32 others that compile: share the cores among the processes of this machine.
        inductor.compile_threads = max(1, min(32, os.cpu_count() or 1) // number_or("LOCAL_WORLD_SIZE", 1))
    mode = "max-autotune-no-cudagraphs" if "autotune" in experimental else None
    for block in blocks:
        block.compile(fullgraph=True, backend=backend, mode=mode)


def _check_compiler(device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError if `torch.compile` cannot work, because of the GPU, the compiler, or the folder of its cache.

    torch compiles at the first call, after minutes of loading, and fails with pages. It calls g++ for a CPU, and for a
    GPU Triton calls a C compiler; both include Python.h.
    """
    if device.type == "cuda":
        needed = (8, 0) if dtype == torch.bfloat16 else (7, 0)
        if (capability := torch.cuda.get_device_capability(device)) < needed:
            has, needs = (".".join(map(str, version)) for version in (capability, needed))
            raise UserError(
                f"--compile needs compute capability {needs} for {str(dtype).removeprefix('torch.')}, and {device} has "
                f"{has}: leave it out, or pass another --dtype"
            )
        language, variable, ending = "C", "CC", ".c"
        default = next(filter(shutil.which, ("gcc", "clang")), "gcc")
    else:
        language, variable, ending, default = "C++", "CXX", ".cpp", "g++"
    compiler = os.environ.get(variable, default)
    if not shutil.which(compiler):
        raise UserError(
            f"--compile needs the {language} compiler {compiler}: install it, name one in {variable}, or leave it out"
        )
    folder = None
    try:
        folder = tempfile.gettempdir()
        if device.type == "cpu":
            from torch._inductor.runtime.runtime_utils import cache_dir

            _check_words("TMPDIR", folder)
            folder = cache_dir()
            _check_words("TORCHINDUCTOR_CACHE_DIR", folder)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            _build_module(compiler, Path(work, f"module{ending}"))
    except OSError as error:
        place = error.filename or folder or "the folder for temporary files"
        raise UserError(
            f"--compile cannot use {place} ({error.strerror or first_line(error)}): set TORCHINDUCTOR_CACHE_DIR and "
            "TMPDIR to folders in which this user can write and run programs, or leave it out"
        ) from error


def _check_words(variable: str, path: str) -> None:
    """Raise UserError if a shell would not read a path as one word, because torch splits the compiler's command so."""
    try:
        words = shlex.split(path)
    except ValueError:  # a quotation mark without another
        words = []
    if words != [path]:
        raise UserError(
            f"--compile cannot use {path}, for its name has spaces or quotation marks: set {variable} to a folder "
            "without, or leave it out"
        )


def _build_module(compiler: str, source: Path) -> None:
    """Build and load an empty module of Python. Raises UserError if it cannot be built, OSError if not loaded."""
    source.write_text("#include <Python.h>\n")
    library, include = source.with_suffix(".so"), sysconfig.get_path("include", "posix_prefix")
    command = [compiler, str(source), "-shared", "-fPIC", f"-I{include}", "-o", str(library)]
    built = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if built.returncode:
        lines = built.stderr.splitlines() or [f"exit code {built.returncode}"]
        reason = next((line for line in lines if "error" in line), lines[-1]).removeprefix(f"{source}:")
        raise UserError(
            f"--compile needs a working compiler and Python.h, but {compiler} fails ({reason.strip()}): install g++ "
            "and python3-dev, or leave it out"
        )
    ctypes.CDLL(str(library))


def are_compiled(modules: Iterable[nn.Module]) -> bool:
    """Whether `compile_blocks` was called with these modules."""
    return any(module._compiled_call_impl is not None for module in modules)


def pick_device(
    name: str, processes: "Processes | None" = None, cuda_graphs: bool = False, experimental: Collection[str] = ()
) -> torch.device:
    """torch.device of "auto" (CUDA if there is a GPU), "cpu", "cuda:1". Raises UserError if it cannot be used.

    processes: if there are several, each takes the GPU of its local rank as its default device; None refuses several.
    cuda_graphs, experimental: whether the device must have CUDA graphs, and what else it must be able to do.
    """
    if processes is None and "TORCHELASTIC_RUN_ID" in os.environ and (count := number_or("WORLD_SIZE", 1)) > 1:
        error = UserError(f"torchrun started {count} processes, and this program is one: start it with python")
        error.printed_by_main = True
        raise error
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
        count = torch.cuda.device_count()
        if processes and processes.size > 1 and processes.local_rank >= count > 0 and name.startswith("cuda"):
            rule = f"each process needs a GPU of its own, and this machine has {count}"
            raise UserError(f"{rule}: pass --nproc_per_node={count}") from error
        raise UserError(f"device {name!r} cannot be used here: {first_line(error)}; pass --device cpu") from error
    flags = ["--cuda-graphs"] if cuda_graphs else []
    flags += [f"--experimental {name}" for name in ("gelu", "vae-fp16") if name in experimental]
    if flags and device.type != "cuda":
        raise UserError(f"{flags[0]} needs a CUDA device and this is {device}: leave it out")
    return device


def make_deterministic(device: torch.device) -> None:
    """Make equal calls on `device` return equal numbers; call it before anything runs there."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def device_name(device: torch.device) -> str:
    """Name of the hardware for records: its model, and on a CPU the number of threads."""
    return device_model(device) + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else "")


def device_model(device: torch.device) -> str:
    """Name of the GPU, or of the CPU and its instruction set; the last bits of results depend on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def synchronize(device: torch.device) -> None:
    """Wait for the work of a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the tensors on a CUDA device, on a CPU the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident()


@torch.inference_mode()
def matmul_rate(layers: Sequence[nn.Linear], rows: int, seconds: float = 1.0) -> float:
    """Multiply-adds per second of plain matrix products with the weights of `layers`: a bound for any loop over them.

    rows: inputs of each layer. All runs in turn, preallocated, on the device and in the precision of the layers.
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
    # Queue work ahead on a GPU, as a loop does that never waits for it.
    ahead = 50 if device.type == "cuda" else 1
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(ahead):
            once()
        synchronize(device)
        count += ahead
    return count * rows * sum(weight.numel() for weight in weights) / (time.perf_counter() - start)
