"""devices.py: refusals. test_sampling.py and benchmarks/test_latency.py test how it computes."""

import os
import shutil
import stat
import subprocess
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._inductor.config as inductor
from conftest import assert_refused, call, random_dit, random_vae, run

from runtime import devices
from runtime.errors import UserError, explain
from runtime.hashes import fingerprint

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SAMPLE = "--device cpu --num-sampling-steps 4 --repeats 1 --out x.png --compile".split()
# It builds an empty module, but none with the headers of torch.
HALF_A_COMPILER = """#!/bin/sh
case "$*" in *module.cpp*|*--version*) exec g++ "$@";; esac
echo "x.cpp:1:1: fatal error: omp.h: No such file or directory" >&2
exit 1
"""


def test_a_missing_device_is_refused():
    for name in ("cuda:63", "tpu", "meta", "meta:"):
        with pytest.raises(UserError, match="--device cpu"):
            devices.pick_device(name)


@pytest.mark.parametrize(
    "rank, gpus, words", [(4, 4, "machine has 4: pass --nproc_per_node=4"), (1, 0, "--device cpu")]
)
def test_more_processes_than_gpus_are_told_the_right_number(rank, gpus, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match=words):
        devices.pick_device("cuda", SimpleNamespace(size=8, local_rank=rank))


@pytest.mark.parametrize("capability, dtype", [((7, 5), "fp32"), ((8, 0), "tf32")])
def test_tf32_is_float32_on_gpus_without_it(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.pick_dtype(None, GPU) == devices.pick_dtype("tf32", GPU) == dtype
    assert devices.pick_dtype("bf16", GPU) == "bf16" and devices.pick_dtype(None, CPU) == "fp32"


# --experimental


def round_to_float8(x):
    """The nearest numbers with 4 bits, of which the first is 1, in steps of at least 2**-9: float64 on the CPU."""
    exponents = np.maximum(np.floor(np.log2(np.abs(x) + 1e-300)), -6)
    return np.round(x / 2 ** (exponents - 3)) * 2 ** (exponents - 3)


def test_a_product_in_float8_rounds_each_row_with_a_scale_of_its_own():
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 32).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, 5, 48, dtype=torch.bfloat16)
    x[0] *= 1e4  # rows of other sizes change nothing of a row
    x[1, 2] = 0
    actual = devices.Float8Linear(linear)(x)
    assert (actual.dtype, actual.shape) == (torch.bfloat16, (2, 5, 32))

    def rounded(rows):
        largest = np.abs(rows).max(-1, keepdims=True)
        return round_to_float8(rows / np.where(largest, largest, 1) * 448) * largest / 448

    rows, weight, bias = (t.double().numpy() for t in (x, linear.weight, linear.bias))
    expected = rounded(rows) @ rounded(weight).T + bias
    sizes = np.abs(rows) @ np.abs(weight).T + np.abs(bias)  # of the terms of each sum
    assert (np.abs(actual.double().numpy() - expected) <= 2**-8 * np.abs(expected) + 1e-4 * sizes).all()
    errors = np.abs(actual.double().numpy() - (rows @ weight.T + bias))
    assert (errors <= (2**-3 + 2**-7) * sizes).all()  # 2**-4 for the rounding of each factor
    assert torch.equal(devices.Float8Linear(linear)(x[1:]), actual[1:])


def test_float8_stands_in_for_the_four_products_of_each_block():
    torch.manual_seed(1)
    plain, fast = (devices.set_precision(random_dit(hidden_size=32), "bf16") for _ in range(2))
    devices.speed_up_blocks(fast.blocks, ["fp8"])
    kinds = [type(module) for block in fast.blocks for module in block.modules()]
    assert kinds.count(devices.Float8Linear) == 12 and kinds.count(torch.nn.Linear) == 3  # adaLN stays
    assert fingerprint(fast, {}) == fingerprint(plain, {}) and fast.multiply_adds() == plain.multiply_adds()
    assert devices.matmul_rate(fast.block_linears(), 8, seconds=1e-3) > 0
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([10, 500]), torch.tensor([0, 1])
    with torch.no_grad():
        exact = random_dit(hidden_size=32)(x, t, y)
        errors = [((dit(x, t, y) - exact).norm() / exact.norm()).item() for dit in (plain, fast)]
    assert errors[0] < errors[1] < 0.1


def test_nothing_changes_without_a_switch():
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([10, 500]), torch.tensor([0, 1])
    plain, same = random_dit(), random_dit()
    devices.speed_up_blocks(same.blocks, ["autotune", "vae-fp16"])
    assert torch.equal(plain(x, t, y), same(x, t, y))
    assert [type(module) for module in plain.modules()] == [type(module) for module in same.modules()]
    vae = random_vae()
    assert devices.speed_up_vae(vae, CPU, "bf16", ["vae-fp16"]) is vae and vae.dtype == torch.float32


