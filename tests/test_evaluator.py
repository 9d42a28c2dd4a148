"""evaluator.py as a user runs it, on the shipped classifier; what it prints against NumPy and SciPy."""

import json
import re

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import DATA, ROOT, assert_refused, call, run
from PIL import Image

from benchmarks.inception_graph import HAS_TENSORFLOW, needs_tensorflow
from evaluation import features
from evaluation.graph_file import GraphWriter
from evaluation.inception import load_graph
from runtime import released

GRAPH = ROOT / "ckpt" / "fashion_mnist" / "classifier.pb"
REFERENCE = ROOT / "ckpt" / "fashion_mnist" / "reference.npz"
NAMES = ["Inception Score", "FID", "sFID", "Precision", "Recall"]


@pytest.fixture(scope="module")
def images():
    """500 real images, uint8 (500, 32, 32, 3)."""
    with np.load(DATA / "fashion_mnist.npz") as sample:
        return np.pad(sample["images"], ((0, 0), (2, 2), (2, 2)))[..., None].repeat(3, -1)


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):
    """a.npz and b.npz with 250 of them each, b's brighter."""
    folder = tmp_path_factory.mktemp("sets")
    np.savez(folder / "a.npz", arr_0=images[:250])
    np.savez(folder / "b.npz", arr_0=np.minimum(images[250:].astype(int) + 30, 255).astype(np.uint8))
    return folder


def evaluate(*flags, capfd):
    """The metrics that are printed, {name: text}, and standard error."""
    result = call("evaluator.py", *flags, "--device", "cpu", capfd=capfd)
    assert result.returncode == 0, result.stderr
    return dict(re.findall(r"^([A-Za-z ]+): (\S+)$", result.stdout, re.M)), result.stderr


def slow_metrics(a, b):
    """The five metrics of images b against a: all images at once, the textbook's formulas in float64."""
    graph = load_graph(GRAPH)
    (pool, spatial), (pool_b, spatial_b) = ([f.double().numpy() for f in graph.features(x)] for x in (a, b))
    p = graph.probabilities(torch.from_numpy(pool_b).float()).double().numpy()
    score = np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())

    def fid(x, y):
        one, two = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
        root = scipy.linalg.sqrtm(one @ two).real
        return np.square(x.mean(0) - y.mean(0)).sum() + np.trace(one + two - 2 * root)

    def share_inside(x, balls):
        between = np.square(balls[:, None] - balls[None]).sum(2)
        radii = np.sort(between, 1)[:, 3]
        return (np.square(x[:, None] - balls[None]).sum(2) <= radii).any(1).mean()

    return score, fid(pool, pool_b), fid(spatial, spatial_b), share_inside(pool_b, pool), share_inside(pool, pool_b)


def test_the_five_metrics_are_those_of_the_formulas(folder, tmp_path, capfd):
    record = tmp_path / "out.json"
    flags = folder / "a.npz", folder / "b.npz", "--graph", GRAPH, "--distance", "fp32", "--json", record
    printed, err = evaluate(*flags, "--batch-size", 33, capfd=capfd)
    assert list(printed)[:5] == NAMES and err == ""
    arrays = [np.load(folder / name)["arr_0"] for name in ("a.npz", "b.npz")]
    expected = slow_metrics(*arrays)
    saved = json.loads(record.read_text())
    assert list(saved["metrics"]) == ["inception_score", "fid", "sfid", "precision", "recall"]
    for name, value, exact in zip(NAMES, saved["metrics"].values(), expected):
        # 448 spatial features of 250 images: the root's eigenvalue 0 is 1e-5 relative here and there.
        assert value == pytest.approx(exact, rel=1e-4 if name == "sFID" else 1e-5)
        assert float(printed[name]) == pytest.approx(value, rel=1e-5)
    assert saved["warnings"] == [] and saved["sample"]["images"] == saved["reference"]["images"] == 250
    assert saved["backend"]["name"] == "torch" and saved["flags"]["distance"] == "fp32"


