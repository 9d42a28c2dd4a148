"""devices.py: refusals. test_sampling.py and benchmarks/test_latency.py test how it computes."""

import os
import shutil
import stat
import subprocess
import tempfile

import pytest
import torch
import torch._inductor.config as inductor
from conftest import assert_refused, call, random_dit, run

from runtime import devices
from runtime.errors import UserError, explain

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


@pytest.mark.parametrize("capability, dtype", [((7, 5), "fp32"), ((8, 0), "tf32")])
def test_tf32_is_float32_on_gpus_without_it(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.pick_dtype(None, GPU) == devices.pick_dtype("tf32", GPU) == dtype
    assert devices.pick_dtype("bf16", GPU) == "bf16" and devices.pick_dtype(None, CPU) == "fp32"


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