def test_a_device_that_cannot_compute_in_float8_is_refused(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0\nor 8.9")

    monkeypatch.setattr(torch, "_scaled_mm", fails)
    with pytest.raises(UserError, match="--experimental fp8 cannot run on cpu .*capability >= 9.0.: leave it out"):
        devices.speed_up_blocks(devices.set_precision(random_dit(), "bf16").blocks, ["fp8"])


def test_autotuning_times_the_kernels_that_it_chooses_from(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **how: modes.append(how["mode"]))
    for names in [], ["fp8"], ["autotune", "gelu"]:
        devices.compile_blocks(random_dit(depth=1).blocks, backend="eager", experimental=names)
    assert modes == [None, None, "max-autotune-no-cudagraphs"]


# --compile


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A function that makes the folder `name` and puts the caches of compilers there."""

    def place(name="caches", temporary=None):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / temporary) if temporary else str(tmp_path))
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        return folder

    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    return place


def program(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_working_compiler_passes_and_leaves_nothing(place):
    folder = place("caches-ü")
    devices._check_compiler(CPU, torch.float32)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["two words", "it's", 'a"b', "back\\slash"])
def test_folders_that_break_the_commands_of_torch_are_refused_before_sampling(name, place, model_folder, capfd):
    place(name)
    result = call("sample.py", "--ckpt", model_folder, *SAMPLE, capfd=capfd)
    assert_refused(result, "sample.py: error: --compile cannot use ", name, "set TORCHINDUCTOR_CACHE_DIR")
    place(f"{name} temporary", temporary=f"{name} temporary")
    with pytest.raises(UserError, match="set TMPDIR to a folder without"):
        devices.compile_blocks(random_dit().blocks)


def test_a_compiler_that_fails_or_has_no_python_h_is_named(place, tmp_path, monkeypatch):
    place()
    without = program(
        tmp_path / "without",
        '#!/bin/sh\nfor a; do shift; case $a in -I*);; *) set -- "$@" "$a";; esac; done\nexec g++ "$@"\n',
    )
    for compiler, words in (
        (without, "without fails .*Python.h: No such file or directory.* python3-dev"),
        ("/bin/false", "/bin/false fails .exit code 1."),
        ("no-such-compiler", "needs the C.. compiler no-such-compiler: install it, name one in CXX"),
        (program(tmp_path / "late", "#!/bin/sh\n"), "cannot use .*module.so.*: set TORCHINDUCTOR_CACHE_DIR"),
    ):
        monkeypatch.setenv("CXX", str(compiler))
        with pytest.raises(UserError, match=words):
            devices.compile_blocks(random_dit().blocks)


def test_a_cache_that_cannot_be_used_is_refused(place, tmp_path, monkeypatch):
    place()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", "/proc/caches"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(path))
        with pytest.raises(UserError, match=f"--compile cannot use {path} .*: set TORCHINDUCTOR_CACHE_DIR and TMPDIR"):
            devices.compile_blocks(random_dit().blocks)


@pytest.mark.parametrize(
    "capability, dtype, words",
    [
        (
            (7, 5),
            torch.bfloat16,
            "compute capability 8.0 for bfloat16, and cuda:0 has 7.5: leave it out, or pass another",
        ),
        ((6, 1), torch.float32, "compute capability 7.0 for float32, and cuda:0 has 6.1"),
        ((7, 5), torch.float16, None),
        ((8, 0), torch.bfloat16, None),
        ((12, 0), torch.bfloat16, None),
    ],
)
def test_a_gpu_that_is_too_old_is_refused(capability, dtype, words, place, monkeypatch):
    place()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if words is None:
        return devices._check_compiler(GPU, dtype)
    with pytest.raises(UserError, match=words):
        devices._check_compiler(GPU, dtype)


def test_a_gpu_needs_a_c_compiler(place, tmp_path, monkeypatch):
    place("two words")  # which Triton can use
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gcc = shutil.which("gcc")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="needs the C compiler gcc: install it, name one in CC"):
        devices._check_compiler(GPU, torch.bfloat16)
    (tmp_path / "clang").symlink_to(gcc)
    seen = []
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: seen.append(command) or subprocess.CompletedProcess(command, 1, "", "x")
    )
    with pytest.raises(UserError, match="clang fails .x."):
        devices._check_compiler(GPU, torch.bfloat16)
    assert seen[0][0] == "clang" and os.path.basename(seen[0][1]) == "module.c"


def test_the_processes_of_a_machine_share_its_cores_for_compiling(monkeypatch):
    def workers(cores, processes):
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        devices.compile_blocks(random_dit().blocks, backend="eager")
        return inductor.compile_threads

    monkeypatch.setattr(inductor, "compile_threads", 5)  # restored after the test
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "5")
    assert workers(64, "8") == 5  # what the user set
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS")
    assert [workers(64, "8"), workers(64, "1"), workers(2, "8")] == [4, 32, 1]


@pytest.mark.parametrize(
    "error, line",
    [
        (RuntimeError("a new fault\nand more"), "--compile has failed (RuntimeError: a new fault): leave it out"),
        (
            RuntimeError("C++ compile error\nx.cpp:1:1: error: y"),
            "--compile has failed (x.cpp:1:1: error: y): leave it out",
        ),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory: pass less"),
    ],
)
def test_a_compilation_that_fails_later_is_one_line(error, line):
    def fail(*_):
        raise error

    torch._dynamo.reset()
    with pytest.raises(RuntimeError) as raised:
        torch.compile(lambda x: x + 1, backend=fail)(torch.ones(2))
    assert explain(raised.value, "less") == line


@pytest.mark.slow
def test_a_compiler_that_fails_later_is_one_line(model_folder, tmp_path):
    compiler, caches = program(tmp_path / "c++", HALF_A_COMPILER), str(tmp_path / "caches")
    result = run(
        "sample.py", "--ckpt", model_folder, *SAMPLE, cwd=tmp_path, CXX=str(compiler), TORCHINDUCTOR_CACHE_DIR=caches
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith(
        "sample.py: error: --compile has failed (x.cpp:1:1: fatal error: omp.h"
    )
