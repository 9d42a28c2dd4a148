"""evaluator.py as a user runs it, on the shipped classifier; its numbers against NumPy and SciPy."""

import json
import re

import numpy as np
import pytest
import scipy.linalg
import torch
from backends import needs_tensorflow
from conftest import DATA, ROOT, assert_refused, call, run
from PIL import Image

from evaluation.inception import Graph
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
    """a.npz and b.npz with 250 real images each, brighter in b."""
    folder = tmp_path_factory.mktemp("sets")
    np.savez(folder / "a.npz", arr_0=images[:250])
    np.savez(folder / "b.npz", arr_0=np.minimum(images[250:].astype(int) + 30, 255).astype(np.uint8))
    return folder


@pytest.fixture
def evaluate(capfd):
    """Run the program with the shipped graph; return {printed name: text} and standard error."""

    def evaluate(*flags):
        result = call("evaluator.py", *flags, "--graph", GRAPH, "--device", "cpu", capfd=capfd)
        assert result.returncode == 0, result.stderr
        return dict(re.findall(r"^([A-Za-z ]+): (\S+)$", result.stdout, re.M)), result.stderr

    return evaluate


@pytest.fixture
def refused(capfd):
    return lambda *flags, words: assert_refused(call("evaluator.py", *flags, "--device", "cpu", capfd=capfd), *words)


@pytest.fixture
def stored(folder, tmp_path, evaluate):
    """A folder with the statistics of a.npz and b.npz."""
    for name in ("a.npz", "b.npz"):
        assert "FID" not in evaluate(folder / name, "--save-stats", tmp_path / "stored" / name)[0]
    return tmp_path / "stored"


def simple_metrics(a, b):
    """The five metrics of images b against a, by the formulas of textbooks in float64."""
    graph = Graph(GRAPH)
    (pool, spatial), (pool_b, spatial_b) = ([f.double().numpy() for f in graph.features(x)] for x in (a, b))
    p = graph.probabilities(torch.from_numpy(pool_b).float()).double().numpy()
    score = np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())

    def fid(x, y):
        sigma_x, sigma_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
        root = scipy.linalg.sqrtm(sigma_x @ sigma_y).real
        return np.square(x.mean(0) - y.mean(0)).sum() + np.trace(sigma_x + sigma_y - 2 * root)

    def share_inside(x, balls):
        between = np.square(balls[:, None] - balls[None]).sum(2)
        radii = np.sort(between, 1)[:, 3]
        return (np.square(x[:, None] - balls[None]).sum(2) <= radii).any(1).mean()

    return score, fid(pool, pool_b), fid(spatial, spatial_b), share_inside(pool_b, pool), share_inside(pool, pool_b)


def test_the_five_metrics_equal_their_formulas(folder, tmp_path, evaluate):
    record = tmp_path / "out.json"
    flags = folder / "a.npz", folder / "b.npz", "--distance", "fp32", "--json", record
    printed, err = evaluate(*flags, "--batch-size", 33)
    assert list(printed) == ["Record", *NAMES] and err == ""  # saved before it is printed
    expected = simple_metrics(*(np.load(folder / name)["arr_0"] for name in ("a.npz", "b.npz")))
    saved = json.loads(record.read_text())
    assert list(saved["metrics"]) == ["inception_score", "fid", "sfid", "precision", "recall"]
    for name, value, exact in zip(NAMES, saved["metrics"].values(), expected):
        # 448 spatial features of 250 images: zero eigenvalues become 1e-5 relative in either root.
        assert value == pytest.approx(exact, rel=1e-4 if name == "sFID" else 1e-5)
        assert float(printed[name]) == pytest.approx(value, rel=1e-5)
    assert saved["warnings"] == [] and saved["sample"]["images"] == saved["reference"]["images"] == 250
    assert saved["backend"]["name"] == "torch" and saved["flags"]["distance"] == "fp32"


