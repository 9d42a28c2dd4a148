"""Fixtures: the reference arrays, small models with every weight random, and the programs run as a user runs them."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import cli
from diffusion import create_diffusion
from models import DiT
from router import Router

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


def run(*command, cwd, processes=None, **environment):
    """Runs a program of the repository from `cwd`, under torchrun where `processes` are given."""
    program, *rest = map(str, command)
    start = [sys.executable]
    if processes:
        start += ["-m", "torch.distributed.run", "--standalone", "--nnodes=1", f"--nproc_per_node={processes}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run(
        [*start, str(ROOT / program), *rest], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


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
