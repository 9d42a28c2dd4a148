"""Programs under faults: no disk, rights or memory, Ctrl-C, changing or hostile files, a dead peer.

docs/reliability.md lists all faults; those that are not here are tested beside the module that handles them. The faults
happen in this process at a named place, not after a time.
"""

import ast
import builtins
import ctypes
import errno
import gc
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
from safetensors.torch import save_file
from tqdm import tqdm

from router import Router
from runtime.errors import UserError
from runtime.files import load_tensors
from runtime.processes import Processes


class Programs:
    """The programs on small inputs below `folder`, which replaces FOLDER in flags."""

    def __init__(self, folder, capfd):
        self.folder, self.capfd = folder, capfd
        model = "--ckpt FOLDER/model --device cpu"
        common = f"{model} --num-sampling-steps 4"
        training = "--global-batch-size 4 --draws-per-step 2 --log-every 1 --max-steps 3 --results-dir FOLDER/results"
        self.flags = {
            "sample.py": f"{common} --repeats 1 --out FOLDER/out.png",
            "sample_ddp.py": f"{common} --num-fid-samples 6 --per-proc-batch-size 2 --sample-dir FOLDER",
            "train_router.py": f"{common} --num-workers 0 {training}",
            "extraction": f"{model} --num-workers 0",
            "evaluator.py": "FOLDER/a.npz FOLDER/b.npz --graph FOLDER/g.pb --device cpu",
        }

    def command(self, program, more=""):
        flags = self.flags["extraction" if "--extract-latents" in more else program]
        return [ROOT / program, *f"{flags} {more}".replace("FOLDER", str(self.folder)).split()]

    def run(self, program, more="", place=None, harm=None):
        """Run a program here. harm(folder) comes before it, or before the first call of `place`, a function's name."""
        left = [harm] if place else []
        if harm and not place:
            harm(self.folder)
        with pytest.MonkeyPatch.context() as patch:
            if place:
                owner, _, name = place.rpartition(".")
                owner = pkgutil.resolve_name(owner)
                unharmed = getattr(owner, name)

                def harmed(*args, **kwargs):
                    if left:
                        left.pop()(self.folder)
                    return unharmed(*args, **kwargs)

                patch.setattr(owner, name, harmed)
            patch.setattr(sys, "argv", list(map(str, self.command(program, more))))
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


@pytest.fixture
def programs(tmp_path, model_folder, image_folder, capfd):
    """Programs in a folder with all their inputs, and without root's rights."""
    shutil.copytree(model_folder, tmp_path / "model")
    shutil.copytree(image_folder, tmp_path / "images")
    shutil.copy(ROOT / "ckpt" / "fashion_mnist" / "classifier.pb", tmp_path / "g.pb")
    Router(4, 3).save(tmp_path / "r.pt")
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", arr_0=random.integers(0, 256, (70, 32, 32, 3), dtype=np.uint8))
    threads, limits = torch.get_num_threads(), resource.getrlimit(resource.RLIMIT_FSIZE)
    libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    before = sets[0]
    sets[0] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH: root ignores what chmod forbids
    assert libc.capset(header, sets) == 0
    yield Programs(tmp_path, capfd)
    sets[0] = before
    assert libc.capset(header, sets) == 0
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    torch.set_num_threads(threads)


def control_c(_):
    os.kill(os.getpid(), signal.SIGINT)


def no_memory(_):
    torch.empty(1 << 58, dtype=torch.uint8)


def no_memory_for_numpy(_):
    np.empty(1 << 58, np.uint8)


