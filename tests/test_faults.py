"""The programs, hurt: no disk, no rights, no memory, files that change, Ctrl-C, hostile files, a dead peer.

docs/reliability.md is the table of all faults, those that other files test too. Most happen in this process, at a
stage that is named and not timed: a function of the program is replaced by one that hurts first.
"""

import ast
import ctypes
import gc
import importlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_refused, call, start, torchrun
from PIL import Image

from pretrained.loading import load_vae
from pretrained.spec import model_spec
from router import Router
from runtime import cli
from runtime.errors import UserError
from runtime.files import load_tensors
from runtime.hashes import fingerprint
from runtime.processes import Processes
from training.batches import loaded
from training.latents import extract_latents, finish_latents, prepare_latents
from training.sources import ImageSource

GRAPH = ROOT / "ckpt" / "fashion_mnist" / "classifier.pb"
TOO_MUCH = 1 << 58  # bytes that no machine has


class Hurt:
    """The programs on small inputs below `folder`, each with the `flags` that it needs."""

    def __init__(self, folder, model, images, capfd):
        self.folder, self.model, self.images, self.capfd = folder, model, images, capfd
        common = ["--ckpt", model, "--device", "cpu", "--num-sampling-steps", 4]
        self.flags = {
            "sample.py": [*common, "--repeats", 1, "--out", folder / "out.png"],
            "sample_ddp.py": [*common, "--num-fid-samples", 6, "--per-proc-batch-size", 2, "--sample-dir", folder],
            "train_router.py": [*common, "--global-batch-size", 4, "--draws-per-step", 2, "--num-workers", 0]
            + ["--log-every", 1, "--max-steps", 3, "--results-dir", folder / "results", "--data-path", images],
            "evaluator.py": [folder / "a.npz", folder / "b.npz", "--graph", GRAPH, "--device", "cpu"],
        }
        random = np.random.default_rng(0)
        for name in ("a", "b"):
            np.savez(folder / f"{name}.npz", arr_0=random.integers(0, 256, (70, 32, 32, 3), dtype=np.uint8))

    def run(self, program, *more, place=None, hurt=None):
        """The program in this process. `hurt()` is called when `place` is reached for the first time, before what is
        there: "module.function" or "module.Class.method"."""
        left = [hurt]
        with pytest.MonkeyPatch.context() as patch:
            if place:
                *owner, name = place.split(".")
                module = next(k for k in range(len(owner), 0, -1) if importlib.util.find_spec(".".join(owner[:k])))
                where, owner = importlib.import_module(".".join(owner[:module])), owner[module:]
                for part in owner:
                    where = getattr(where, part)
                before = getattr(where, name)

                def hurting(*args, **kwargs):
                    if left:
                        left.pop()()
                    return before(*args, **kwargs)

                patch.setattr(where, name, hurting)
            line = re.search(r"memory_hint=(.*)\)$", (ROOT / program).read_text(), re.M)
            less = {"memory_hint": ast.literal_eval(line[1])} if line else {}
            run = cli.run
            patch.setattr(cli, "run", lambda main, args: run(main, args, **less))
            try:
                result = call(program, *self.flags[program], *more, capfd=self.capfd)
            except KeyboardInterrupt:
                pytest.fail("Ctrl-C went through")
        assert not left or not place, f"{place} was not reached"
        return result


@pytest.fixture
def hurt(tmp_path, model_folder, image_folder, capfd):
    threads = torch.get_num_threads()
    yield Hurt(tmp_path, model_folder, image_folder, capfd)
    torch.set_num_threads(threads)


def assert_whole(folder):
    """What is in the folder is whole: nothing is half written."""
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


