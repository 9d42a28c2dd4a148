"""--image-size 512 in all four programs, on a small model and VAE that take the places of the released ones."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from conftest import call, random_dit, random_vae
from PIL import Image

from benchmarks.inception_graph import inception_v3
from models import DiT, DiT_models
from router import Router
from runtime import released

SIZES = dict(patch_size=8, hidden_size=24, depth=2, num_heads=2)


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """The flags of a small DiT-S/8 at 512, four steps; the released VAE is a small one of eight pixels to a cell."""
    monkeypatch.chdir(tmp_path)
    random_vae(stages=4, width=4).save_pretrained(tmp_path / "vae")
    monkeypatch.setattr(released, "fetch_vae", lambda kind: tmp_path / "vae")
    monkeypatch.setitem(DiT_models, "DiT-S/8", partial(DiT, **SIZES))
    torch.save({"ema": random_dit(input_size=64, num_classes=2, **SIZES).state_dict()}, "weights.pt")
    Router(4, 2).save("router.pt")
    model = ["--model", "DiT-S/8", "--image-size", 512, "--num-classes", 2, "--ckpt", "weights.pt", "--device", "cpu"]
    return [*model, "--num-sampling-steps", 4]


ROUTER = ["--accelerate-method", "dynamiclayer", "--path", "router.pt", "--thres", 0.5]


def test_sample(flags, capfd):
    result = call("sample.py", *flags, *ROUTER, "--repeats", 1, "--out", "x.png", "--class-labels", 0, 1, capfd=capfd)
    assert result.returncode == 0, result.stderr
    with Image.open("x.png") as picture:
        assert picture.size == (4 * 514 + 2, 514 + 2)  # four columns, of which two are white


def test_sample_of_the_real_size_with_random_weights(capfd):
    flags = ["--model", "DiT-S/8", "--image-size", 512, "--random-weights", "--num-sampling-steps", 2, "--repeats", 1]
    result = call("sample.py", *flags, "--class-labels", 1, "--device", "cpu", capfd=capfd)
    assert result.returncode == 0, result.stderr


def test_sample_ddp_and_evaluator(flags, tmp_path, capfd):
    result = call("sample_ddp.py", *flags, *ROUTER, "--num-fid-samples", 5, capfd=capfd)
    assert result.returncode == 0, result.stderr
    (samples,) = (tmp_path / "samples").glob("DiT-S-8-weights-size-512-vae-ema-*-n-5.npz")
    with np.load(samples) as made:
        assert made["arr_0"].shape == (5, 512, 512, 3)
    inception_v3("graph.pb", narrower=32)
    random = np.random.default_rng(0)
    np.savez("reference.npz", arr_0=random.integers(0, 256, (5, 512, 512, 3), dtype=np.uint8))
    result = call("evaluator.py", "reference.npz", samples, "--graph", "graph.pb", "--device", "cpu", capfd=capfd)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"^[A-Za-z ]+: \d", result.stdout, re.M)) == 5
    assert "pixels" not in result.stderr  # both sets are of one size


def test_train_router(flags, image_folder_512, tmp_path, capfd):
    more = ["--num-workers", 0, "--global-batch-size", 2, "--draws-per-step", 1, "--max-steps", 1]
    result = call("train_router.py", *flags, "--data-path", image_folder_512, *more, capfd=capfd)
    assert result.returncode == 0, result.stderr
    assert "--image-size 512" in result.stdout and (tmp_path / "results" / "000-DiT-S-8").is_dir()
    start = flags.index("--num-sampling-steps")
    model = flags[:start] + flags[start + 2 :]
    extraction = ["--data-path", image_folder_512, "--extract-latents", "latents"]
    result = call("train_router.py", *model, *extraction, capfd=capfd)
    assert result.returncode == 0, result.stderr
    result = call("train_router.py", *flags, "--latents", "latents", *more, capfd=capfd)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def image_folder_512(tmp_path):
    """Four random PNGs in two class folders, larger and smaller than 512."""
    random = np.random.default_rng(0)
    for k in range(4):
        path = tmp_path / "images" / f"class{k % 2}" / f"{k}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(random.integers(0, 256, (400 + 100 * k, 600, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"