def test_the_program_runs_as_a_user_types_it(folder):
    result = run("evaluator.py", "a.npz", "b.npz", "--graph", GRAPH, "--device", "cpu", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == NAMES


@needs_tensorflow
def test_tensorflow_gives_the_same_metrics(folder, capfd):
    flags = folder / "a.npz", folder / "b.npz", "--graph", GRAPH, "--metrics", "is,fid,sfid"
    printed = [evaluate(*flags, "--backend", backend, capfd=capfd)[0] for backend in ("torch", "tensorflow")]
    for name in NAMES[:3]:
        assert float(printed[0][name]) == pytest.approx(float(printed[1][name]), rel=1e-4)


@pytest.mark.skipif(HAS_TENSORFLOW, reason="TensorFlow is installed")
def test_without_tensorflow_its_backend_says_so(folder, capfd):
    flags = folder / "a.npz", folder / "b.npz", "--graph", GRAPH, "--backend", "tensorflow"
    assert_refused(call("evaluator.py", *flags, capfd=capfd), "TensorFlow", "pip install")


def test_a_set_compared_with_itself_is_perfect_and_that_is_doubted(folder, tmp_path, capfd):
    (tmp_path / "copy.npz").write_bytes((folder / "a.npz").read_bytes())
    flags = folder / "a.npz", tmp_path / "copy.npz", "--graph", GRAPH, "--distance", "fp32"
    printed, err = evaluate(*flags, capfd=capfd)
    assert abs(float(printed["FID"])) < 1e-6 and abs(float(printed["sFID"])) < 1e-6
    assert printed["Precision"] == printed["Recall"] == "1"
    assert err.count("\n") == 1 and "warning" in err and "the same" in err


def test_stored_statistics_take_the_place_of_images(folder, tmp_path, capfd):
    direct, _ = evaluate(folder / "a.npz", folder / "b.npz", "--graph", GRAPH, capfd=capfd)
    for name in ("a", "b"):
        flags = folder / f"{name}.npz", "--graph", GRAPH, "--save-stats", tmp_path / f"{name}.npz"
        assert "FID" not in evaluate(*flags, capfd=capfd)[0]
    for a, b in ((folder, tmp_path), (tmp_path, folder), (tmp_path, tmp_path)):
        again, err = evaluate(a / "a.npz", b / "b.npz", "--graph", GRAPH, capfd=capfd)
        assert again == direct and err == ""
    # Both are there: no network is needed, and so none is asked for.
    flags = tmp_path / "a.npz", tmp_path / "b.npz", "--metrics", "fid,recall"
    assert evaluate(*flags, capfd=capfd)[0] == {name: direct[name] for name in ("FID", "Recall")}


def test_the_samples_statistics_are_kept_beside_the_comparison(folder, tmp_path, capfd):
    flags = folder / "a.npz", folder / "b.npz", "--graph", GRAPH, "--metrics", "is"
    printed, _ = evaluate(*flags, "--save-stats", tmp_path / "b.npz", "--keep-features", 10, capfd=capfd)
    assert list(printed)[1:] == ["Inception Score"]
    pool, spatial = (f.numpy() for f in load_graph(GRAPH).features(np.load(folder / "b.npz")["arr_0"]))
    with np.load(tmp_path / "b.npz") as stored:
        assert stored["pool"].shape == (10, 64)
        assert np.allclose(stored["pool"][[0, -1]], pool[[0, -1]], rtol=1e-5)
        assert np.allclose(stored["mu"], pool.mean(0), rtol=1e-5)
        assert np.allclose(stored["sigma_s"], np.cov(spatial, rowvar=False), rtol=1e-3, atol=1e-6)


def test_the_published_layout_uses_statistics_for_fid_and_images_for_the_rest(folder, tmp_path, images, capfd):
    """mu, sigma of the whole set and arr_0 of a part of it, as VIRTUAL_imagenet256_labeled.npz has them."""
    evaluate(folder / "b.npz", "--graph", GRAPH, "--save-stats", tmp_path / "b.npz", capfd=capfd)
    stored = {name: np.load(tmp_path / "b.npz")[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez(tmp_path / "reference.npz", arr_0=images[:250], **stored)
    printed, _ = evaluate(tmp_path / "reference.npz", folder / "b.npz", "--graph", GRAPH, capfd=capfd)
    direct, _ = evaluate(folder / "a.npz", folder / "b.npz", "--graph", GRAPH, capfd=capfd)
    assert abs(float(printed["FID"])) < 1e-6 < float(direct["FID"])
    assert [printed[name] for name in NAMES[3:]] == [direct[name] for name in NAMES[3:]]


def test_a_folder_of_pngs_is_the_npz_of_its_images(folder, tmp_path, capfd):
    for k, image in enumerate(np.load(folder / "b.npz")["arr_0"]):
        Image.fromarray(image).save(tmp_path / f"{k:06d}.png")
    both = [evaluate(folder / "a.npz", path, "--graph", GRAPH, capfd=capfd)[0] for path in (folder / "b.npz", tmp_path)]
    assert both[0] == both[1]


def test_the_shipped_reference_judges_real_images_as_good(folder, capfd):
    printed, _ = evaluate(REFERENCE, folder / "a.npz", "--graph", GRAPH, capfd=capfd)
    worse, _ = evaluate(REFERENCE, folder / "b.npz", "--graph", GRAPH, capfd=capfd)
    assert float(printed["FID"]) < 2 < float(worse["FID"])
    assert float(printed["Precision"]) > 0.9
    assert REFERENCE.stat().st_size < 5e6


def test_only_what_is_asked_for_is_computed(folder, monkeypatch, capfd):
    from evaluation import metrics

    monkeypatch.setattr(metrics, "precision_recall", None)
    printed, _ = evaluate(folder / "a.npz", folder / "b.npz", "--graph", GRAPH, "--metrics", "sfid,is,fid", capfd=capfd)
    assert list(printed) == NAMES[:3]


def test_doubts_are_one_line_each_and_stay_in_the_record(folder, tmp_path, images, capfd):
    sample = images[:40, :30].astype(np.float32) / 255
    sample[7] = 0.5
    np.savez(tmp_path / "c.npz", arr_0=sample)
    flags = folder / "a.npz", tmp_path / "c.npz", "--graph", GRAPH, "--metrics", "fid"
    _, err = evaluate(*flags, "--json", tmp_path / "out.json", capfd=capfd)
    lines = err.strip().splitlines()
    for line, words in zip(lines, ("32x32", "40 samples for 64 features", "float32", "1 of 40 images")):
        assert words in line and line.startswith("evaluator.py: warning: ")
    assert len(lines) == 4
    saved = json.loads((tmp_path / "out.json").read_text())["warnings"]
    assert [f"evaluator.py: warning: {text}" for text in saved] == lines


def test_fewer_samples_than_the_published_values_are_of_are_mentioned(folder, monkeypatch, capfd):
    published = features.Network.__init__

    def say_so(self, *args):
        published(self, *args)
        self.is_published = True

    monkeypatch.setattr(features.Network, "__init__", say_so)
    flags = folder / "a.npz", folder / "b.npz", "--graph", GRAPH, "--metrics", "fid"
    _, err = evaluate(*flags, capfd=capfd)
    assert "250 samples" in err and "50000" in err


def test_where_memory_is_short_smaller_batches_are_tried_and_said(folder, monkeypatch, capfd):
    from evaluation.inception import Graph

    plain, run = evaluate(folder / "a.npz", folder / "b.npz", "--graph", GRAPH, capfd=capfd)[0], Graph.run

    def short(self, images):
        if len(images) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return run(self, images)

    monkeypatch.setattr(Graph, "run", short)
    printed, err = evaluate(folder / "a.npz", folder / "b.npz", "--graph", GRAPH, capfd=capfd)
    assert printed == plain
    assert [line.split()[-1] for line in err.splitlines()] == ["32", "16"] and "out of memory" in err


def refused(capfd, *flags, words):
    assert_refused(call("evaluator.py", *flags, "--device", "cpu", capfd=capfd), *words)


def test_inputs_that_cannot_be_used_are_refused_in_one_line(folder, tmp_path, capfd):
    a, graph = folder / "a.npz", ("--graph", GRAPH)
    refused(capfd, a, tmp_path / "none.npz", *graph, words=["no such file", "none.npz"])
    refused(capfd, a, GRAPH, *graph, words=["no .npz", GRAPH])
    refused(capfd, a, words=["--save-stats"])
    refused(capfd, a, a, *graph, "--metrics", "fid,kid", words=["kid", "recall"])
    refused(capfd, a, a, *graph, "--json", "out.txt", words=["out.txt", ".json"])
    refused(capfd, a, a, *graph, "--save-stats", "out", words=["out", ".npz"])
    refused(capfd, a, a, *graph, "--keep-features", 3, words=["--save-stats"])
    refused(capfd, a, a, *graph, "--json", "/proc/none/out.json", words=["cannot write"])
    np.savez(tmp_path / "one.npz", arr_0=np.load(a)["arr_0"][:1])
    refused(capfd, a, tmp_path / "one.npz", *graph, "--metrics", "fid", words=["one.npz", "two are needed"])
    np.savez(tmp_path / "mu.npz", mu=np.zeros(64), sigma=np.eye(64))
    refused(capfd, tmp_path / "mu.npz", a, *graph, words=["mu_s, pool, sigma_s", "--metrics"])
    assert not list(folder.glob("*.json"))


def test_a_missing_sample_is_said_before_the_reference_is_fetched(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(released, "fetch", lambda name: pytest.fail(f"{name} was to be fetched"))
    refused(capfd, "VIRTUAL_imagenet256_labeled.npz", tmp_path / "none.npz", words=["no such file", "none.npz"])


def test_nan_in_an_image_is_refused(folder, tmp_path, capfd):
    images = np.load(folder / "a.npz")["arr_0"].astype(np.float32)
    images[70, 0, 0, 0] = np.nan
    np.savez(tmp_path / "nan.npz", arr_0=images)
    refused(capfd, folder / "a.npz", tmp_path / "nan.npz", "--graph", GRAPH, words=["image 70"])


def test_statistics_of_another_graph_are_refused(folder, tmp_path, capfd):
    graph = ("--graph", GRAPH)
    evaluate(folder / "a.npz", *graph, "--save-stats", tmp_path / "a.npz", capfd=capfd)
    with np.load(tmp_path / "a.npz") as stored:
        arrays = dict(stored)
    arrays["about"] = np.array(str(arrays["about"]).replace('"graph": "', '"graph": "0'))
    np.savez(tmp_path / "other.npz", **arrays)
    words = "other.npz", "another graph", "--graph"
    refused(capfd, tmp_path / "other.npz", folder / "b.npz", *graph, words=words)
    refused(capfd, tmp_path / "other.npz", tmp_path / "a.npz", "--metrics", "fid", words=["different graphs"])
    # Nobody wrote down the graph, but the sizes tell.
    np.savez(tmp_path / "sizes.npz", mu=np.zeros(2048), sigma=np.eye(2048), arr_0=np.load(folder / "a.npz")["arr_0"])
    refused(capfd, tmp_path / "sizes.npz", folder / "b.npz", *graph, words=["sizes.npz", "another graph", "mu (2048,)"])


def test_graph_files_that_cannot_be_used_are_refused(folder, tmp_path, capfd):
    sets = folder / "a.npz", folder / "b.npz"
    for path, words in ((tmp_path / "none.pb", ["no such file"]), (sets[0], ["not a TensorFlow graph"])):
        refused(capfd, *sets, "--graph", path, words=[path, *words])
    whole = GRAPH.read_bytes()
    (tmp_path / "cut.pb").write_bytes(whole[: len(whole) // 2])
    refused(capfd, *sets, "--graph", tmp_path / "cut.pb", words=["cut.pb", "cut off"])
    # Under the name of the published one another file is a mistake, or worse.
    (tmp_path / "classify_image_graph_def.pb").write_bytes(whole)
    refused(capfd, *sets, "--graph", tmp_path / "classify_image_graph_def.pb", words=["SHA-256", "published"])
    graph = GraphWriter()
    graph.message = type(graph.message).FromString(whole)
    next(node for node in graph.message.node if node.op == "MaxPool").op = "FractionalMaxPool"
    path = graph.save(tmp_path / "unknown.pb")
    refused(capfd, *sets, "--graph", path, words=["FractionalMaxPool", "not known"])


def test_the_published_graph_is_checked_before_it_is_used(folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(released, "ROOT", tmp_path)
    path = tmp_path / "pretrained_models" / "classify_image_graph_def.pb"
    path.parent.mkdir()
    path.write_bytes(GRAPH.read_bytes())
    refused(capfd, folder / "a.npz", folder / "b.npz", words=[path, "left as it is"])
    assert path.read_bytes() == GRAPH.read_bytes()