COMPARE = ["--accelerate-method", "dynamiclayer", "--path", "ROUTER", "--compare", "--record", "FOLDER/r.json"]
STATISTICS = ["--save-stats", "FOLDER/s.npz", "--json", "FOLDER/r.json"]
STAGES = [
    ("sample.py", "pretrained.loading.load_dit", []),
    ("sample.py", "sampling.make_denoiser", []),
    ("sample.py", "sampling.decode", []),
    ("sample.py", "PIL.Image.Image.save", []),
    ("sample.py", "runtime.devices.device_name", COMPARE),
    ("sample_ddp.py", "pretrained.loading.load_dit", []),
    ("sample_ddp.py", "sampling.make_denoiser", []),
    ("sample_ddp.py", "sampling.decode", []),
    ("sample_ddp.py", "shards.write_npz", []),
    ("sample_ddp.py", "evaluation.sample_set.SampleSet._labels", []),
    ("train_router.py", "training.batches.encode", ["--extract-latents", "FOLDER/latents"]),
    ("train_router.py", "numpy.save", ["--extract-latents", "FOLDER/latents"]),
    ("train_router.py", "pretrained.loading.load_dit", []),
    ("train_router.py", "updates.router_loss", []),
    ("train_router.py", "router.Router.state", []),
    ("train_router.py", "train_router.describe", []),
    ("train_router.py", "runs.save_animation", []),
    ("evaluator.py", "image_sets.read_header", []),
    ("evaluator.py", "image_sets.read_parts", []),
    ("evaluator.py", "evaluation.inception.Graph.run", []),
    ("evaluator.py", "image_sets.write_npz", STATISTICS),
    ("evaluator.py", "evaluation.metrics.frechet_distance", []),
    ("evaluator.py", "evaluation.metrics.precision_recall", []),
    ("evaluator.py", "runtime.devices.device_name", STATISTICS),
]


def filled(flags, folder, model):
    """`flags` with FOLDER and ROUTER replaced."""
    return [str(flag).replace("FOLDER", str(folder)).replace("ROUTER", str(model / "router4.pt")) for flag in flags]


@pytest.mark.parametrize("program, place, more", STAGES)
def test_ctrl_c_at_any_stage_is_one_line_and_leaves_nothing_half_written(program, place, more, hurt, tmp_path):
    result = hurt.run(program, *filled(more, tmp_path, hurt.model), place=place, hurt=control_c)
    assert result.returncode == 130, result
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"{program}: interrupted")
    assert_whole(tmp_path)
    if place.startswith("sampling."):
        assert not [*tmp_path.glob("*.png"), *tmp_path.glob("samples/*.npz")]


