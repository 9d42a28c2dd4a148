"""Programs under faults: no disk, rights or memory, Ctrl-C, changing or hostile files, a dead peer.

docs/reliability.md lists all faults; those that are not here are tested beside the module that handles them. Most happen
in this process at a named place, not after a time: a function is replaced by one that does the harm first.
"""

import ast
import ctypes
import gc
import importlib
import io
import json
import os
import pickle
import pkgutil
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, assert_refused, start, torchrun
from PIL import Image

from router import Router
from runtime.errors import UserError
from runtime.files import load_tensors
from runtime.processes import Processes

GRAPH = ROOT / "ckpt" / "fashion_mnist" / "classifier.pb"
TOO_MUCH = 1 << 58  # bytes that no machine has


class Programs:
    """The programs on small inputs below `folder`; `flags` has what each needs."""

    def __init__(self, folder, model, images, capfd):
        self.folder, self.model, self.images, self.capfd = folder, model, images, capfd
        common = ["--ckpt", model, "--device", "cpu", "--num-sampling-steps", 4]
        self.router = ["--accelerate-method", "dynamiclayer", "--path", model / "router4.pt"]
        training = ["--global-batch-size", 4, "--draws-per-step", 2, "--num-workers", 0, "--log-every", 1]
        training += ["--max-steps", 3, "--results-dir", folder / "results", "--data-path", images]
        self.flags = {
            "sample.py": [*common, "--repeats", 1, "--out", folder / "out.png"],
            "sample_ddp.py": [*common, "--num-fid-samples", 6, "--per-proc-batch-size", 2, "--sample-dir", folder],
            "train_router.py": [*common, *training],
            "evaluator.py": [folder / "a.npz", folder / "b.npz", "--graph", GRAPH, "--device", "cpu"],
        }
        random = np.random.default_rng(0)
        for name in ("a", "b"):
            np.savez(folder / f"{name}.npz", arr_0=random.integers(0, 256, (70, 32, 32, 3), dtype=np.uint8))

    def run(self, program, *more, place=None, harm=None):
        """Run a program here; call `harm` when the function `place` ("package.module.Class.method") is first called."""
        flags = [str(flag).replace("FOLDER", str(self.folder)) for flag in [*self.flags[program], *more]]
        left = [harm] if place else []
        with pytest.MonkeyPatch.context() as patch:
            if place:
                owner, _, name = place.rpartition(".")
                owner = pkgutil.resolve_name(owner)
                unharmed = getattr(owner, name)

                def harmed(*args, **kwargs):
                    if left:
                        left.pop()()
                    return unharmed(*args, **kwargs)

                patch.setattr(owner, name, harmed)
            patch.setattr(sys, "argv", [str(ROOT / program), *flags])
            self.capfd.readouterr()
            code = 0
            try:
                runpy.run_path(str(ROOT / program), run_name="__main__")
            except SystemExit as stop:
                code = stop.code
        assert not left, f"{place} was not reached"
        out, err = self.capfd.readouterr()
        return SimpleNamespace(returncode=code or 0, stdout=out, stderr=err)


@pytest.fixture
def programs(tmp_path, model_folder, image_folder, capfd):
    threads = torch.get_num_threads()
    yield Programs(tmp_path, model_folder, image_folder, capfd)
    torch.set_num_threads(threads)