def no_memory_on_the_gpu(_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def kill_a_worker(_):
    psutil.Process().children()[-1].kill()


def cut(name):
    return lambda folder: os.truncate(folder / name, 700)


def remove(name):
    return lambda folder: (folder / name).rename(folder / "removed")


def forbid(name):
    return lambda folder: [(folder / name).mkdir() if name == "closed" else None, (folder / name).chmod(0)]


def limit(size):
    """Files cannot grow beyond `size` bytes, as on a full disk."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    return lambda folder: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def enlarge(name):
    """Make a weight of the VAE so large that values overflow."""

    def write(folder):
        path = folder / "model" / "vae" / "diffusion_pytorch_model.safetensors"
        state = load_tensors(path)
        save_file(state | {name: torch.full_like(state[name], 3e38)}, path)

    return write


class Hostile:
    """Unpickled, it makes the folder `target`."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def hostile(name, zipped=True):
    """Put a file in place of another that runs code if it may."""

    def write(folder):
        path, content = folder / name, Hostile(folder / "ran")
        for beside in path.parent.glob(f"{path.stem}.safetensors"):
            beside.unlink()
        if path.suffix in (".pt", ".bin"):
            content = {"routers": {"0.prob": content}, "compute": content}
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
        elif path.suffix == ".npz":
            np.savez(path, arr_0=np.array([content]), mu=np.array([content]))
        elif path.suffix == ".npy":
            np.save(path, np.array([[content]]), allow_pickle=True)
        else:
            path.write_bytes(pickle.dumps(content))

    return write


IMAGES, EXTRACT = "--data-path FOLDER/images", "--data-path FOLDER/images --extract-latents FOLDER/latents"
LATENTS, STATISTICS = "--latents FOLDER/latents", "--metrics fid --save-stats FOLDER/s.npz --json FOLDER/r.json"
ROUTER, SCHEDULE = (f"--accelerate-method {method} --path FOLDER/r.pt" for method in ("dynamiclayer", "schedule"))
STEP, REPORT = "torch.optim.AdamW.step", "training.trainer.Trainer.report"
EXTRACTION = "evaluation.features.Network.extract"


@pytest.mark.parametrize(
    "program, more, place, harm, words",
    [
        ("sample.py", "", "pretrained.loading.load_dit", control_c, "interrupted"),
        ("sample.py", "", "models.DiT.denoise", control_c, "interrupted"),
        ("sample.py", "", "PIL.Image.Image.save", control_c, "interrupted"),
        ("sample_ddp.py", "", "pretrained.autoencoder.AutoencoderKL.decode", control_c, "interrupted"),
        ("sample_ddp.py", "", "evaluation.sample_set.write_npz", control_c, "interrupted"),
        ("train_router.py", EXTRACT, "pretrained.autoencoder.AutoencoderKL.encode", control_c, "interrupted"),
        ("train_router.py", EXTRACT, "numpy.save", control_c, "interrupted"),
        ("train_router.py", IMAGES, STEP, control_c, "interrupted"),
        ("evaluator.py", "", EXTRACTION, control_c, "interrupted"),
        ("evaluator.py", STATISTICS, "evaluation.evaluation_set.write_npz", control_c, "interrupted"),
        ("sample.py", "", "models.DiT.denoise", no_memory, "memory: pass fewer --class-labels"),
        ("sample.py", "", "models.DiT.denoise", no_memory_on_the_gpu, "memory: pass fewer --class-labels"),
        ("sample.py", ROUTER, "torch.load", no_memory_for_numpy, "r.pt needs more memory"),
        ("sample_ddp.py", "", "sampling.decode_unchecked", no_memory, "memory: .* --per-proc-batch-size"),
        ("train_router.py", IMAGES, STEP, no_memory_on_the_gpu, "memory: .* --global-batch-size"),
        ("evaluator.py", "", EXTRACTION, no_memory_for_numpy, "memory: .* --batch-size"),
        ("sample.py", ROUTER, "torch.load", cut("r.pt"), "r.pt .*cut off"),
        ("evaluator.py", "", "evaluation.inception.Graph.run", cut("b.npz"), "b.npz"),
        ("evaluator.py", "", "evaluation.features.version", remove("g.pb"), "g.pb"),
        ("train_router.py", IMAGES, STEP, remove("images"), "cannot be read"),
        ("train_router.py", LATENTS, STEP, cut("latents/000000.npy"), "000000.npy cannot be read"),
        ("sample.py", "", None, limit(1000), "out.png.*File too large"),
        ("sample_ddp.py", "--per-proc-batch-size 6", None, limit(1400), "0000000-0000006.npz.*File too large"),
        ("sample_ddp.py", "", None, limit(1400), "n-6.npz.*File too large"),
        ("train_router.py", EXTRACT, None, limit(1000), "000000.npy.*File too large"),
        ("train_router.py", IMAGES, None, limit(3000), "last.pt.*File too large"),
        ("train_router.py", f"{IMAGES} --max-steps 1000", None, limit(16000), "metrics.jsonl.*File too large"),
        ("evaluator.py", STATISTICS, None, limit(2000), "s.npz.*File too large"),
        ("sample.py", "", None, forbid("model/dit.safetensors"), "dit.safetensors.*Permission denied"),
        ("sample.py", "--out FOLDER/closed/x.png", None, forbid("closed"), "closed.*Permission denied"),
        ("sample_ddp.py", "--sample-dir FOLDER/closed", None, forbid("closed"), "closed.*Permission denied"),
        ("train_router.py", IMAGES, None, forbid("images"), "images.*Permission denied"),
        ("train_router.py", f"{IMAGES} --results-dir FOLDER/closed", None, forbid("closed"), "closed.*Permission"),
        ("evaluator.py", "", None, forbid("b.npz"), "b.npz.*Permission denied"),
        ("sample.py", "", None, hostile("model/dit.safetensors"), "dit.safetensors"),
        ("sample.py", "", None, hostile("model/vae/diffusion_pytorch_model.bin"), "vae"),
        ("sample.py", ROUTER, None, hostile("r.pt"), "r.pt"),
        ("sample.py", ROUTER, None, hostile("r.pt", zipped=False), "r.pt"),
        ("sample.py", SCHEDULE, None, hostile("r.pt"), "r.pt"),
        ("train_router.py", f"{IMAGES} --resume FOLDER/r.pt", None, hostile("r.pt"), "r.pt"),
        ("train_router.py", LATENTS, None, hostile("latents/000000.npy"), "latents"),
        ("train_router.py", LATENTS, None, hostile("latents/labels.npy"), "latents"),
        ("evaluator.py", "", None, hostile("g.pb"), "g.pb"),
        ("evaluator.py", "", None, hostile("b.npz"), "b.npz"),
        ("sample.py", "--cfg-scale 1e38", None, None, "latents of image 0 are not finite.* --cfg-scale"),
        ("sample.py", f"{ROUTER} --compare --cfg-scale 1e38", None, None, "latents of image 0 are not finite"),
        ("sample.py", "--random-weights --cfg-scale 1e38", None, None, "latents of image 0 are not finite"),
        ("sample_ddp.py", "--cfg-scale 1e38", None, None, "latents of image 0 are not finite.*; 0 of 6 images are"),
        ("sample.py", "", None, enlarge("decoder.conv_out.weight"), "VAE decodes image 0 to .* not finite"),
        ("sample_ddp.py", "", None, enlarge("decoder.conv_out.weight"), "VAE decodes image 0 to .* not finite"),
        ("train_router.py", EXTRACT, None, enlarge("quant_conv.weight"), "VAE encodes .*000.png to .* not finite"),
        (
            "train_router.py",
            f"{IMAGES} --num-workers 1 --max-steps 1000",
            REPORT,
            kill_a_worker,
            "process was killed.* --num-workers",
        ),
    ],
)
def test_a_fault_is_one_line_and_leaves_nothing_half_written(program, more, place, harm, words, programs, tmp_path):
    if LATENTS in more:
        assert programs.run("train_router.py", EXTRACT).returncode == 0
    inputs = set(tmp_path.rglob("*"))
    result = programs.run(program, more, place, harm)
    gc.collect()  # Python 3.12.1 would crash here on a view of an io.BytesIO that a traceback holds
    *warnings, line = result.stderr.strip().splitlines()
    assert result.returncode == (130 if harm is control_c else 1) and all("warning: " in text for text in warnings)
    assert re.match(f"{program}: (.*{words}|{words})", line), line
    assert not (tmp_path / "ran").exists()
    for closed in tmp_path.glob("closed"):
        closed.chmod(0o700)
    assert_whole(tmp_path, but=inputs)
    if harm is kill_a_worker:
        assert load_tensors(tmp_path / "results" / "000-model" / "checkpoints" / "last.pt")["step"] >= 1


@pytest.mark.parametrize(
    "program, more, line, results",
    [
        ("sample.py", f"{ROUTER} --compare --record FOLDER/r.json", "Sampling time", ["out.png", "r.json"]),
        ("sample_ddp.py", "--record FOLDER/r.json", "6 images in", ["*-n-6.npz", "r.json"]),
        ("evaluator.py", "--metrics fid --record FOLDER/r.json", "FID", ["r.json"]),
        ("train_router.py", f"{IMAGES} --ckpt-every 3", "update 1 ", ["results/*/checkpoints/last.pt"]),
    ],
)
def test_results_are_saved_before_they_are_printed(program, more, line, results, programs, tmp_path, monkeypatch):
    """The reader of the output ends when `line` comes."""

    def close(printed):
        def write(*args, **kwargs):
            if args and str(args[-1]).startswith(line):
                raise BrokenPipeError(errno.EPIPE, "Broken pipe")
            return printed(*args, **kwargs)

        return write

    monkeypatch.setattr(builtins, "print", close(print))
    monkeypatch.setattr(tqdm, "write", close(tqdm.write))
    result = programs.run(program, more)
    assert result.returncode == 1 and "Broken pipe" in result.stderr.strip().splitlines()[-1]
    for pattern in results:
        (path,) = tmp_path.glob(pattern)
        assert path.suffix != ".pt" or load_tensors(path)["step"] == 1


def assert_whole(folder, but=()):
    """Assert that no file in the folder is half written; a line of metrics.jsonl may be, readers skip it."""
    for path in (path for path in set(folder.rglob("*")) - {*but} if path.is_file() and "removed" not in path.parts):
        assert not path.name.endswith(".part"), path
        if path.suffix in (".png", ".gif"):
            with Image.open(path) as image:
                image.load()
        elif path.suffix in (".npz", ".pt"):
            assert zipfile.ZipFile(path).testzip() is None
        elif path.suffix == ".npy":
            np.load(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())


def test_a_hostile_file_does_run_code_if_it_may(tmp_path):
    hostile("h.pt")(tmp_path)
    torch.load(tmp_path / "h.pt", weights_only=False)
    assert (tmp_path / "ran").is_dir()


def test_weights_that_are_cut_off_after_loading_stay_in_memory(programs, tmp_path):
    assert programs.run("sample.py").returncode == 0
    expected = (tmp_path / "out.png").read_bytes()

    def cut_all(folder):  # mapped files would kill this process
        for path in (folder / "model").rglob("*.safetensors"):
            os.truncate(path, 0)

    assert programs.run("sample.py", "", "models.DiT.denoise", cut_all).returncode == 0
    assert (tmp_path / "out.png").read_bytes() == expected


def test_a_compressed_checkpoint_is_refused_before_memory_is_taken_for_it(tmp_path, monkeypatch):
    Router(4, 1000).save(tmp_path / "r.pt")
    whole = zipfile.ZipFile(tmp_path / "r.pt")
    with zipfile.ZipFile(tmp_path / "p.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in whole.namelist():
            packed.writestr(name, bytes(len(whole.read(name))))
    monkeypatch.setattr(torch, "load", None)  # it would take the memory
    with pytest.raises(UserError, match="p.pt .*larger than the file"):
        load_tensors(tmp_path / "p.pt")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_is_full_or_closed_is_one_line(unbuffered):
    command, environment = [sys.executable, ROOT / "download.py", "--list"], {"PYTHONUNBUFFERED": unbuffered}
    reader, writer = os.pipe()
    os.close(reader)
    for output, reason in ((os.open("/dev/full", os.O_WRONLY), "No space left"), (writer, "Broken pipe")):
        more = {"stdout": output, "stderr": subprocess.PIPE, "env": os.environ | environment}
        assert_refused(subprocess.run(command, text=True, **more), "download.py: error:", reason)
        os.close(output)


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


def test_a_lost_connection_is_one_line():
    processes = Processes()
    with pytest.raises(UserError, match="process 0 lost the others .Connection closed by peer"):
        with processes.exchange():
            raise RuntimeError("Connection closed by peer [127.0.0.1]:1\nstack")
    with pytest.raises(RuntimeError), processes.exchange():
        no_memory(None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "program, rank, more, first",
    [
        ("train_router.py", 0, f"{IMAGES} --max-steps 100000", "metrics.jsonl"),
        ("sample_ddp.py", 1, "--num-fid-samples 100000", "shards/*-*.npz"),
    ],
)
def test_processes_whose_peer_was_killed_end_with_one_line(program, rank, more, first, programs, tmp_path):
    inputs, flags = set(tmp_path.rglob("*")), programs.command(program, more)[1:]
    with start(program, *flags, cwd=tmp_path, launcher=torchrun(2)) as process:
        while not any(path.stat().st_size for path in tmp_path.rglob(first)):
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
    assert_whole(tmp_path, but=inputs)