def run_after(setup, program, *flags, cwd):
    """The program in a process of its own, by its own entry point, after the statements `setup`."""
    begin = "import os, runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, os.path.dirname(sys.argv[0]))\n"
    command = [sys.executable, "-c", f"{begin}{setup}\nrunpy.run_path(sys.argv[0], run_name='__main__')"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(map(str, [*command, ROOT / program, *flags])),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


INTERRUPT = """
import importlib, signal
owner, name = importlib.import_module("{}"), "{}"
before = getattr(owner, name)
def hurting(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGINT)
    return before(*args, **kwargs)
setattr(owner, name, hurting)
"""


@pytest.mark.parametrize(
    "program, place", [("sample_ddp.py", "sampling.decode"), ("evaluator.py", "evaluation.metrics.inception_score")]
)
def test_a_process_that_is_interrupted_ends_with_code_130(program, place, hurt, tmp_path):
    """The end of the process itself, with its threads: by the same entry point that a user types."""
    result = run_after(INTERRUPT.format(*place.split(".")), program, *hurt.flags[program], cwd=tmp_path)
    assert result.returncode == 130, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and f"{program}: interrupted" in result.stderr
    assert_whole(tmp_path)


# Memory


def no_memory():
    torch.empty(TOO_MUCH, dtype=torch.uint8)  # the allocator's own error


def no_memory_on_the_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def no_memory_for_numpy():
    np.empty(TOO_MUCH, np.uint8)


@pytest.mark.parametrize("fault", [no_memory, no_memory_on_the_gpu])
@pytest.mark.parametrize(
    "program, place, flag",
    [
        ("sample.py", "sampling.make_denoiser", "--class-labels"),
        ("sample_ddp.py", "sampling.decode", "2 images at a time: pass a smaller --per-proc-batch-size"),
        ("train_router.py", "updates.router_loss", "--global-batch-size"),
        ("evaluator.py", "evaluation.features.Network.extract", "--batch-size"),
    ],
)
def test_too_little_memory_for_a_batch_names_the_flag_to_lower(program, place, flag, fault, hurt, tmp_path):
    assert_refused(hurt.run(program, place=place, hurt=fault), "memory", flag)
    assert_whole(tmp_path)


def test_too_little_memory_for_a_file_is_said_of_the_file(hurt, tmp_path):
    Router(4, 3).save(tmp_path / "r.pt")
    flags = "--accelerate-method", "dynamiclayer", "--path", tmp_path / "r.pt"
    for fault in (no_memory, no_memory_for_numpy):
        assert_refused(hurt.run("sample.py", *flags, place="torch.load", hurt=fault), "r.pt needs more memory")


def test_a_batch_beyond_the_memory_that_a_process_may_take_is_one_line(tmp_path):
    """The real thing: 20,000 images at a time in 1.5 GB, of which Python and torch take a part."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (3 << 29, 3 << 29))"
    flags = ["--ckpt", ROOT / "ckpt" / "fashion_mnist", "--device", "cpu", "--num-sampling-steps", 2, "--class-labels"]
    result = run_after(limit, "sample.py", *flags, *[0] * 20000, cwd=tmp_path)
    assert_refused(result, "memory does not suffice", "fewer --class-labels")
    assert not list(tmp_path.iterdir())


def test_a_data_loading_process_that_is_killed_is_one_line_and_the_last_update_is_kept(hurt, tmp_path):
    def kill_a_worker():
        import multiprocessing

        multiprocessing.active_children()[0].kill()

    more = ["--num-workers", 1, "--max-steps", 1000, "--ckpt-every", 1000]
    result = hurt.run("train_router.py", *more, place="train_router.describe", hurt=kill_a_worker)
    assert_refused(result, "a data loading process was killed", "--num-workers")
    assert load_tensors(tmp_path / "results" / "000-tiny" / "checkpoints" / "last.pt")["step"] >= 1
    assert_whole(tmp_path)


def test_a_data_loading_process_that_is_gone_does_not_disturb_what_is_saved_then():
    def ends():
        yield "batch"
        raise ConnectionResetError

    before = signal.signal(signal.SIGCHLD, lambda *_: None)  # as PyTorch does, to raise in the middle of anything
    try:
        batches = loaded(ends())
        assert next(batches) == "batch"
        with pytest.raises(RuntimeError, match="^DataLoader worker"):
            next(batches)
        assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_packed_checkpoint_is_refused_before_memory_is_taken_for_it(tmp_path, monkeypatch):
    Router(4, 1000).save(tmp_path / "r.pt")
    with (
        zipfile.ZipFile(tmp_path / "r.pt") as whole,
        zipfile.ZipFile(tmp_path / "p.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in whole.namelist():
            packed.writestr(name, bytes(len(whole.read(name))))
    monkeypatch.setattr(torch, "load", None)  # which would take it
    with pytest.raises(UserError, match="p.pt cannot be read .its parts are larger than the file"):
        load_tensors(tmp_path / "p.pt")


# Disk


class LimitedFiles:
    """In this block a file beyond `size` bytes cannot be written, as on a full disk but at a known place."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize(
    "program, more, size, name",
    [
        ("sample.py", [], 1000, "out.png"),
        ("sample.py", [*COMPARE, "--random-weights"], 800, "r.json"),
        ("sample_ddp.py", ["--per-proc-batch-size", 6], 1400, "0000000-0000006.npz"),
        ("sample_ddp.py", [], 1400, "n-6.npz"),
        ("train_router.py", ["--extract-latents", "FOLDER/latents"], 1000, "000000.npy"),
        ("train_router.py", [], 1000, "last.pt"),
        ("train_router.py", [], 10000, "0000003.png"),
        ("train_router.py", ["--max-steps", 1000], 16000, "metrics.jsonl"),
        ("evaluator.py", ["--save-stats", "FOLDER/s.npz", "--metrics", "fid"], 2000, "s.npz"),
        ("evaluator.py", ["--json", "FOLDER/r.json", "--metrics", "fid"], 700, "r.json"),
    ],
)
def test_a_file_that_cannot_be_written_to_its_end_is_one_line_and_is_not_left(
    program, more, size, name, hurt, tmp_path
):
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.npz")}
    with LimitedFiles(size):
        result = hurt.run(program, *filled(more, tmp_path, hurt.model))
    gc.collect()  # where Python 3.12.1 crashes on a view of an io.BytesIO that the error's traceback holds
    assert result.returncode == 1, result
    *warnings, line = result.stderr.strip().splitlines()
    assert all(" warning: " in warning for warning in warnings)
    assert name in line and "File too large" in line
    assert name == "metrics.jsonl" or not list(tmp_path.rglob(f"*{name}"))
    for path in tmp_path.rglob("metrics.jsonl"):
        path.unlink()  # its last line may be cut: read_history skips that
    assert_whole(tmp_path)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_an_output_that_is_full_or_closed_is_one_line():
    command = [sys.executable, ROOT / "download.py", "--list"]
    # Written at once, or kept until the end.
    for unbuffered in ("", "1"):
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        with open("/dev/full", "w") as full:
            result = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
        assert_refused(result, "download.py: error:", "No space left")
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert_refused(result, "download.py: error:", "Broken pipe")