def assert_whole(folder):
    """Assert that no file in the folder is half written."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert not path.name.endswith(".part"), path
        if path.suffix in (".png", ".gif"):
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".npz":
            assert zipfile.ZipFile(path).testzip() is None
        elif path.suffix == ".npy":
            np.load(path)
        elif path.suffix == ".pt":
            load_tensors(path, allow=[importlib.import_module("argparse").Namespace])
        elif path.suffix in (".json", ".jsonl"):
            [json.loads(text) for text in ([path.read_text()] if path.suffix == ".json" else path.open())]


# Ctrl-C


def control_c():
    os.kill(os.getpid(), signal.SIGINT)


LATENTS = ["--extract-latents", "FOLDER/latents"]
STATISTICS = ["--save-stats", "FOLDER/s.npz", "--json", "FOLDER/r.json"]
STAGES = [
    ("sample.py", "pretrained.loading.load_dit", []),
    ("sample.py", "models.DiT.denoise", []),
    ("sample.py", "diffusers.AutoencoderKL.decode", []),
    ("sample.py", "PIL.Image.Image.save", []),
    ("sample_ddp.py", "models.DiT.denoise", []),
    ("sample_ddp.py", "diffusers.AutoencoderKL.decode", []),
    ("sample_ddp.py", "evaluation.sample_set.write_npz", []),
    ("train_router.py", "diffusers.AutoencoderKL.encode", LATENTS),
    ("train_router.py", "numpy.save", LATENTS),
    ("train_router.py", "torch.optim.AdamW.step", []),
    ("train_router.py", "torch.save", []),
    ("evaluator.py", "evaluation.features.Network.extract", []),
    ("evaluator.py", "evaluation.evaluation_set.write_npz", STATISTICS),
    ("evaluator.py", "evaluation.metrics.precision_recall", []),
    ("evaluator.py", "runtime.records.write_record", STATISTICS),
]


@pytest.mark.parametrize("program, place, more", STAGES)
def test_ctrl_c_at_any_stage_is_one_line_and_leaves_nothing_half_written(program, place, more, programs, tmp_path):
    result = programs.run(program, *more, place=place, harm=control_c)
    assert result.returncode == 130, result
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"{program}: interrupted")
    assert_whole(tmp_path)


def run_after(setup, program, *flags, cwd):
    """Run a program in a process of its own after the statements `setup`."""
    begin = "import os, runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, os.path.dirname(sys.argv[0]))\n"
    command = [sys.executable, "-c", f"{begin}{setup}\nrunpy.run_path(sys.argv[0], run_name='__main__')"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [str(word) for word in [*command, ROOT / program, *flags]]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


HARM = """
import pkgutil, signal
owner = pkgutil.resolve_name("{}")
unharmed = owner.{}
def harmed(*args, **kwargs):
    {}
    return unharmed(*args, **kwargs)
owner.{} = harmed
"""


def harm(place, statement):
    owner, _, name = place.rpartition(".")
    return HARM.format(owner, name, statement, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "program, place", [("sample_ddp.py", "sampling.decode"), ("evaluator.py", "numpy.concatenate")]
)
def test_an_interrupted_process_exits_with_code_130(program, place, programs, tmp_path):
    setup = harm(place, "os.kill(os.getpid(), signal.SIGINT)")
    result = run_after(setup, program, *programs.flags[program], cwd=tmp_path)
    assert result.returncode == 130, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and f"{program}: interrupted" in result.stderr
    assert_whole(tmp_path)


# Memory


def no_memory():
    torch.empty(TOO_MUCH, dtype=torch.uint8)


def no_memory_on_the_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def no_memory_for_numpy():
    np.empty(TOO_MUCH, np.uint8)


@pytest.mark.parametrize(
    "program, place, fault, flag",
    [
        ("sample.py", "models.DiT.denoise", no_memory, "--class-labels"),
        ("sample.py", "models.DiT.denoise", no_memory_on_the_gpu, "--class-labels"),
        ("sample_ddp.py", "sampling.decode", no_memory, "--per-proc-batch-size"),
        ("train_router.py", "torch.optim.AdamW.step", no_memory_on_the_gpu, "--global-batch-size"),
        ("evaluator.py", "evaluation.features.Network.extract", no_memory_for_numpy, "--batch-size"),
        ("sample.py", "torch.load", no_memory_for_numpy, "router4.pt needs more memory"),
    ],
)
def test_too_little_memory_names_the_flag_to_lower_or_the_file(program, place, fault, flag, programs, tmp_path):
    more = programs.router if place == "torch.load" else []
    assert_refused(programs.run(program, *more, place=place, harm=fault), "memory", flag)
    assert_whole(tmp_path)


@pytest.mark.slow
def test_a_batch_beyond_the_memory_of_the_process_is_one_line(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (3 << 29, 3 << 29))"  # 1.5 GB
    flags = ["--ckpt", ROOT / "ckpt" / "fashion_mnist", "--device", "cpu", "--num-sampling-steps", 2, "--class-labels"]
    result = run_after(limit, "sample.py", *flags, *[0] * 20000, cwd=tmp_path)
    assert_refused(result, "memory", "fewer --class-labels")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_data_loading_process_is_one_line_and_the_last_update_is_kept(programs, tmp_path):
    def kill_a_worker():
        psutil.Process().children()[-1].kill()

    more = ["--num-workers", 1, "--max-steps", 1000, "--ckpt-every", 1000]
    result = programs.run("train_router.py", *more, place="training.trainer.Trainer.report", harm=kill_a_worker)
    assert_refused(result, "a data loading process was killed", "--num-workers")
    assert load_tensors(tmp_path / "results" / "000-tiny" / "checkpoints" / "last.pt")["step"] >= 1
    assert_whole(tmp_path)


def test_a_compressed_checkpoint_is_refused_before_memory_is_taken_for_it(tmp_path, monkeypatch):
    Router(4, 1000).save(tmp_path / "r.pt")
    with zipfile.ZipFile(tmp_path / "p.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        whole = zipfile.ZipFile(tmp_path / "r.pt")
        for name in whole.namelist():
            packed.writestr(name, bytes(len(whole.read(name))))
    monkeypatch.setattr(torch, "load", None)  # it would take the memory
    with pytest.raises(UserError, match="p.pt .*larger than the file"):
        load_tensors(tmp_path / "p.pt")


# Disk


@pytest.mark.parametrize(
    "program, more, size, name",
    [
        ("sample.py", [], 1000, "out.png"),
        ("sample_ddp.py", ["--per-proc-batch-size", 6], 1400, "0000000-0000006.npz"),
        ("sample_ddp.py", [], 1400, "n-6.npz"),
        ("train_router.py", LATENTS, 1000, "000000.npy"),
        ("train_router.py", [], 1000, "last.pt"),
        ("train_router.py", ["--max-steps", 1000], 16000, "metrics.jsonl"),
        ("evaluator.py", ["--save-stats", "FOLDER/s.npz", "--metrics", "fid"], 2000, "s.npz"),
        ("evaluator.py", ["--json", "FOLDER/r.json", "--metrics", "fid"], 700, "r.json"),
    ],
)
def test_a_file_that_cannot_be_written_is_one_line_and_is_not_left(program, more, size, name, programs, tmp_path):
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.npz")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        result = programs.run(program, *more)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    gc.collect()  # Python 3.12.1 would crash here on a view of an io.BytesIO that a traceback holds
    *warnings, line = result.stderr.strip().splitlines()
    assert result.returncode == 1 and all(" warning: " in warning for warning in warnings), result
    assert name in line and "File too large" in line
    for path in tmp_path.rglob("metrics.jsonl"):
        path.unlink()  # its last line may be cut off; the reader skips that
    assert not list(tmp_path.rglob(f"*{name}"))
    assert_whole(tmp_path)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_an_output_that_is_full_or_closed_is_one_line():
    def stderr(output, unbuffered):
        command = [sys.executable, ROOT / "download.py", "--list"]
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        return subprocess.run(command, env=environment, stdout=output, stderr=subprocess.PIPE, text=True)

    for unbuffered in ("", "1"):
        with open("/dev/full", "w") as full:
            assert_refused(stderr(full, unbuffered), "download.py: error:", "No space left")
    reader, writer = os.pipe()
    os.close(reader)
    assert_refused(stderr(writer, "1"), "download.py: error:", "Broken pipe")
    os.close(writer)


# Rights


@pytest.fixture
def user_rights():
    """Root may read and write whatever chmod forbids; take these two capabilities away."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable of the first 32, then of the others
    assert libc.capget(header, sets) == 0
    before = sets[0]
    sets[0] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0
    yield
    sets[0] = before
    assert libc.capset(header, sets) == 0