def test_the_program_runs_as_a_user_types_it(folder):
    result = run("evaluator.py", "a.npz", "b.npz", "--graph", GRAPH, "--device", "cpu", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == NAMES


@needs_tensorflow
def test_tensorflow_gives_the_same_metrics(folder, evaluate):
    flags = folder / "a.npz", folder / "b.npz", "--metrics", "is,fid,sfid"
    printed = [evaluate(*flags, "--backend", backend)[0] for backend in ("torch", "tensorflow")]
    for name in NAMES[:3]:
        assert float(printed[0][name]) == pytest.approx(float(printed[1][name]), rel=1e-4)


def test_a_set_against_its_copy_is_perfect_and_causes_a_warning(folder, tmp_path, evaluate):
    (tmp_path / "copy.npz").write_bytes((folder / "a.npz").read_bytes())
    printed, err = evaluate(folder / "a.npz", tmp_path / "copy.npz", "--distance", "fp32")
    assert abs(float(printed["FID"])) < 1e-6 and abs(float(printed["sFID"])) < 1e-6
    assert printed["Precision"] == printed["Recall"] == "1"
    assert err.count("\n") == 1 and "warning" in err and "the same" in err


def test_stored_statistics_replace_images(folder, stored, evaluate, capfd):
    direct, _ = evaluate(folder / "a.npz", folder / "b.npz")
    for a, b in ((folder, stored), (stored, folder), (stored, stored)):
        again, err = evaluate(a / "a.npz", b / "b.npz")
        assert again == direct and err == ""
    # Without --graph: two sets of statistics need no network.
    flags = stored / "a.npz", stored / "b.npz", "--metrics", "fid,recall", "--device", "cpu"
    result = call("evaluator.py", *flags, capfd=capfd)
    assert result.stdout == f"FID: {direct['FID']}\nRecall: {direct['Recall']}\n"


def test_a_comparison_can_save_the_samples_statistics(folder, tmp_path, evaluate):
    flags = "--metrics", "is", "--save-stats", tmp_path / "b.npz", "--keep-features", 10
    assert list(evaluate(folder / "a.npz", folder / "b.npz", *flags)[0])[1:] == ["Inception Score"]
    pool, spatial = (f.numpy() for f in Graph(GRAPH).features(np.load(folder / "b.npz")["arr_0"]))
    with np.load(tmp_path / "b.npz") as saved:
        assert saved["pool"].shape == (10, 64)
        assert np.allclose(saved["pool"][[0, -1]], pool[[0, -1]], rtol=1e-5)
        assert np.allclose(saved["mu"], pool.mean(0), rtol=1e-5)
        assert np.allclose(saved["sigma_s"], np.cov(spatial, rowvar=False), rtol=1e-3, atol=1e-6)


def test_a_reference_with_statistics_and_images_uses_statistics_for_fid(folder, stored, tmp_path, images, evaluate):
    """The published reference has mu and sigma of the whole set, and arr_0 of a part of it."""
    arrays = {name: np.load(stored / "b.npz")[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez(tmp_path / "reference.npz", arr_0=images[:250], **arrays)
    printed, _ = evaluate(tmp_path / "reference.npz", folder / "b.npz")
    direct, _ = evaluate(folder / "a.npz", folder / "b.npz")
    assert abs(float(printed["FID"])) < 1e-6 < float(direct["FID"])
    assert [printed[name] for name in NAMES[3:]] == [direct[name] for name in NAMES[3:]]


def test_the_shipped_reference_scores_real_images_well(folder, evaluate):
    real, _ = evaluate(REFERENCE, folder / "a.npz")
    worse, _ = evaluate(REFERENCE, folder / "b.npz", "--metrics", "fid")
    assert float(real["FID"]) < 2 < float(worse["FID"]) and float(real["Precision"]) > 0.9


def test_doubts_are_one_line_each_and_part_of_the_record(folder, tmp_path, images, evaluate):
    sample = images[:40, :30].astype(np.float32) / 255
    sample[7] = 0.5
    np.savez(tmp_path / "c.npz", arr_0=sample)
    flags = folder / "a.npz", tmp_path / "c.npz", "--metrics", "fid", "--record", tmp_path / "out.json"
    lines = evaluate(*flags)[1].strip().splitlines()
    for line, words in zip(lines, ("32x32", "40 samples for 64 features", "float32", "1 of 40 images")):
        assert words in line and line.startswith("evaluator.py: warning: ")
    assert len(lines) == 4
    saved = json.loads((tmp_path / "out.json").read_text())["warnings"]
    assert [f"evaluator.py: warning: {text}" for text in saved] == lines


def test_a_folder_has_the_fid_of_its_pictures_whatever_their_names(folder, tmp_path, images, evaluate):
    expected, _ = evaluate(folder / "a.npz", folder / "b.npz", "--metrics", "fid")
    with np.load(folder / "b.npz") as sample:
        for k, image in enumerate(sample["arr_0"]):
            path = tmp_path / ("set" if k % 3 else "elsewhere") / (f"{k:03d}.PNG" if k % 2 else f"{k:03d}.png")
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image).save(path)
    (tmp_path / "set" / "more").symlink_to("../elsewhere")
    (tmp_path / "set" / ".ipynb_checkpoints").mkdir()
    Image.fromarray(images[0]).save(tmp_path / "set" / ".ipynb_checkpoints" / "x.png")
    printed, err = evaluate(folder / "a.npz", tmp_path / "set", "--metrics", "fid")
    assert float(printed["FID"]) == pytest.approx(float(expected["FID"]), rel=1e-4)
    assert err.count("\n") == 1 and ".ipynb_checkpoints" in err
    _, err = evaluate(tmp_path / "set", "--save-stats", tmp_path / "out.npz")
    assert err.count("\n") == 1 and ".ipynb_checkpoints" in err


def test_if_memory_runs_out_smaller_batches_are_tried(folder, monkeypatch, evaluate):
    plain, run = evaluate(folder / "a.npz", folder / "b.npz")[0], Graph.run

    def short(self, images):
        if len(images) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return run(self, images)

    monkeypatch.setattr(Graph, "run", short)
    printed, err = evaluate(folder / "a.npz", folder / "b.npz")
    assert printed == plain
    assert [line.split()[-1] for line in err.splitlines()] == ["32", "16"] and "out of memory" in err


def test_kid_is_that_of_the_formula(folder, tmp_path, evaluate):
    record = tmp_path / "out.json"
    flags = folder / "a.npz", folder / "b.npz", "--metrics", "fid,kid", "--record", record
    printed, err = evaluate(*flags, "--kid-subset-size", 250, "--kid-subsets", 2)  # a subset is the whole set
    assert list(printed) == ["Record", "FID", "KID", "KID standard deviation"] and err == ""
    x, y = (Graph(GRAPH).features(np.load(folder / name)["arr_0"])[0].double() for name in ("a.npz", "b.npz"))
    kernels = [torch.tensor([[(u @ v / 64 + 1) ** 3 for v in b] for u in a]) for a, b in ((x, x), (y, y), (x, y))]
    within = sum(kernel.sum() - kernel.diagonal().sum() for kernel in kernels[:2]) / (250 * 249)
    assert float(printed["KID"]) == pytest.approx((within - 2 * kernels[2].mean()).item(), rel=1e-5)
    assert float(printed["KID standard deviation"]) < 1e-9
    saved = json.loads(record.read_text())["metrics"]
    assert saved["kid"] == pytest.approx(float(printed["KID"]), rel=1e-5) and "kid_standard_deviation" in saved
    # 1000 images are asked for, as published; subsets are the same each time, and images that are few are no doubt.
    again, err = evaluate(*flags[:2], "--metrics", "kid")
    assert (
        again["KID"] == printed["KID"]
        and err == "evaluator.py: warning: KID: subsets of 250 points, because a set has no more\n"
    )
    first, err = evaluate(*flags[:2], "--metrics", "kid", "--kid-subset-size", 20)
    assert first == evaluate(*flags[:2], "--metrics", "kid", "--kid-subset-size", 20)[0] and err == ""
    assert float(first["KID standard deviation"]) > 0.001 and first["KID"] != printed["KID"]


def test_features_of_any_network_replace_images(folder, tmp_path, evaluate, refused, capfd):
    for name in ("a.npz", "b.npz"):
        np.savez(tmp_path / name, Graph(GRAPH).features(np.load(folder / name)["arr_0"])[0].numpy())
    metrics = "--metrics", "fid,precision,recall,kid", "--kid-subset-size", 100
    direct, _ = evaluate(folder / "a.npz", folder / "b.npz", *metrics)
    result = call("evaluator.py", tmp_path / "a.npz", tmp_path / "b.npz", *metrics, "--device", "cpu", capfd=capfd)
    assert result.returncode == 0 and result.stderr == ""  # without a network
    assert result.stdout == "".join(f"{name}: {value}\n" for name, value in direct.items())
    assert evaluate(folder / "a.npz", tmp_path / "b.npz", *metrics)[0] == direct  # of the same network
    for others in ("fid,sfid", "is", "fid,is,sfid,precision,recall"):
        refused(tmp_path / "a.npz", tmp_path / "b.npz", "--metrics", others, words=["a.npz", "features", "fid,kid"])
    refused(tmp_path / "a.npz", "--save-stats", tmp_path / "s.npz", words=["--save-stats", "a.npz holds features"])
    np.savez(tmp_path / "few.npz", np.eye(30, 64))
    flags = tmp_path / "a.npz", tmp_path / "few.npz", "--metrics", "fid", "--device", "cpu"
    assert "30 samples for 64 features" in call("evaluator.py", *flags, capfd=capfd).stderr


@pytest.mark.parametrize(
    "arrays, words",
    [
        (dict(arr_0=np.zeros((9, 3), int)), ["int64 (9, 3)", "floats (N, D)"]),
        (dict(arr_0=np.zeros((9, 3), np.longdouble)), ["(9, 3)", "of up to 64 bits"]),
        (dict(arr_0=np.zeros((1, 3))), ["(1, 3)", "at least two"]),
        (dict(arr_0=np.zeros((9, 3)), mu=np.zeros(3)), ["features and mu"]),
        (dict(arr_0=np.full((9, 3), np.nan)), ["not finite"]),
        (dict(arr_0=np.zeros((9, 4))), ["3", "4", "cannot be compared"]),
        (dict(arr_0=np.zeros(9)), ["(9,)", "(N, D)"]),
    ],
)
def test_unusable_features_are_refused(arrays, words, tmp_path, refused):
    np.savez(tmp_path / "good.npz", np.eye(9, 3))
    np.savez(tmp_path / "bad.npz", **arrays)
    for metric in ("fid", "kid"):
        refused(tmp_path / "good.npz", tmp_path / "bad.npz", "--metrics", metric, words=["bad.npz", *words])


def test_unusable_input_is_refused_in_one_line(folder, tmp_path, images, refused):
    a, graph = folder / "a.npz", ("--graph", GRAPH)
    refused(a, GRAPH, *graph, words=["not an .npz", GRAPH])
    refused(a, words=["--save-stats"])
    refused(a, a, *graph, "--metrics", "fid,lpips", words=["lpips", "recall"])
    refused(a, a, *graph, "--record", "out.txt", words=["out.txt", ".json"])
    refused(a, a, *graph, "--save-stats", "out", words=["out", ".npz"])
    refused(a, a, *graph, "--keep-features", 3, words=["--save-stats"])
    refused(a, "--save-stats", tmp_path / "x.npz", "--record", "out.json", words=["--record", "SAMPLES"])
    mine, before = tmp_path / "mine.npz", a.read_bytes()
    mine.write_bytes(before)
    refused(mine, "--save-stats", mine, words=["--save-stats", "mine.npz is the file of REFERENCE too"])
    refused(a, mine, *graph, "--save-stats", mine, words=["--save-stats", "mine.npz is the file of SAMPLES too"])
    assert mine.read_bytes() == before
    refused(a, a, *graph, "--kid-subsets", 3, words=["--metrics kid"])
    refused(a, a, *graph, "--metrics", "fid", "--distance", "fp32", words=["--distance", "precision and recall"])
    refused(a, *graph, "--metrics", "fid", "--save-stats", tmp_path / "x.npz", words=["--metrics is about SAMPLES"])
    refused(a, a, *graph, "--metrics", "kid", "--kid-subset-size", 1, words=["at least 2"])
    refused(a, a, *graph, "--record", "/proc/none/out.json", words=["cannot write"])
    np.savez(tmp_path / "one.npz", arr_0=images[:1])
    refused(a, tmp_path / "one.npz", *graph, "--metrics", "fid", words=["one.npz", "two are needed"])
    np.savez(tmp_path / "mu.npz", mu=np.zeros(64), sigma=np.eye(64))
    refused(tmp_path / "mu.npz", a, *graph, words=["mu_s, pool, sigma_s", "--metrics"])
    refused(a, a, "--graph", tmp_path / "none.pb", words=["no such file", "none.pb"])


def test_statistics_of_another_graph_are_refused(folder, stored, tmp_path, images, refused):
    arrays = dict(np.load(stored / "a.npz"))
    arrays["about"] = np.array(str(arrays["about"]).replace('"graph": "', '"graph": "0'))
    np.savez(tmp_path / "other.npz", **arrays)
    words = "other.npz", "another graph", "--graph"
    refused(tmp_path / "other.npz", folder / "b.npz", "--graph", GRAPH, words=words)
    refused(tmp_path / "other.npz", stored / "a.npz", "--metrics", "fid", words=["different graphs"])
    # Two of this kind need no network, but are not those of a graph that is named.
    refused(tmp_path / "other.npz", tmp_path / "other.npz", "--metrics", "fid", "--graph", GRAPH, words=words)
    # Published statistics do not name their graph, but have its sizes.
    np.savez(tmp_path / "sizes.npz", mu=np.zeros(2048), sigma=np.eye(2048), arr_0=images)
    words = "sizes.npz", "another graph", "mu (2048,)"
    refused(tmp_path / "sizes.npz", folder / "b.npz", "--graph", GRAPH, words=words)


def test_another_graph_with_the_published_name_is_refused(folder, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(released, "ROOT", tmp_path)
    path = tmp_path / "pretrained_models" / "classify_image_graph_def.pb"
    path.parent.mkdir()
    path.write_bytes(GRAPH.read_bytes())
    refused(folder / "a.npz", folder / "b.npz", words=[path, "left as it is"])
    refused(folder / "a.npz", folder / "b.npz", "--graph", path, words=["SHA-256", "published"])
    assert path.read_bytes() == GRAPH.read_bytes()