# Rights


@pytest.fixture
def rights():
    """Root reads and writes what chmod forbids; without two of its capabilities it does not, as everybody else."""
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


def test_what_may_not_be_read_or_written_is_one_line(hurt, rights, tmp_path):
    closed, file = tmp_path / "closed", tmp_path / "file"
    shutil.copytree(hurt.images, closed / "images")
    Router(4, 3).save(file)
    (closed / "in").write_bytes(file.read_bytes())
    shutil.copy(tmp_path / "a.npz", tmp_path / "no.npz")
    shutil.copytree(hurt.model, tmp_path / "model")
    for path in (tmp_path / "model" / "dit.safetensors", file, tmp_path / "no.npz", closed):
        path.chmod(0)
    router = ["--accelerate-method", "dynamiclayer", "--path"]
    try:
        for program, more, name in (
            ("sample.py", ["--ckpt", tmp_path / "model"], "dit.safetensors"),
            ("sample.py", ["--ckpt", closed], "closed"),
            ("sample.py", [*router, file], "file"),
            ("sample.py", [*router, closed / "in"], "closed/in"),
            ("sample.py", ["--out", closed / "x.png"], "closed"),
            ("sample_ddp.py", ["--sample-dir", closed], "closed"),
            ("sample_ddp.py", [*router, file], "file"),
            ("train_router.py", ["--data-path", closed / "images"], "closed"),
            ("train_router.py", ["--data-path", closed], "closed"),
            ("train_router.py", ["--results-dir", closed], "closed"),
            ("train_router.py", ["--resume", file], "file"),
            ("train_router.py", ["--extract-latents", closed / "latents"], "closed"),
            ("evaluator.py", ["--graph", file], "file"),
            ("evaluator.py", ["--save-stats", closed / "s.npz"], "closed"),
        ):
            result = hurt.run(program, *more)
            assert_refused(result, name, "Permission denied")
            assert "fetch it again" not in result.stderr
        hurt.flags["evaluator.py"][1] = tmp_path / "no.npz"
        assert_refused(hurt.run("evaluator.py"), "no.npz", "Permission denied")
        hurt.flags["evaluator.py"][1] = closed
        assert_refused(hurt.run("evaluator.py"), "closed")
    finally:
        closed.chmod(0o700)
    assert not list((tmp_path).glob("results")) and len(list(closed.iterdir())) == 2