def test_files_without_the_right_to_read_or_write_are_one_line(programs, user_rights, tmp_path):
    closed, file = tmp_path / "closed", tmp_path / "file"
    closed.mkdir()
    file.touch()
    shutil.copytree(programs.model, tmp_path / "model")
    for path in (tmp_path / "model" / "dit.safetensors", file, closed):
        path.chmod(0)
    router = programs.router[:-1]
    try:
        for program, more, name in (
            ("sample.py", ["--ckpt", tmp_path / "model"], "dit.safetensors"),
            ("sample.py", [*router, file], "file"),
            ("sample.py", [*router, closed / "in"], "closed/in"),
            ("sample.py", ["--out", closed / "x.png"], "closed"),
            ("sample_ddp.py", ["--sample-dir", closed], "closed"),
            ("train_router.py", ["--data-path", closed], "closed"),
            ("train_router.py", ["--results-dir", closed], "closed"),
            ("train_router.py", ["--resume", file], "file"),
            ("train_router.py", ["--extract-latents", closed / "latents"], "closed"),
            ("evaluator.py", ["--graph", file], "file"),
            ("evaluator.py", ["--save-stats", closed / "s.npz"], "closed"),
        ):
            assert_refused(programs.run(program, *more), name, "Permission denied")
    finally:
        closed.chmod(0o700)
    assert not list((tmp_path).glob("results")) and not list(closed.iterdir())


# Files that change while they are read


