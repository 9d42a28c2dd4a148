"""The programs that made the shipped model, on a few images, and the shipped model itself."""

import gzip
import itertools
import signal
import struct

import numpy as np
import pytest
import torch
from backends import BACKENDS, TOLERANCE, relative
from conftest import DATA, ROOT, assert_refused, call
from PIL import Image

import sampling
from demo import fashion_mnist
from demo.train_classifier import build_classifier, save_graph
from demo.train_loop import train
from diffusion import create_diffusion
from pretrained.loading import load_dit, load_vae
from pretrained.spec import model_spec
from router import Router
from runtime.pictures import psnr

SHIPPED = ROOT / "ckpt" / "fashion_mnist"


def write_idx(path, array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of four files like the originals, 40 and 20 random images of all ten classes, and of their export."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 20)):
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", random.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 10)
    fashion_mnist.main(fashion_mnist.parse_args(["--source", str(folder), "--out", str(folder)]))
    return folder


def test_the_export_keeps_pixels_and_labels(data):
    raw = gzip.decompress((data / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    image = np.asarray(Image.open(data / "train" / "3_dress" / "00013.png"))
    assert image.shape == (32, 32, 3)
    assert np.array_equal(image[2:30, 2:30, 1], np.frombuffer(raw, np.uint8).reshape(40, 28, 28)[13])
    assert not image[:2].any() and not image[:, 30:].any()
    assert [len(list((data / split).glob("*/*.png"))) for split in ("train", "test")] == [40, 20]


def test_damaged_and_missing_data_is_refused(data, tmp_path, capfd):
    def export():
        return call("demo/fashion_mnist.py", "--source", tmp_path, "--out", tmp_path / "out", capfd=capfd)

    training = call("demo/train_vae.py", "--data", tmp_path / "none", capfd=capfd)
    assert_refused(training, "no such folder", "demo.fashion_mnist")
    assert_refused(export(), "lacks train-images")
    for path in data.glob("*.gz"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    images = tmp_path / "train-images-idx3-ubyte.gz"
    for content in (images.read_bytes()[:300], gzip.compress(b"\0\0\x08\x03" + b"\0" * 12 + b"x"), b"", b"<html>"):
        images.write_bytes(content)
        assert_refused(export(), images)


def test_the_programs_run_from_images_to_a_model_folder_that_samples(data, tmp_path, capfd):
    def program(path, *flags):
        result = call(path, *flags, "--device", "cpu", capfd=capfd)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def training(name, out):
        flags = ["--data", data, "--work", tmp_path / f"{name}.pt", "--out", tmp_path / out]
        return program(f"demo/{name}.py", *flags, "--steps", 2, "--batch-size", 4)

    assert "PSNR on held-out images" in training("train_vae", "model/vae")
    assert "final loss" in training("train_dit", "model")
    assert "accuracy on the test images" in training("train_classifier", "classifier.pb")
    assert "continuing" in training("train_dit", "model")
    flags = ["--num-sampling-steps", 2, "--repeats", 1, "--out", tmp_path / "sample.png"]
    program("sample.py", "--ckpt", tmp_path / "model", *flags)

    how = ["--flow", "--init", tmp_path / "model", "--work", tmp_path / "flow.pt", "--out", tmp_path / "flow"]
    program("demo/train_dit.py", "--data", data, *how, "--steps", 2, "--batch-size", 4)
    spec = model_spec(ckpt=str(tmp_path / "flow"))
    assert spec.process == "flow" and spec.guidance(None, 1.0) == 2.0
    program("sample.py", "--ckpt", tmp_path / "flow", "--sampler", "heun", *flags)
    start, flow = load_dit(model_spec(ckpt=str(tmp_path / "model")), "cpu"), load_dit(spec, "cpu")
    assert flow.out_channels == 4 and flow.blocks[3].mlp.fc1.weight.shape == start.blocks[3].mlp.fc1.weight.shape
    # Two averaged updates are still near the start.
    torch.testing.assert_close(flow.blocks[3].mlp.fc1.weight, start.blocks[3].mlp.fc1.weight, atol=0.01, rtol=0)


def test_a_training_that_was_stopped_continues_as_if_never_stopped(tmp_path):
    def launch(work, stop_at=None):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(3, 1))  # dropout has a generator of torch's own
        generator = torch.Generator().manual_seed(1)
        optimizer = torch.optim.AdamW(model.parameters())
        calls = itertools.count(1)

        def loss_of_batch():
            if next(calls) == stop_at:
                signal.raise_signal(signal.SIGTERM)
            return model(torch.randn(4, 3, generator=generator)).square().mean()

        train(loss_of_batch, optimizer, generator, updates=7, work=work, model=model)
        return model[1].weight.detach()

    whole = launch(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        launch(tmp_path / "stopped.pt", stop_at=3)
    saved = torch.load(tmp_path / "stopped.pt")
    assert saved["step"] == 3
    assert torch.equal(launch(tmp_path / "stopped.pt"), whole)
    del saved["own_generators"]  # checkpoints of earlier versions have none
    torch.save(saved, tmp_path / "old.pt")
    assert launch(tmp_path / "old.pt").isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_classifiers_graph_computes_what_the_module_does(backend, tmp_path):
    torch.manual_seed(0)
    classifier = build_classifier()
    for norm in (module for module in classifier.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            torch.nn.init.uniform_(values, 0.1, 1.5)  # fresh norms would change nothing
    save_graph(classifier, tmp_path / "classifier.pb")  # as training leaves it, with dropout
    images = torch.randint(0, 256, (7, 32, 32, 3), dtype=torch.uint8)

    x, expected = images.permute(0, 3, 1, 2) / 127.5 - 1, {}
    with torch.no_grad():
        for name, part in classifier.eval().named_children():
            x = expected[name] = part(x)
    graph = backend(tmp_path / "classifier.pb")
    features, cells = graph.features(images)
    assert relative(features, expected["pool_3"].flatten(1)) < TOLERANCE
    assert relative(cells, expected["mixed_6_conv"].permute(0, 2, 3, 1)[..., :7].flatten(1)) < TOLERANCE
    assert relative(graph.probabilities(features), x.softmax(1)) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_shipped_classifier_knows_real_images(backend):
    """The first 500 test images of Fashion-MNIST, uint8 (500, 28, 28)."""
    with np.load(DATA / "fashion_mnist.npz") as sample:
        images, labels = sample["images"], sample["labels"]
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None].repeat(3, -1)  # as fashion_mnist.py exports them
    assert backend(SHIPPED / "classifier.pb").class_accuracy(images, labels) >= 0.91


def test_the_shipped_model_is_complete_and_its_router_changes_images_little():
    spec = model_spec(ckpt=str(SHIPPED))
    dit, vae = load_dit(spec, "cpu"), load_vae(spec, "cpu")
    assert (spec.image_size, spec.num_classes, len(spec.class_names), vae.config.latent_channels) == (32, 10, 10, 4)
    assert sum(p.stat().st_size for p in SHIPPED.rglob("*") if p.is_file()) <= 25e6
    Router.load(SHIPPED / "DDIM50_router.pt").schedule(0.1).check_fits("", 50, dit.depth)
    schedule = Router.load(SHIPPED / "DDIM20_router.pt").schedule(0.1)
    assert schedule.cached_share() >= 0.25
    z, y = torch.randn(10, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(10)
    full, cached = (
        sampling.decode(vae, sampling.sample_latents(dit, create_diffusion(20), z, y, spec.cfg_scale, plan))
        for plan in (None, schedule)
    )
    # Images of different classes are about 10 dB apart.
    assert psnr(full, full.flip(0), 255) < 15 < 20 < psnr(full, cached, 255)
    # Real images are black around the garment.
    assert full[:, :2].float().mean() < 8 < 30 < full.float().mean()


@pytest.mark.slow
def test_the_pictures_of_assets_are_made(tmp_path, capfd):
    result = call("assets/make.py", "--out", tmp_path, capfd=capfd)
    assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / "samples.png").size == (10 * 98 + 2, 8 * 98 + 2)
    assert Image.open(tmp_path / "flow.png").size == (10 * 98 + 2, 3 * 98 + 2)
    assert Image.open(tmp_path / "router.png").width > 500
    with Image.open(tmp_path / "router.gif") as made, Image.open(ROOT / "assets" / "router.gif") as shipped:
        assert made.n_frames == shipped.n_frames
        pair = [np.asarray(gif.convert("RGB"), float) for gif in (made, shipped)]
        assert abs(pair[0] - pair[1]).mean() < 2  # fonts may differ