# Files that change while they are read


def in_a_child(function):
    """The exit code of a process that is a copy of this one and calls the function; a signal's is negative."""
    pid = os.fork()
    if not pid:
        try:
            torch.set_num_threads(1)  # a copy has none of the threads that compute, and would wait for them
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_weights_that_are_cut_off_after_they_were_read_stay_what_they_were(model_folder, tmp_path):
    """A file that is mapped into memory and cut off then kills the process by SIGBUS."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    large = torch.ones(1 << 20)
    importlib.import_module("safetensors.torch").save_file({"x": large}, tmp_path / "x.safetensors")

    def read_cut_use():
        spec = model_spec(ckpt=folder)
        vae, x = load_vae(spec, "cpu"), load_tensors(tmp_path / "x.safetensors")["x"]
        for path in (tmp_path / "x.safetensors", folder / "vae" / "diffusion_pytorch_model.safetensors"):
            os.truncate(path, 0)
        assert torch.equal(x, large)
        fingerprint(vae, {})

    assert in_a_child(read_cut_use) == 0


def test_files_that_change_while_they_are_read_are_one_line(hurt, tmp_path):
    path = tmp_path / "r.pt"
    Router(4, 3).save(path)
    flags = "--accelerate-method", "dynamiclayer", "--path", path
    result = hurt.run("sample.py", *flags, place="torch.load", hurt=lambda: os.truncate(path, 700))
    assert_refused(result, "r.pt", "cut off")
    sample = tmp_path / "b.npz"
    whole = sample.read_bytes()
    for place, change, words in (
        ("evaluation.inception.Graph.run", lambda: os.truncate(sample, 50000), "b.npz"),
        ("evaluation.metrics.frechet_distance", sample.unlink, "b.npz"),
    ):
        sample.write_bytes(whole)
        assert_refused(hurt.run("evaluator.py", "--json", tmp_path / "r.json", place=place, hurt=change), words)
    sample.write_bytes(whole)
    graph = tmp_path / "graph.pb"
    shutil.copy(GRAPH, graph)
    result = hurt.run("evaluator.py", "--graph", graph, place="features.version", hurt=graph.unlink)
    assert_refused(result, "graph.pb", "No such file")
    images = tmp_path / "images"
    shutil.copytree(hurt.images, images)
    result = hurt.run(
        "train_router.py", "--data-path", images, place="updates.router_loss", hurt=lambda: shutil.rmtree(images)
    )
    assert_refused(result, "cannot be read")


def latents(hurt, folder):
    """Latents of the images in `folder`; the flags to train with them."""
    spec = model_spec(ckpt=hurt.model)
    vae, images = load_vae(spec, torch.device("cpu")), ImageSource(hurt.images, spec)
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    prepare_latents(images, spec, folder, fingerprint(vae, config))
    extract_latents(images, vae, spec, folder)
    finish_latents(images, folder)
    flags = hurt.flags["train_router.py"]
    del flags[flags.index("--data-path") :][:2]
    hurt.flags["train_router.py"] = [*flags[: flags.index("--data-path")], "--latents", folder]


TRUNCATE = """
import training.trainer as updates
before = updates.router_loss
def hurting(*args):
    os.truncate("{}", 300)
    return before(*args)