@pytest.mark.slow
def test_weights_that_are_cut_off_after_loading_stay_in_memory(programs, tmp_path):
    """If the file were mapped into memory, the process would die of SIGBUS."""
    shutil.copytree(programs.model, tmp_path / "model")
    cut = f"import pathlib; [os.truncate(p, 0) for p in pathlib.Path('{tmp_path}/model').rglob('*.safetensors')]"
    flags = [*programs.flags["sample.py"], "--ckpt", tmp_path / "model"]
    result = run_after(harm("models.DiT.denoise", cut), "sample.py", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    expected = programs.run("sample.py", "--out", tmp_path / "expected.png")
    assert expected.returncode == 0
    assert (tmp_path / "out.png").read_bytes() == (tmp_path / "expected.png").read_bytes()


def test_files_that_change_while_they_are_read_are_one_line(programs, tmp_path):
    router, sample, graph, images = (tmp_path / name for name in ("r.pt", "b.npz", "graph.pb", "images"))
    shutil.copy(programs.router[-1], router)
    shutil.copy(GRAPH, graph)
    shutil.copytree(programs.images, images)
    whole = sample.read_bytes()
    json = ["--json", tmp_path / "r.json"]
    for program, more, place, change, words in (
        ("sample.py", [*programs.router, router], "torch.load", lambda: os.truncate(router, 700), "r.pt"),
        ("evaluator.py", json, "evaluation.inception.Graph.run", lambda: os.truncate(sample, 50000), "b.npz"),
        ("evaluator.py", json, "evaluation.metrics.frechet_distance", sample.unlink, "b.npz"),
        ("evaluator.py", ["--graph", graph], "evaluation.features.version", graph.unlink, "graph.pb"),
        ("train_router.py", ["--data-path", images], "torch.optim.AdamW.step", lambda: shutil.rmtree(images), "read"),
    ):
        more = more[:3] + more[4:] if more[:1] == ["--accelerate-method"] else more
        assert_refused(programs.run(program, *more, place=place, harm=change), words)
        sample.write_bytes(whole)


@pytest.mark.slow
def test_latents_that_change_while_they_are_read_are_one_line(programs, tmp_path):
    flags = with_latents(programs)
    path = tmp_path / "latents" / "000000.npy"
    whole = path.read_bytes()
    setup = harm("torch.optim.AdamW.step", f"os.truncate('{path}', 300)")  # a mapped file would kill the process
    result = run_after(setup, "train_router.py", *flags, cwd=tmp_path)
    assert_refused(result, "000000.npy cannot be read")
    for content in (whole[:50], whole.replace(b"<f2", b"<f4"), b""):
        path.write_bytes(content)
        assert_refused(programs.run("train_router.py"), "000000.npy cannot be read")


def with_latents(programs):
    """Extract latents of the images and train with them from now on; returns the flags."""
    assert programs.run("train_router.py", *LATENTS).returncode == 0
    flags = programs.flags["train_router.py"][:-2]
    programs.flags["train_router.py"] = [*flags, "--latents", programs.folder / "latents"]
    return programs.flags["train_router.py"]


# Nothing that is loaded can run code


class Hostile:
    """Unpickled, it makes the folder `target`."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("old_format", [False, True])
def test_hostile_files_are_refused_and_nothing_runs(old_format, programs, tmp_path):
    ran, pt = tmp_path / "ran", tmp_path / "h.pt"
    hostile = Hostile(ran)
    torch.save({"routers": {"0.prob": hostile}, "compute": hostile}, pt, _use_new_zipfile_serialization=not old_format)
    np.savez(tmp_path / "h.npz", arr_0=np.array([hostile]), mu=np.array([hostile]))
    for name in ("h.safetensors", "h.pb"):
        (tmp_path / name).write_bytes(pickle.dumps(hostile))
    with pytest.raises(FileExistsError):  # the file does run code if it may
        ran.mkdir()
        torch.load(pt, weights_only=False)
    ran.rmdir()
    model, run = tmp_path / "model", tmp_path / "results" / "000-tiny" / "checkpoints"
    shutil.copytree(programs.model, model)
    shutil.copy(pt, model / "vae" / "diffusion_pytorch_model.bin")
    (model / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    run.mkdir(parents=True)
    shutil.copy(pt, run / "last.pt")
    sized, router = ["--model", "DiT-S/8", "--num-classes", 5, "--ckpt"], programs.router[:-1]
    for program, more, name in (
        ("sample.py", [*sized, pt], "h.pt"),
        ("sample.py", [*sized, tmp_path / "h.safetensors"], "h.safetensors"),
        ("sample.py", ["--ckpt", model], "vae"),
        ("sample.py", [*router, pt], "h.pt"),
        ("sample.py", ["--accelerate-method", "schedule", "--path", pt], "h.pt"),
        ("train_router.py", ["--resume", run.parent], "last.pt"),
        ("train_router.py", ["--resume", pt], "h.pt"),
        ("evaluator.py", ["--graph", tmp_path / "h.pb"], "h.pb"),
    ):
        assert_refused(programs.run(program, *more), name)
        assert not ran.exists()
    programs.flags["evaluator.py"][0] = tmp_path / "h.npz"
    assert_refused(programs.run("evaluator.py"), "h.npz")
    assert not ran.exists()


def test_hostile_latents_and_shards_are_refused_and_nothing_runs(programs, tmp_path):
    ran, hostile = tmp_path / "ran", io.BytesIO()
    np.save(hostile, np.array([[Hostile(ran)]]), allow_pickle=True)
    with_latents(programs)
    for name in ("000000.npy", "labels.npy"):
        path = tmp_path / "latents" / name
        whole = path.read_bytes()
        path.write_bytes(hostile.getvalue())
        assert_refused(programs.run("train_router.py"), "latents")
        path.write_bytes(whole)
    assert programs.run("sample_ddp.py", "--keep-shards").returncode == 0
    shard, made = next(tmp_path.rglob("0000002-0000004.npz")), next(tmp_path.glob("tiny-*.npz"))
    expected = made.read_bytes()
    made.unlink()
    np.savez(shard, images=np.array([Hostile(ran)]), labels=np.array([Hostile(ran)]))
    assert programs.run("sample_ddp.py").returncode == 0 and made.read_bytes() == expected
    np.savez(made, arr_0=np.zeros(1), manifest=np.array([Hostile(ran)]))
    assert_refused(programs.run("sample_ddp.py"), "is damaged")
    assert not ran.exists()


UNSAFE = re.compile(
    r"\b(eval|exec|__import__|os\.system|torch\.jit\.load|pickle\.(?!UnpicklingError)\w+)\(|^\s*(from|import) "
    r"(yaml|marshal|shelve|dill|joblib|cloudpickle)\b|^\s*from pickle|shell=True|allow_pickle=True|weights_only=False"
    r"|torch\.load\((?!.*weights_only=True)"
)


def unsafe(source):
    """The calls in a Python source that could run what a file holds."""
    lines = ast.unparse(ast.parse(source)).splitlines()  # no comments, and a call on one line
    return [line for line in lines if UNSAFE.search(line)]


def test_no_source_file_makes_a_call_that_could_run_what_a_file_holds():
    planted = ["import yaml", "from pickle import load", "pickle.load(f)", "eval(text)", "torch.load(path)"]
    planted += ["np.load(path, allow_pickle=True)", "run(text, shell=True)", "torch.load(\n  p, weights_only=False)"]
    assert all(unsafe(source) for source in planted)
    sources = [path for path in ROOT.rglob("*.py") if not re.match(r"tests/|\.", str(path.relative_to(ROOT)))]
    assert len(sources) > 30
    assert {str(path): found for path in sources if (found := unsafe(path.read_text()))} == {}


# A dead peer


def test_a_lost_connection_is_one_line():
    processes = Processes()
    with pytest.raises(UserError, match="process 0 lost the others .Connection closed by peer"):
        with processes.exchange():
            raise RuntimeError("Connection closed by peer [127.0.0.1]:1\nstack")
    with pytest.raises(RuntimeError), processes.exchange():
        no_memory()


@pytest.mark.slow
@pytest.mark.parametrize("program, rank", [("train_router.py", 0), ("sample_ddp.py", 1)])
def test_processes_whose_peer_was_killed_end_with_one_line(program, rank, programs, tmp_path):
    flags = [*programs.flags[program]]
    flags += ["--max-steps", 100000] if program == "train_router.py" else ["--num-fid-samples", 100000]
    pattern = "**/metrics.jsonl" if program == "train_router.py" else "**/shards/*-*.npz"
    with start(program, *flags, cwd=tmp_path, launcher=torchrun(2)) as process:
        while not any(path.stat().st_size for path in tmp_path.glob(pattern)):
            assert process.poll() is None
            time.sleep(0.05)
        workers = [p for p in psutil.Process(process.pid).children(True) if "RANK" in p.environ()]
        (victim,) = (p for p in workers if p.environ()["RANK"] == str(rank) and program in " ".join(p.cmdline()))
        victim.kill()
        out = "".join(process.communicate(timeout=300))
    assert process.returncode
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in workers)
    (line,) = (line for line in out.splitlines() if f"{program}: " in line)
    assert "lost the others" in line or "interrupted" in line
    for path in tmp_path.rglob(".*.part"):
        path.unlink()  # the victim was writing it; the next launch removes it
    assert_whole(tmp_path)
