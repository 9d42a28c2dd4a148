"""Programs under faults: no disk, rights or memory, Ctrl-C, changing or hostile files, a dead peer.

docs/reliability.md lists all faults; those that are not here are tested beside the module that handles them. Most are
made in this process at a named place, not after a time.
"""

import ast
import ctypes
import gc
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


class Programs:
    """The programs on small inputs below `folder`; `flags` has the flags that each needs."""

    def __init__(self, folder, model, images, capfd):
        self.folder, self.model, self.capfd = folder, model, capfd
        common = ["--ckpt", model, "--device", "cpu", "--num-sampling-steps", 4]
        training = "--global-batch-size 4 --draws-per-step 2 --num-workers 0 --log-every 1 --max-steps 3".split()
        training += ["--results-dir", folder / "results", "--data-path", shutil.copytree(images, folder / "images")]
        self.flags = {
            "sample.py": [*common, "--repeats", 1, "--out", folder / "out.png"],
            "sample_ddp.py": [*common, "--num-fid-samples", 6, "--per-proc-batch-size", 2, "--sample-dir", folder],
            "train_router.py": [*common, *training],
            "evaluator.py": [folder / "a.npz", folder / "b.npz", "--graph", GRAPH, "--device", "cpu"],
        }
        Router(4, 3).save(folder / "r.pt")
        random = np.random.default_rng(0)
        for name in ("a", "b"):
            np.savez(folder / f"{name}.npz", arr_0=random.integers(0, 256, (70, 32, 32, 3), dtype=np.uint8))

    def run(self, program, *more, place=None, harm=None):
        """Run a program here; harm(folder) comes before the first call of `place`, "package.module.Class.method"."""
        left = [harm] if place else []
        with pytest.MonkeyPatch.context() as patch:
            if place:
                owner, name = pkgutil.resolve_name(place.rpartition(".")[0]), place.rpartition(".")[2]
                unharmed = getattr(owner, name)

                def harmed(*args, **kwargs):
                    if left:
                        left.pop()(self.folder)
                    return unharmed(*args, **kwargs)

                patch.setattr(owner, name, harmed)
            flags = [str(flag).replace("FOLDER", str(self.folder)) for flag in [*self.flags[program], *more]]
            patch.setattr(sys, "argv", [str(ROOT / program), *flags])
            self.capfd.readouterr()
            code = 0
            try:
                runpy.run_path(str(ROOT / program), run_name="__main__")
            except SystemExit as stop:
                code = stop.code
        assert not left, f"{place} was not reached"
        out, err = self.capfd.readouterr()
        if isinstance(code, str):  # Python prints it and exits with code 1
            code, err = 1, err + code
        return SimpleNamespace(returncode=code or 0, stdout=out, stderr=err)

    def extract_latents(self):
        """Extract latents of the images; train with them from now on."""
        assert self.run("train_router.py", *LATENTS).returncode == 0
        self.flags["train_router.py"][-2:] = "--latents", self.folder / "latents"


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
        elif path.suffix in (".npz", ".pt"):
            assert zipfile.ZipFile(path).testzip() is None
        elif path.suffix == ".npy":
            np.load(path)
        elif path.suffix in (".json", ".jsonl"):
            [json.loads(text) for text in ([path.read_text()] if path.suffix == ".json" else path.open())]


# Ctrl-C, memory, files that change while they are read


def control_c(_):
    os.kill(os.getpid(), signal.SIGINT)


def no_memory(_):
    torch.empty(1 << 58, dtype=torch.uint8)


def no_memory_for_numpy(_):
    np.empty(1 << 58, np.uint8)


