"""Helpers of all tests: reference arrays, small models with random weights, and ways to run the programs."""

import importlib
import json
import multiprocessing
import os
import runpy
import shutil
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
SIZES = dict(input_size=4, patch_size=2, hidden_size=24, depth=3, num_heads=2, num_classes=5)

# A background job of a shell ignores SIGINT, and the programs started here would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU")


# Models and images


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
    """A small DiT with every parameter random: a new DiT outputs 0, which would prove nothing about caching."""
    torch.manual_seed(seed)
    dit = DiT(**(SIZES | config)).eval().requires_grad_(False)
    for parameter in dit.parameters():
        parameter.normal_(std=0.2)
    return dit


def random_vae(stages=2, channels=4, width=8):
    """A small VAE with random weights: 2 ** (stages - 1) pixels per side of a latent cell with `channels` values."""
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
    """A model folder like ckpt/fashion_mnist, with random weights and routers for 4 and 5 steps."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    config = {"model": SIZES, "image_size": 8, "class_names": list("abcde"), "vae": "vae", "cfg_scale": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_dit().state_dict(), folder / "dit.safetensors")
    random_vae().save_pretrained(folder / "vae")
    for steps in (4, 5):
        torch.manual_seed(steps)
        Router(steps, 3).save(folder / f"router{steps}.pt")
    return folder


@pytest.fixture
def exportable_folder(model_folder, tmp_path):
    """A copy of the model folder that diffusers can hold: it has the positions that diffusers computes."""
    from safetensors.torch import load_file, save_file

    from models import position_table

    folder = tmp_path / "tiny"
    shutil.copytree(model_folder, folder)
    weights = load_file(folder / "dit.safetensors")
    weights["pos_embed"] = position_table(24, 2)
    save_file(weights, folder / "dit.safetensors")
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """16 random PNGs of 8x8 pixels in five class folders."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    write_pngs(folder, [random.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(16)])
    return folder


def plain_images(folder, count):
    """Write `count` PNGs of 8x8 pixels, each of one grey, into five class folders of `folder`."""
    write_pngs(folder, [np.full((8, 8, 3), k, dtype=np.uint8) for k in range(count)])


def write_pngs(folder, images):
    from PIL import Image

    for k, image in enumerate(images):
        path = folder / f"class{k % 5}" / f"{k:03d}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(image).save(path)


# Programs: `program` is the path of a script from the root of the repository, e.g. sample.py or benchmarks/latency.py.

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
FORKED = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}  # a GPU that a process has looked for is of no use to its forks
# Importing libraries is most of the time of a program. Forks of this server process have them already.
FORKS = multiprocessing.get_context("forkserver")
AUTOENCODER = "diffusers.models.autoencoders.autoencoder_kl"
FORKS.set_forkserver_preload(["torch._dynamo", "torchvision.datasets", AUTOENCODER, "matplotlib.figure"])


def module_of(program):
    return program.removesuffix(".py").replace("/", ".")


def torchrun(processes):
    """Flags of torchrun for this machine alone."""
    return ["--standalone", "--nnodes=1", f"--nproc_per_node={processes}"]


def command_of(program, flags, launcher=None):
    """Command line and environment of a program as a user starts it: a script in a folder runs as a module."""
    in_folder = "/" in program
    torch_run = ["-m", "torch.distributed.run", *launcher] if launcher else []
    target = ["-m", module_of(program)] if in_folder else [ROOT / program]
    path = {"PYTHONPATH": str(ROOT)} if in_folder else {}  # the user is in ROOT, the tests are not
    return list(map(str, [sys.executable, *torch_run, *target, *flags])), os.environ | ENVIRONMENT | path


def run(program, *flags, cwd, processes=None, **environment):
    """Run a program as a user does, to its end, under torchrun if `processes` are given."""
    command, env = command_of(program, flags, processes and torchrun(processes))
    return subprocess.run(command, cwd=cwd, env=env | environment, capture_output=True, text=True, timeout=600)


def start(program, *flags, cwd, launcher=None, **environment):
    """Start a program in a session of its own; returns a process with the methods of `subprocess.Popen`.

    launcher: flags of torchrun; without them the program is forked with its libraries imported, which saves seconds,
    and sees no GPU.
    """
    if launcher is None:
        return Forked(program, list(map(str, flags)), cwd, os.environ | FORKED | environment)
    command, env = command_of(program, flags, launcher)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=cwd, env=env | environment, start_new_session=True, **pipes)


class Forked:
    """A program forked from a process with all libraries, with those methods of `subprocess.Popen` that tests use."""

    def __init__(self, program, flags, cwd, environment):
        self.output = [tempfile.NamedTemporaryFile("r") for _ in range(2)]
        paths = [file.name for file in self.output]
        self.process = FORKS.Process(target=run_forked, args=(program, flags, str(cwd), environment, paths))
        with pytest.MonkeyPatch.context() as patch:
            for name, value in FORKED.items():  # libraries read it when the server imports them
                patch.setenv(name, value)
            self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.join()

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)

    def send_signal(self, number):
        os.kill(self.pid, number)

    def communicate(self, timeout=None):
        """Wait for the end; return standard output and standard error."""
        self.process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.process.name, timeout)
        return tuple(file.read() for file in self.output)


def run_forked(program, flags, cwd, environment, output):
    """Run a program in the forked process as Python does."""
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # as in any process: programs load data in processes
    for number, path in enumerate(output, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, str(ROOT))
    sys.argv = [str(ROOT / program), *flags]
    runpy.run_path(sys.argv[0], run_name="__main__")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(program, *commands, cwd):
    """Start the ranks of one job without torchrun, which would end them if one fails; commands: the flags of each."""
    job = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [start(program, *flags, cwd=cwd, RANK=str(rank), **job) for rank, flags in enumerate(commands)]


def fork(program, *flags, cwd, processes=1):
    """Like `run`, but forked and without torchrun: for tests of results, not of how a program starts."""
    started = start_ranks(program, *[flags] * processes, cwd=cwd)
    out, err = map("".join, zip(*(process.communicate(600) for process in started)))
    return subprocess.CompletedProcess(flags, max(abs(process.returncode) for process in started), out, err)


def call(program, *flags, capfd):
    """Run a program in this process: for the many refusals, each of which would spend seconds on imports."""
    module = importlib.import_module(module_of(program))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program])
        capfd.readouterr()
        code = 0
        try:
            cli.run(module.main, module.parse_args([str(flag) for flag in flags]))
        except SystemExit as stop:
            code = stop.code
            if isinstance(code, str):  # Python prints a text given to sys.exit
                print(code, file=sys.stderr)
                code = 1
        out, err = capfd.readouterr()
    return subprocess.CompletedProcess([program, *flags], code, out, err)


def assert_refused(result, *words):
    """Exit code 1 or 2, and one line on standard error, which holds `words`."""
    assert result.returncode in (1, 2), result
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    for word in words:
        assert str(word) in lines[0], result.stderr