updates.router_loss = hurting
"""


def test_latents_that_change_while_they_are_read_are_one_line(hurt, tmp_path):
    folder = tmp_path / "latents"
    latents(hurt, folder)
    path = folder / "000000.npy"
    whole = path.read_bytes()

    # In a process of its own: a map of the file would kill it, and a copy of this one may not compute gradients.
    result = run_after(TRUNCATE.format(path), "train_router.py", *hurt.flags["train_router.py"], cwd=tmp_path)
    assert_refused(result, "000000.npy cannot be read")
    for content in (whole[:50], whole.replace(b"<f2", b"<f4"), b""):
        path.write_bytes(content)
        assert_refused(hurt.run("train_router.py"), "000000.npy cannot be read")


# Nothing that is loaded can run code


class Hostile:
    """Unpickled, it makes the folder `target`."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def write_hostile_files(folder, target, legacy):
    """A hostile file of each kind, named h; `legacy`: as torch wrote them before version 1.6."""
    hostile = Hostile(target)
    content = {"routers": {"0.prob": hostile}, "compute": hostile}
    torch.save(content, folder / "h.pt", _use_new_zipfile_serialization=not legacy)
    np.savez(folder / "h.npz", arr_0=np.array([hostile]), mu=np.array([hostile]))
    for name in ("h.safetensors", "h.pb"):
        (folder / name).write_bytes(pickle.dumps(hostile))


