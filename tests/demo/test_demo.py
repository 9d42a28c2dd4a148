"""The programs that made the shipped weights, on a few images, and the shipped weights themselves."""

import argparse
import gzip
import json
import re
import signal
import struct
import sys

import numpy as np
import pytest
import torch
from conftest import DATA, ROOT, assert_refused, call, run
from PIL import Image

from benchmarks.inception_graph import BACKENDS, TOLERANCE, relative
from evaluation.inception import resize_bilinear
from router import Router

SHIPPED = ROOT / "ckpt" / "fashion_mnist"


def write_idx(path, array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The four original files in small: 40 and 20 random images, all ten classes."""
    folder = tmp_path_factory.mktemp("idx")
    random = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 20)):
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", random.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 10)
    return folder


@pytest.fixture(scope="module")
def data(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    result = run("demo/fashion_mnist.py", "--source", source, "--out", out, cwd=out)
    assert result.returncode == 0, result.stderr
    return out


def test_the_export_keeps_pixels_and_labels(source, data):
    raw = gzip.decompress((source / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    image = np.asarray(Image.open(data / "train" / "3_dress" / "00013.png"))
    assert image.shape == (32, 32, 3)
    assert np.array_equal(image[2:30, 2:30, 1], np.frombuffer(raw, np.uint8).reshape(40, 28, 28)[13])
    assert not image[:2].any() and not image[:, 30:].any()
    assert len(list((data / "train").glob("*/*.png"))) == 40
    assert len(list((data / "test").iterdir())) == 10


def test_damaged_and_missing_originals_are_refused(source, tmp_path, capfd):
    assert_refused(call("fashion_mnist.py", "--source", tmp_path, "--out", tmp_path, capfd=capfd), "lacks train-images")
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    images = tmp_path / "train-images-idx3-ubyte.gz"
    for content in (images.read_bytes()[:300], gzip.compress(b"\0\0\x08\x03" + b"\0" * 12 + b"x"), b"", b"<html>"):
        images.write_bytes(content)
        assert_refused(call("fashion_mnist.py", "--source", tmp_path, "--out", tmp_path / "out", capfd=capfd), images)


def test_the_programs_run_from_images_to_a_model_folder_that_samples(data, tmp_path, capfd):
    out = tmp_path / "model"
    common = ["--data", data, "--steps", 2, "--batch-size", 4, "--device", "cpu"]

    def program(name, *flags):
        result = call(name, *common, "--work", tmp_path / f"{name}.pt", *flags, capfd=capfd)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "PSNR on held-out images" in program("train_vae.py", "--out", out / "vae")
    assert "final loss" in program("train_dit.py", "--out", out)
    judge = tmp_path / "classifier.pb"
    assert "accuracy on the test images" in program("train_classifier.py", "--out", judge)
    assert "continuing" in program("train_dit.py", "--out", out)
    assert json.loads((out / "vae" / "config.json").read_text())["scaling_factor"] > 0

    flags = ["--ckpt", out, "--classifier", judge, "--data", data, "--samples", 20, "--num-sampling-steps", 2]
    Router(2, 12).save(tmp_path / "router.pt")
    flags += ["--path", tmp_path / "router.pt"]
    result = call("class_accuracy.py", *flags, "--device", "cpu", capfd=capfd)
    assert "guidance 2.0, with" in result.stdout
    assert "20 samples, 2 steps, guidance 2.0, without router" in result.stdout, result.stderr
    sampled = run("sample.py", "--ckpt", out, "--num-sampling-steps", 2, "--repeats", 1, cwd=tmp_path)
    assert sampled.returncode == 0, sampled.stderr


def test_a_classifier_that_is_no_graph_file_is_refused(tmp_path, capfd):
    assert_refused(call("class_accuracy.py", "--classifier", tmp_path / "none.pb", capfd=capfd), "no such file: ")
    (tmp_path / "empty.pb").touch()
    flags = ["--classifier", tmp_path / "empty.pb"]
    assert_refused(call("class_accuracy.py", *flags, capfd=capfd), "empty.pb is not a TensorFlow graph")


@pytest.mark.parametrize("size", [32, 45])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_classifiers_graph_computes_what_the_module_does(backend, size, tmp_path):
    from demo.train_classifier import build_classifier, save_graph

    torch.manual_seed(0)
    classifier = build_classifier()
    with torch.no_grad():  # fresh ones would do nothing
        for norm in (module for module in classifier.modules() if isinstance(module, torch.nn.BatchNorm2d)):
            for values, low, high in (
                (norm.weight, 0.5, 1.5),
                (norm.bias, -0.3, 0.3),
                (norm.running_mean, -0.3, 0.3),
                (norm.running_var, 0.01, 1.5),
            ):
                values.uniform_(low, high)
    save_graph(classifier, tmp_path / "classifier.pb")  # as training leaves it, with dropout
    images = torch.randint(0, 256, (7, size, size, 3), dtype=torch.uint8)

    x, expected = resize_bilinear(images, 32, 32).permute(0, 3, 1, 2) / 127.5 - 1, {}
    with torch.no_grad():
        for name, part in classifier.eval().named_children():
            x = expected[name] = part(x)
    pool, spatial = (expected[name].permute(0, 2, 3, 1) for name in ("pool_3", "mixed_6_conv"))
    outputs = ("pool_3", "mixed_6/conv", "softmax/logits/MatMul", "softmax")
    actual = backend(tmp_path / "classifier.pb", outputs=outputs).run(images)
    for output, value in zip(actual, (pool, spatial, x, x.softmax(1))):
        assert output.shape == value.shape
        assert relative(output, value) < TOLERANCE
    # As the evaluator asks for them: the network's own sizes, cell by cell.
    graph = backend(tmp_path / "classifier.pb")
    features, cells = graph.features(images)
    assert features.shape == (7, 64) and cells.shape == (7, 8 * 8 * 7)
    assert relative(cells, spatial[..., :7].flatten(1)) < TOLERANCE
    assert relative(graph.probabilities(features), x.softmax(1)) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_shipped_classifier_knows_real_images(backend):
    """The first 500 test images of Fashion-MNIST, `np.savez_compressed(path, images=images[:500], labels=labels[:500])`
    of what `read_idx` in demo/fashion_mnist.py reads: uint8 (500, 28, 28) and (500,)."""
    with np.load(DATA / "fashion_mnist.npz") as sample:
        images, labels = sample["images"], sample["labels"]
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None].repeat(3, -1)  # as fashion_mnist.py exports them
    assert backend(SHIPPED / "classifier.pb").class_accuracy(images, labels) >= 0.91


def test_more_steps_than_the_model_was_trained_with_are_refused(capfd):
    assert_refused(call("class_accuracy.py", "--num-sampling-steps", 2000, capfd=capfd), "2000", "1 to 1000")


@pytest.mark.parametrize("name", ["train_vae.py", "train_dit.py", "train_classifier.py"])
def test_missing_data_is_refused(name, tmp_path, capfd):
    assert_refused(call(name, "--data", tmp_path / "none", capfd=capfd), "no such folder", "demo/fashion_mnist.py")


def test_a_training_that_was_stopped_continues_as_if_never_stopped(tmp_path):
    from training import train

    def start(work, stop_at=None):
        torch.manual_seed(0)
        model, generator = torch.nn.Linear(3, 1), torch.Generator().manual_seed(1)
        optimizer = torch.optim.AdamW(model.parameters())
        calls = []

        def update():
            calls.append(1)
            if len(calls) == stop_at:
                signal.raise_signal(signal.SIGTERM)
            return model(torch.randn(4, 3, generator=generator)).square().mean()

        train(argparse.Namespace(work=work, steps=7, lr=0.1), update, optimizer, generator, model=model)
        return model.weight.detach()

    whole = start(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "stopped.pt", stop_at=3)
    assert torch.load(tmp_path / "stopped.pt")["step"] == 3
    assert torch.equal(start(tmp_path / "stopped.pt"), whole)


def test_the_shipped_folder_is_complete_and_small():
    from pretrained.loading import load_dit, load_vae
    from pretrained.spec import model_spec

    spec = model_spec(ckpt=str(SHIPPED))
    dit, vae = load_dit(spec, "cpu"), load_vae(spec, "cpu")
    assert (spec.image_size, spec.num_classes, vae.config.latent_channels) == (32, 10, 4)
    assert len(spec.class_names) == 10 and dit.depth >= 12
    for steps in (20, 50):
        router = Router.load(SHIPPED / f"DDIM{steps}_router.pt")
        router.check_fits("", steps, dit.depth)
    assert sum(p.stat().st_size for p in SHIPPED.rglob("*") if p.is_file()) <= 25e6


def test_the_pictures_of_assets_are_made(tmp_path, capfd):
    sys.path.insert(0, str(ROOT / "assets"))
    result = call("make.py", "--out", tmp_path, capfd=capfd)
    assert result.returncode == 0, result.stderr
    samples = np.asarray(Image.open(tmp_path / "samples.png"))
    assert samples.shape == (8 * 98 + 2, 10 * 98 + 2, 3)
    assert Image.open(tmp_path / "router.png").width > 500
    with Image.open(tmp_path / "router.gif") as made, Image.open(ROOT / "assets" / "router.gif") as shipped:
        assert made.n_frames == shipped.n_frames == len((ROOT / "demo/records/fashion-20.jsonl").open().readlines())
        for frame in (0, 29):
            made.seek(frame), shipped.seek(frame)
            pair = [np.asarray(gif.convert("RGB"), float) for gif in (made, shipped)]
            assert abs(pair[0] - pair[1]).mean() < 2  # fonts may differ


def test_the_table_of_the_readme_is_that_of_the_records():
    from benchmarks import common

    assert common.table() in (ROOT / "README.md").read_text()
    shown = [record for record in common.read_records("*") if "speedup" in record]
    assert shown and len(common.table().splitlines()) == 2 + len(shown)

    from benchmarks import assembly, extraction, metrics_speed, scaling, train_step

    told = (ROOT / "benchmarks" / "README.md").read_text()
    programs = {"train": train_step, "assembly": assembly, "scaling": scaling}
    programs |= {"metrics": metrics_speed, "extraction": extraction}
    for name, program in programs.items():
        some = common.read_records(f"{name}-*")
        assert some and program.table(some) in told


def test_the_shipped_router_caches_a_quarter_of_all_layers_and_changes_images_little():
    import sampling
    from diffusion import create_diffusion
    from pretrained.loading import load_dit, load_vae
    from pretrained.spec import model_spec
    from runtime.pictures import psnr

    spec = model_spec(ckpt=str(SHIPPED))
    dit, vae = load_dit(spec, "cpu"), load_vae(spec, "cpu")
    schedule = Router.load(SHIPPED / "DDIM20_router.pt").schedule(0.1)
    assert schedule.cached_share() >= 0.25
    z, y = torch.randn(10, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(10)
    full, cached = (
        sampling.decode(vae, sampling.sample_latents(dit, create_diffusion(20), z, y, spec.cfg_scale, plan))
        for plan in (None, schedule)
    )
    # Another image of the same class is some 10 dB away.
    assert psnr(full, full.flip(0), 255) < 15 < 20 < psnr(full, cached, 255)
    # Real images are black around the garment.
    assert full[:, :2].float().mean() < 8 < 30 < full.float().mean()


def test_the_error_of_routers_is_none_where_nothing_is_reused_and_grows_with_what_is(
    model_folder, image_folder, tmp_path, capfd
):
    for name, logit in (("none", 5.0), ("some", 0.0), ("all", -5.0)):
        router = Router(4, 3)
        with torch.no_grad():
            for row in router.routers:
                row.prob.fill_(logit)
            if name == "some":
                router.routers[0].prob[0] = -5.0
        router.save(tmp_path / f"{name}.pt")
    paths = [tmp_path / f"{name}.pt" for name in ("none", "some", "all")]
    flags = ["--ckpt", model_folder, "--data-path", image_folder, "--samples", 16, "--batch-size", 5, "--device", "cpu"]
    result = call("teacher_error.py", *paths, *flags, capfd=capfd)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    shares = [re.search(r"cached (\S+)% of all", line)[1] for line in lines]
    assert shares == ["0.0", "4.2", "50.0"]  # 1 and 12 of 24
    errors = [float(re.search(r"mean squared error (\S+) ", line)[1]) for line in lines]
    assert errors[0] == 0 < errors[1] < errors[2]
    assert_refused(call("teacher_error.py", *paths, *flags, "--samples", 17, capfd=capfd), "16 images", "--samples 17")