def no_memory_on_the_gpu(_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def cut(name):
    return lambda folder: os.truncate(folder / name, 700)


def remove(name):
    return lambda folder: (folder / name).rename(folder / "removed")


LATENTS = ["--extract-latents", "FOLDER/latents"]
STATISTICS = ["--save-stats", "FOLDER/s.npz", "--json", "FOLDER/r.json"]
ROUTER = ["--accelerate-method", "dynamiclayer", "--path", "FOLDER/r.pt"]
NETWORK = "evaluation.features.Network.extract"


@pytest.mark.parametrize(
    "program, more, place, harm, words",
    [
        ("sample.py", [], "pretrained.loading.load_dit", control_c, "interrupted"),
        ("sample.py", [], "models.DiT.denoise", control_c, "interrupted"),
        ("sample.py", [], "PIL.Image.Image.save", control_c, "interrupted"),
        ("sample_ddp.py", [], "diffusers.AutoencoderKL.decode", control_c, "interrupted"),
        ("sample_ddp.py", [], "evaluation.sample_set.write_npz", control_c, "interrupted"),
        ("train_router.py", LATENTS, "diffusers.AutoencoderKL.encode", control_c, "interrupted"),
        ("train_router.py", LATENTS, "numpy.save", control_c, "interrupted"),
        ("train_router.py", [], "torch.optim.AdamW.step", control_c, "interrupted"),
        ("evaluator.py", [], NETWORK, control_c, "interrupted"),
        ("evaluator.py", STATISTICS, "evaluation.evaluation_set.write_npz", control_c, "interrupted"),
        ("sample.py", [], "models.DiT.denoise", no_memory, "out of memory: pass fewer --class-labels"),
        ("sample.py", [], "models.DiT.denoise", no_memory_on_the_gpu, "out of memory: pass fewer --class-labels"),
        ("sample.py", ROUTER, "torch.load", no_memory_for_numpy, "r.pt needs more memory"),
        ("sample_ddp.py", [], "sampling.decode", no_memory, "memory for 2 images .* --per-proc-batch-size"),
        ("train_router.py", [], "torch.optim.AdamW.step", no_memory_on_the_gpu, "memory: .* --global-batch-size"),
        ("evaluator.py", [], NETWORK, no_memory_for_numpy, "out of memory: .* --batch-size"),
        ("sample.py", ROUTER, "torch.load", cut("r.pt"), "r.pt .*cut off"),
        ("evaluator.py", [], "evaluation.inception.Graph.run", cut("b.npz"), "b.npz"),
        ("evaluator.py", ["--graph", "FOLDER/g.pb"], "evaluation.features.version", remove("g.pb"), "g.pb"),
        ("train_router.py", [], "torch.optim.AdamW.step", remove("images"), "cannot be read"),
    ],
)
def test_a_fault_is_one_line_and_leaves_nothing_half_written(program, more, place, harm, words, programs, tmp_path):
    shutil.copy(GRAPH, tmp_path / "g.pb")
    result = programs.run(program, *more, place=place, harm=harm)
    assert result.returncode == (130 if harm is control_c else 1), result
    (line,) = result.stderr.strip().splitlines()
    assert re.match(f"{program}: (.*{words}|{words})", line), line
    for name in ("r.pt", "b.npz"):
        (tmp_path / name).unlink()
    assert_whole(tmp_path)


def test_a_latents_file_that_is_cut_off_while_it_is_read_is_one_line(programs, tmp_path):
    programs.extract_latents()  # a mapped file would kill this process
    result = programs.run("train_router.py", place="torch.optim.AdamW.step", harm=cut("latents/000000.npy"))
    assert_refused(result, "000000.npy cannot be read")


def test_weights_that_are_cut_off_after_loading_stay_in_memory(programs, tmp_path):
    shutil.copytree(programs.model, tmp_path / "model")
    assert programs.run("sample.py").returncode == 0
    expected = (tmp_path / "out.png").read_bytes()

    def cut_all(folder):  # mapped files would kill this process
        for path in (folder / "model").rglob("*.safetensors"):
            os.truncate(path, 0)

    result = programs.run("sample.py", "--ckpt", tmp_path / "model", place="models.DiT.denoise", harm=cut_all)
    assert result.returncode == 0 and (tmp_path / "out.png").read_bytes() == expected


@pytest.mark.slow
def test_a_killed_data_loading_process_is_one_line_and_the_last_update_is_kept(programs, tmp_path):
    def kill_a_worker(_):
        psutil.Process().children()[-1].kill()

    more = ["--num-workers", 1, "--max-steps", 1000, "--ckpt-every", 1000]
    result = programs.run("train_router.py", *more, place="training.trainer.Trainer.report", harm=kill_a_worker)
    assert_refused(result, "a data loading process was killed", "--num-workers")
    assert load_tensors(tmp_path / "results" / "000-tiny" / "checkpoints" / "last.pt")["step"] >= 1
    assert_whole(tmp_path)


def test_a_compressed_checkpoint_is_refused_before_memory_is_taken_for_it(tmp_path, monkeypatch):
    Router(4, 1000).save(tmp_path / "r.pt")
    whole = zipfile.ZipFile(tmp_path / "r.pt")
    with zipfile.ZipFile(tmp_path / "p.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in whole.namelist():
            packed.writestr(name, bytes(len(whole.read(name))))
    monkeypatch.setattr(torch, "load", None)  # it would take the memory
    with pytest.raises(UserError, match="p.pt .*larger than the file"):
        load_tensors(tmp_path / "p.pt")


# Disk and rights


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
    ],
)
def test_a_file_that_cannot_be_written_is_one_line_and_is_not_left(program, more, size, name, programs, tmp_path):
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


def test_an_output_that_is_full_or_closed_is_one_line():
    def printed(output, unbuffered):
        command = [sys.executable, ROOT / "download.py", "--list"]
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        return subprocess.run(command, env=environment, stdout=output, stderr=subprocess.PIPE, text=True)

    for unbuffered in ("", "1"):
        with open("/dev/full", "w") as full:
            assert_refused(printed(full, unbuffered), "download.py: error:", "No space left")
    reader, writer = os.pipe()
    os.close(reader)
    assert_refused(printed(writer, "1"), "download.py: error:", "Broken pipe")
    os.close(writer)