@pytest.mark.parametrize("legacy", [False, True])
def test_hostile_files_are_refused_and_nothing_runs(legacy, hurt, tmp_path):
    ran = tmp_path / "ran"
    write_hostile_files(tmp_path, ran, legacy)
    pt = tmp_path / "h.pt"
    with pytest.raises(FileExistsError):  # the file does run something where it is let
        ran.mkdir()
        torch.load(pt, weights_only=False)
    ran.rmdir()
    model = tmp_path / "model"
    shutil.copytree(hurt.model, model)
    shutil.copy(pt, model / "vae" / "diffusion_pytorch_model.bin")
    (model / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    other = tmp_path / "other"
    shutil.copytree(hurt.model, other)
    shutil.copy(tmp_path / "h.safetensors", other / "dit.safetensors")
    run = tmp_path / "results" / "000-tiny" / "checkpoints"
    run.mkdir(parents=True)
    shutil.copy(pt, run / "last.pt")
    sized = ["--model", "DiT-S/8", "--num-classes", 5, "--ckpt"]
    for program, more, name in (
        ("sample.py", [*sized, pt], "h.pt"),
        ("sample.py", [*sized, tmp_path / "h.safetensors"], "h.safetensors"),
        ("sample.py", ["--ckpt", model], "vae"),
        ("sample.py", ["--ckpt", other], "dit.safetensors"),
        ("sample.py", ["--accelerate-method", "dynamiclayer", "--path", pt], "h.pt"),
        ("sample.py", ["--accelerate-method", "schedule", "--path", pt], "h.pt"),
        ("sample_ddp.py", [*sized, pt], "h.pt"),
        ("sample_ddp.py", ["--accelerate-method", "dynamiclayer", "--path", pt], "h.pt"),
        ("train_router.py", [*sized, pt], "h.pt"),
        ("train_router.py", ["--resume", run.parent], "last.pt"),
        ("train_router.py", ["--resume", pt], "h.pt"),
        ("evaluator.py", ["--graph", tmp_path / "h.pb"], "h.pb"),
    ):
        assert_refused(hurt.run(program, *more), name)
        assert not ran.exists()
    hurt.flags["evaluator.py"][0] = tmp_path / "h.npz"
    assert_refused(hurt.run("evaluator.py"), "h.npz")
    # --resume auto passes over what cannot be continued.
    assert hurt.run("train_router.py", "--resume", "auto").returncode == 0
    assert not ran.exists()


def test_hostile_latents_shards_and_sets_are_refused_and_nothing_runs(hurt, tmp_path):
    ran, folder = tmp_path / "ran", tmp_path / "latents"
    latents(hurt, folder)
    hostile = io.BytesIO()
    np.save(hostile, np.array([[Hostile(ran)]]), allow_pickle=True)
    for name in ("000000.npy", "labels.npy"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(hostile.getvalue())
        assert_refused(hurt.run("train_router.py"), "latents")
        (folder / name).write_bytes(whole)
    assert hurt.run("sample_ddp.py", "--keep-shards").returncode == 0
    shard, made = next(tmp_path.rglob("0000002-0000004.npz")), next(tmp_path.glob("tiny-*.npz"))
    expected = made.read_bytes()
    made.unlink()
    np.savez(shard, images=np.array([Hostile(ran)]), labels=np.array([Hostile(ran)]))
    result = hurt.run("sample_ddp.py")
    assert "the shard of images 2 to 3 is damaged" in result.stdout and made.read_bytes() == expected
    np.savez(made, arr_0=np.zeros(1), manifest=np.array([Hostile(ran)]))
    assert_refused(hurt.run("sample_ddp.py"), "is damaged")
    assert not ran.exists()


def unsafe(source):
    """What in a Python source could run what a file holds: the line and the call."""
    for node in ast.walk(ast.parse(source)):
        found = None
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            bad = {"yaml", "marshal", "shelve", "dill", "joblib", "cloudpickle"}
            found = next((name for name in names if name.partition(".")[0] in bad), None)
            found = found or (isinstance(node, ast.ImportFrom) and node.module == "pickle" and "pickle")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pickle":
            found = node.attr != "UnpicklingError" and f"pickle.{node.attr}"
        elif isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in ("eval", "exec", "compile", "__import__", "torch.jit.load", "os.system"):
                found = name
            elif name == "torch.load":
                found = given.get("weights_only") != "True" and name
            elif name in ("np.load", "numpy.load"):
                found = given.get("allow_pickle", "False") != "False" and name
            elif given.get("shell", "False") != "False":
                found = f"{name}(shell)"
        if found:
            yield f"{node.lineno}: {found}"


@pytest.mark.parametrize(
    "planted",
    [
        "import yaml",
        "from pickle import load",
        "import pickle\npickle.load(f)",
        "eval(text)",
        "exec(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_search_for_unsafe_calls_finds_them(planted):
    assert list(unsafe(planted))


def test_no_source_file_loads_anything_that_could_run_code():
    sources = [path for path in ROOT.rglob("*.py") if not re.match(r"tests/|\.", str(path.relative_to(ROOT)))]
    assert len(sources) > 30
    assert {str(path): found for path in sources if (found := list(unsafe(path.read_text())))} == {}


# A dead peer


def test_a_message_that_fails_is_one_line():
    processes = Processes()
    with pytest.raises(UserError, match="process 0 lost the others .Connection closed by peer"):
        with processes.exchange():
            raise RuntimeError("Connection closed by peer [127.0.0.1]:1\nstack")
    with pytest.raises(RuntimeError), processes.exchange():
        no_memory()


@pytest.mark.parametrize("program, rank", [("train_router.py", 0), ("sample_ddp.py", 1)])
def test_processes_whose_peer_was_killed_leave_within_a_minute_with_one_line(program, rank, hurt, tmp_path):
    import psutil

    flags = [*hurt.flags[program]]
    flags += ["--max-steps", 100000] if program == "train_router.py" else ["--num-fid-samples", 100000]
    with start(program, *flags, cwd=tmp_path, launcher=torchrun(2)) as process:
        pattern = "**/metrics.jsonl" if program == "train_router.py" else "**/shards/*-*.npz"
        end = time.monotonic() + 120
        while not any(path.stat().st_size for path in tmp_path.glob(pattern)):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        workers = [p for p in psutil.Process(process.pid).children(True) if "RANK" in p.environ()]
        (victim,) = (p for p in workers if p.environ()["RANK"] == str(rank) and program in " ".join(p.cmdline()))
        victim.kill()
        since = time.monotonic()
        out = "".join(process.communicate(timeout=120))
    assert time.monotonic() - since < 60 and process.returncode
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in workers)
    (line,) = (line for line in out.splitlines() if f"{program}: " in line)
    assert "lost the others" in line or "interrupted" in line
    assert str(ROOT / program) + '"' not in out  # as a line of a traceback has it
    for path in tmp_path.rglob(".*.part"):
        path.unlink()  # what the killed one was writing, which the next start removes
    assert_whole(tmp_path)
