"""Fixtures: the reference arrays, small models with every weight random, and the programs run as a user runs them."""

import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion import create_diffusion
from models import DiT
from router import Router
from runtime import cli

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"

# A background job of a shell ignores SIGINT, and so would the programs started here: nothing could interrupt them.
signal.signal(signal.SIGINT, signal.default_int_handler)


class Reference:
    """The arrays of dit28_ddim20.npz: inputs, weights and outputs of the original implementation."""

    def __init__(self):
        self.arrays = np.load(DATA / "dit28_ddim20.npz")
        config = {name[7:]: int(self.arrays[name]) for name in self.arrays.files if name.startswith("config/")}
        self.dit = DiT(**config).eval().requires_grad_(False)
        self.dit.load_state_dict({n[8:]: self[n] for n in self.arrays.files if n.startswith("weights/")})
        self.diffusion = create_diffusion(20)
        self.router = Router.load(DATA / "synthetic_router_ddim20.pt")
        self.null = config["num_classes"]

    def __getitem__(self, name):
        return torch.from_numpy(self.arrays[name])

    def assert_agrees(self, actual, name, tolerance=2e-5):
        expected = self[name]
        assert actual.shape == expected.shape
        error = (actual - expected).abs().max() / expected.abs().max()
        assert error < tolerance, f"{name}: {error:.1e} of the largest value"


@pytest.fixture(scope="session")
def reference():
    return Reference()


def random_dit(seed=0, **config):
    """A small DiT whose every parameter is random: a fresh one outputs 0, and would prove nothing about caching."""
    torch.manual_seed(seed)
    sizes = dict(input_size=4, patch_size=2, hidden_size=24, depth=3, num_heads=2, num_classes=5)
    dit = DiT(**(sizes | config)).eval().requires_grad_(False)
    for parameter in dit.parameters():
        parameter.normal_(std=0.2)
    return dit


def random_vae(stages=2, channels=4, width=8):
    """A small VAE with random weights: 2 ** (stages-1) pixels a side of a latent cell of so many channels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * stages,
        up_block_types=["UpDecoderBlock2D"] * stages,
        block_out_channels=[width] * stages,
        latent_channels=channels,
        norm_num_groups=width // 2,
        sample_size=8,
    )


@pytest.fixture
def dit():
    return random_dit()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A model folder as ckpt/fashion_mnist is one, with random weights and routers for 4 and 5 steps."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    sizes = dict(input_size=4, patch_size=2, hidden_size=24, depth=3, num_heads=2, num_classes=5)
    config = {"model": sizes, "image_size": 8, "class_names": list("abcde"), "vae": "vae", "cfg_scale": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_dit().state_dict(), folder / "dit.safetensors")
    random_vae().save_pretrained(folder / "vae")
    for steps in (4, 5):
        torch.manual_seed(steps)
        Router(steps, 3).save(folder / f"router{steps}.pt")
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """16 random PNGs of 8x8 pixels in five class folders."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for k in range(16):
        path = folder / f"class{k % 5}" / f"{k}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return folder


def plain_images(folder, count):
    """`count` PNGs of 8x8 pixels, each of one grey, in five class folders of `folder`."""
    from PIL import Image

    for k in range(count):
        path = folder / f"class{k % 5}" / f"{k:03d}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (8, 8), (k, k, k)).save(path)


# Of a program that a test starts.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# The libraries of the programs take most of a start. Processes of `start` are forked from one that has them.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "torch._dynamo",
        "timm",
        "torchvision.datasets",
        "diffusers.models.autoencoders.autoencoder_kl",
        "matplotlib.figure",
    ]
)


def torchrun(processes):
    """The flags of torchrun for some processes on this machine."""
    return ["--standalone", "--nnodes=1", f"--nproc_per_node={processes}"]


def run(program, *flags, cwd, processes=None, **environment):
    """Runs a program of the repository from `cwd` as a user does, under torchrun where `processes` are given."""
    start = [sys.executable, *(["-m", "torch.distributed.run", *torchrun(processes)] if processes else [])]
    return subprocess.run(
        list(map(str, [*start, ROOT / program, *flags])),
        cwd=cwd,
        env=os.environ | ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def start(program, *flags, cwd, launcher=None, **environment):
    """A program at work: its process has the methods of `subprocess.Popen`, and a session of its own.

    launcher: flags of torchrun; without them it is forked with its libraries imported, which saves seconds.
    """
    environment = os.environ | ENVIRONMENT | environment
    if launcher is None:
        return Forked(program, list(map(str, flags)), cwd, environment)
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, ROOT / program, *flags]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


class Forked:
    """A program forked from a process with all libraries; what tests use of `subprocess.Popen`."""

    def __init__(self, program, flags, cwd, environment):
        self.output = [tempfile.NamedTemporaryFile("r") for _ in range(2)]
        command = [str(ROOT / program), *flags]
        paths = [file.name for file in self.output]
        self.process = FORKS.Process(target=run_forked, args=(command, str(cwd), environment, paths))
        with pytest.MonkeyPatch.context() as patch:
            for name, value in ENVIRONMENT.items():  # which libraries read when they are imported
                patch.setenv(name, value)
            self.process.start()
        self.pid = self.process.pid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.join()

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)

    def kill(self):
        self.process.kill()

    def send_signal(self, number):
        os.kill(self.pid, number)

    def communicate(self, timeout=None):
        """Waits for its end; returns standard output and standard error."""
        self.process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.process.name, timeout)
        return tuple(file.read() for file in self.output)


def run_forked(command, cwd, environment, output):
    """In the forked process: what Python does with a program."""
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # as in any process, for those that load data
    for number, path in enumerate(output, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(program, *commands, cwd):
    """Processes that know of each other, and no torchrun that would look after them; commands: the flags of each."""
    job = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [start(program, *flags, cwd=cwd, RANK=str(rank), **job) for rank, flags in enumerate(commands)]


def fork(program, *flags, cwd, processes=1):
    """As `run`, forked, without torchrun: for tests of what a program makes, not of how it is started."""
    started = start_ranks(program, *[flags] * processes, cwd=cwd)
    out, err = map("".join, zip(*(process.communicate(300) for process in started)))
    return subprocess.CompletedProcess(flags, max(abs(process.returncode) for process in started), out, err)


def call(program, *flags, capfd):
    """A program's own entry point in this process: for the many refusals, which would spend seconds on imports each."""
    module = importlib.import_module(program.removesuffix(".py"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program])
        capfd.readouterr()
        code = 0
        try:
            cli.run(module.main, module.parse_args([str(flag) for flag in flags]))
        except SystemExit as stop:
            code = stop.code
            if isinstance(code, str):  # sys.exit prints a text on its way out
                print(code, file=sys.stderr)
                code = 1
        out, err = capfd.readouterr()
    return subprocess.CompletedProcess([program, *flags], code, out, err)


def assert_refused(result, *words):
    """Exit code 1 or 2, one line on standard error that holds `words`, no traceback."""
    assert result.returncode in (1, 2), result
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    for word in words:
        assert str(word) in lines[0], result.stderr