@pytest.fixture
def user_rights():
    """Take the capabilities away by which root reads and writes whatever chmod forbids."""
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
    model, closed, file = tmp_path / "model", tmp_path / "closed", tmp_path / "r.pt"
    shutil.copytree(programs.model, model)
    closed.mkdir()
    for path in (model / "dit.safetensors", file, closed):
        path.chmod(0)
    try:
        for program, more, name in (
            ("sample.py", ["--ckpt", model], "dit.safetensors"),
            ("sample.py", ROUTER, "r.pt"),
            ("sample_ddp.py", ["--sample-dir", closed], "closed"),
            ("train_router.py", ["--data-path", closed], "closed"),
            ("train_router.py", ["--results-dir", closed], "closed"),
            ("train_router.py", ["--extract-latents", closed / "latents"], "closed"),
            ("evaluator.py", ["--graph", file], "r.pt"),
            ("evaluator.py", ["--save-stats", closed / "s.npz"], "closed"),
        ):
            assert_refused(programs.run(program, *more), name, "Permission denied")
    finally:
        closed.chmod(0o700)
    assert not list(tmp_path.glob("results")) and not list(closed.iterdir())


# Nothing that is loaded can run code


class Hostile:
    """Unpickled, it makes the folder `target`."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_files_are_refused_and_nothing_runs(zipped, programs, tmp_path):
    ran, pt, model, run = tmp_path / "ran", tmp_path / "h.pt", tmp_path / "model", tmp_path / "run" / "checkpoints"
    hostile = Hostile(ran)
    torch.save({"routers": {"0.prob": hostile}, "compute": hostile}, pt, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FileExistsError):  # the file does run code if it may
        ran.mkdir()
        torch.load(pt, weights_only=False)
    ran.rmdir()
    np.savez(tmp_path / "h.npz", arr_0=np.array([hostile]), mu=np.array([hostile]))
    (tmp_path / "h.safetensors").write_bytes(pickle.dumps(hostile))
    shutil.copytree(programs.model, model)
    (model / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    run.mkdir(parents=True)
    for copy in (model / "vae" / "diffusion_pytorch_model.bin", run / "last.pt"):
        shutil.copy(pt, copy)
    sized = ["--model", "DiT-S/8", "--num-classes", 5, "--ckpt"]
    for program, more, name in (
        ("sample.py", [*sized, pt], "h.pt"),
        ("sample.py", [*sized, tmp_path / "h.safetensors"], "h.safetensors"),
        ("sample.py", ["--ckpt", model], "vae"),
        ("sample.py", [*ROUTER[:-1], pt], "h.pt"),
        ("sample.py", ["--accelerate-method", "schedule", "--path", pt], "h.pt"),
        ("train_router.py", ["--resume", run.parent], "last.pt"),
        ("evaluator.py", ["--graph", tmp_path / "h.safetensors"], "h.safetensors"),
    ):
        assert_refused(programs.run(program, *more), name)
    programs.flags["evaluator.py"][0] = tmp_path / "h.npz"
    assert_refused(programs.run("evaluator.py"), "h.npz")
    assert not ran.exists()


def test_hostile_latents_and_shards_are_refused_and_nothing_runs(programs, tmp_path):
    ran, content = tmp_path / "ran", io.BytesIO()
    np.save(content, np.array([[Hostile(ran)]]), allow_pickle=True)
    programs.extract_latents()
    for name in ("000000.npy", "labels.npy"):
        (tmp_path / "latents" / name).write_bytes(content.getvalue())
        assert_refused(programs.run("train_router.py"), "latents")
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
    r"(?<![\w.])(eval|exec|__import__|os\.system|torch\.jit\.load|pickle\.(?!UnpicklingError)\w+)\(|^\s*(from|import) "
    r"(yaml|marshal|shelve|dill|joblib|cloudpickle)\b|^\s*from pickle|shell=True|allow_pickle=True|weights_only=False"
    r"|torch\.load\((?!.*weights_only=True)"
)


def test_no_source_file_makes_a_call_that_could_run_what_a_file_holds():
    def unsafe(source):
        lines = ast.unparse(ast.parse(source)).splitlines()  # no comments, and each call on one line
        return [line for line in lines if UNSAFE.search(line)]

    for planted in ("import yaml", "pickle.load(f)", "eval(text)", "torch.load(\n  path)", "run(text, shell=True)"):
        assert unsafe(planted)
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
        no_memory(None)


@pytest.mark.slow
@pytest.mark.parametrize("program, rank", [("train_router.py", 0), ("sample_ddp.py", 1)])
def test_processes_whose_peer_was_killed_end_with_one_line(program, rank, programs, tmp_path):
    training = program == "train_router.py"
    flags = [*programs.flags[program], *(["--max-steps", 100000] if training else ["--num-fid-samples", 100000])]
    with start(program, *flags, cwd=tmp_path, launcher=torchrun(2)) as process:
        while not list(tmp_path.rglob("metrics.jsonl" if training else "shards/*-*.npz")):
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
    for path in tmp_path.rglob("metrics.jsonl"):
        path.unlink()
    assert_whole(tmp_path)
