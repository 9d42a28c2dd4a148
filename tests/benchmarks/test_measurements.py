"""Every benchmark at a small size: the original's way computes what ours does, and records hold what was measured."""

import functools
import importlib.metadata
import json
import os
import re

import numpy as np
import pytest
import torch
from backends import needs_tensorflow
from conftest import assert_refused, call, random_dit

import sampling
from benchmarks import assembly, common, evaluators, precision, train_step
from benchmarks.inception_graph import inception_v3
from benchmarks.metrics_speed import WAYS
from benchmarks.original import original_latents, original_loss
from diffusion import create_diffusion
from pretrained import loading
from router import Router, router_loss
from runtime import devices
from schedule import Schedule


@pytest.fixture
def record(tmp_path, capfd):
    """A function of a benchmark and its flags, which runs it: its record, and the rows of the table that it prints."""

    def run(name, *flags):
        path = tmp_path / "record.json"
        result = call(f"benchmarks/{name}.py", *flags, "--record", path, capfd=capfd)
        assert result.returncode == 0, result.stderr
        rows = [line for line in result.stdout.splitlines() if line.startswith("|")]
        return json.loads(path.read_text()), rows[2:]

    return run


# Sampling


@pytest.mark.parametrize("threshold", [None, 0.5, 1.0])
def test_the_original_samples_the_same_latents(threshold):
    dit, diffusion = random_dit(), create_diffusion(6)
    torch.manual_seed(1)
    schedule = None if threshold is None else Router(6, 3).schedule(threshold)
    z, y = torch.randn(3, 4, 4, 4), torch.tensor([0, 3, 3])
    ours = sampling.sample_latents(dit, diffusion, z, y, 2.0, schedule)
    theirs = original_latents(dit, diffusion, z, y, 2.0, schedule)
    assert (theirs - ours).abs().max() < 1e-5 * ours.abs().max()


def test_the_latency_of_every_way_to_run(model_folder, tmp_path, monkeypatch, record):
    monkeypatch.setattr(devices, "matmul_rate", lambda layers, rows: 1e9)  # measuring it takes a second
    plan = Schedule.every_nth(4, 3, 2).with_order(2)
    plan.save(tmp_path / "second.json")
    flags = ["--ckpt", model_folder, "--path", model_folder / "router4.pt", "--thres", 0.5, "--device", "cpu"]
    flags += ["--num-sampling-steps", 4, "--images", 2, "--repeats", 2, "--reference", "--modes", "eager"]
    saved, shown = record("latency", *flags, "--plans", tmp_path / "second.json")
    rows = {(row["schedule"], row["mode"], row["dtype"]): row for row in saved["rows"]}
    kinds = ("eager", "fp32"), ("eager", "bf16"), ("reference", "fp32")
    plans = {"router": Router.load(model_folder / "router4.pt").schedule(0.5), "second": plan}
    bounds = {name: plan.speedup_bound(random_dit().multiply_adds()) for name, plan in plans.items()} | {"full": 1}
    assert rows.keys() == {(schedule, *kind) for schedule in bounds for kind in kinds} and len(shown) == 9
    for (schedule, mode, dtype), row in rows.items():
        cached, full = schedule != "full", rows["full", mode, dtype]
        assert len(row["seconds"]) == 2 and row["rate"] > 0 and row["first"] > 0
        assert row["bound_against_full"] == bounds[schedule]
        assert row["multiply_adds"] == pytest.approx(full["multiply_adds"] / row["bound_against_full"])
        # Four tokens of 24 numbers, two slots in each of three blocks, two images with guidance.
        outputs = {"full": 0, "router": 1, "second": 3}[schedule]
        assert row["cache_bytes"] == outputs * 4 * 24 * 6 * 4 * (2 if dtype == "bf16" else 4)
        assert (row["against_reference"] == 1) == (mode == "reference") and (row["against_full"] == 1) != cached
        if mode == "reference":  # it reuses the last output, as published
            assert row["error"] < 1e-5 or schedule == "second"
        else:
            assert row["error"] == 0 if dtype == "fp32" else 0 < row["error"] < 0.1


def test_the_latency_of_a_switch_beside_the_same_without(model_folder, monkeypatch, record, capfd):
    monkeypatch.setattr(devices, "matmul_rate", lambda layers, rows: 1e9)
    monkeypatch.setattr(devices, "compile_blocks", functools.partial(devices.compile_blocks, backend="eager"))
    flags = ["--ckpt", model_folder, "--device", "cpu", "--num-sampling-steps", 4, "--repeats", 1, "--experimental"]
    saved, shown = record("latency", *flags, "fp8", "--modes", "eager", "compile", "--dtypes", "fp32", "bf16")
    rows = {(row["mode"], row["dtype"]): row for row in saved["rows"]}
    assert list(rows) == [(mode, dtype) for dtype in ("fp32", "bf16") for mode in ("eager", "compile")] + [
        ("compile+fp8", "bf16")
    ]
    plain, fast = rows["compile", "bf16"], rows["compile+fp8", "bf16"]
    assert fast["against_plain"] == plain["seconds"][0] / fast["seconds"][0] and plain["against_plain"] is None
    assert plain["error"] < fast["error"] < 0.2 and 0 < fast["error_against_plain"] < 0.2
    assert f"{fast['against_plain']:.3f} (" in shown[-1]
    for more in ["fp8", "--modes", "eager"], ["fp8", "--dtypes", "fp32"]:
        assert_refused(call("benchmarks/latency.py", *flags, *more, capfd=capfd), "runs compiled and in bf16")
    assert_refused(call("benchmarks/latency.py", *flags, "gelu", capfd=capfd), "gelu needs a CUDA device")


@pytest.mark.parametrize("steps", [2, 4])
def test_a_profile_shares_the_time_of_a_full_and_a_cached_step(steps, model_folder, tmp_path, capfd):
    torch.manual_seed(0)
    Router(steps, 3).save(tmp_path / "r.pt")
    flags = ["--ckpt", model_folder, "--path", tmp_path / "r.pt", "--thres", 0.5, "--device", "cpu", "--profile"]
    result = call("benchmarks/latency.py", *flags, "--num-sampling-steps", steps, capfd=capfd)
    assert result.returncode == 0, result.stderr
    head, _, *rows = result.stdout.strip().splitlines()
    assert "a full step (6 layers run)" in head and re.search(r"a cached step \([0-5] run\)", head)
    shares = [[float(share) for share in re.findall(r"\((\d+)%\)", row)] for row in rows]
    assert [sum(column) for column in zip(*shares)] == pytest.approx([100, 100], abs=4)
    assert shares[0][0] > 0  # matrix products of the full step


@pytest.mark.slow
def test_the_images_of_each_precision_beside_plain_float32(monkeypatch, record):
    ways = [("fp32", False, False, []), ("fp32", False, True, []), ("bf16", False, False, [])]
    ways.append(("bf16", False, False, ["fp8"]))
    monkeypatch.setattr(precision, "ways", lambda device: ways)
    saved, shown = record("precision", "--images", 10, "--device", "cpu")
    rows = saved["rows"]
    names = "dtype", "compiled", "recorded", "experimental"
    assert [tuple(row[name] for name in names) for row in rows] == [way for way in ways for _ in range(2)]
    assert [row["schedule"] for row in rows] == ["full", "router"] * 4 and len(shown) == 8
    assert " fp8 " not in "".join(shown[:6]) and all(" fp8 " in line for line in shown[6:])
    for row in rows[:4]:  # a CPU captures no CUDA graph, and computes the same
        assert (row["error"], row["psnr_db"], row["grey_levels"], row["differing"]) == (0, None, 0, 0)
    for row in rows[4:]:
        assert 0 < row["error"] < 0.1 and 25 < row["psnr_db"] < 70 and 0 < row["differing"] < 1
        assert row["class_accuracy"] > 0.8
    for bf16, fp8 in zip(rows[4:6], rows[6:]):  # it rounds to 4 bits where bf16 has 8
        assert fp8["psnr_db"] < bf16["psnr_db"]


# Training


def loss_and_gradients(loss, dit):
    """Losses (N,) of a seeded draw, and the gradients of a router's row (2*depth,) and of the DiT by name."""
    diffusion = create_diffusion(10)
    torch.manual_seed(1)
    router = Router(10, dit.depth)
    x_start, noise, y = torch.randn(4, 4, 4, 4), torch.randn(4, 4, 4, 4), torch.tensor([0, 1, 4, 5])
    scores = router(4)
    losses = loss(dit, diffusion, scores, 5, x_start, y, noise)
    (losses.mean() + 1e-3 * scores.sum()).backward()
    return losses.detach(), router.routers[4].prob.grad, {n: p.grad for n, p in dit.named_parameters()}


def test_the_original_has_our_loss_and_router_gradient_and_leaves_gradients_in_the_model():
    ours, theirs = random_dit(), random_dit().requires_grad_(True)
    theirs.pos_embed.requires_grad_(False)
    losses, gradient, none = loss_and_gradients(router_loss, ours)
    losses_again, gradient_again, left = loss_and_gradients(original_loss, theirs)
    assert (losses > 0).all() and gradient.abs().min() > 0
    torch.testing.assert_close(losses_again, losses, rtol=1e-5, atol=0)
    assert (gradient_again - gradient).norm() < 1e-5 * gradient.norm()
    assert all(value is None for value in none.values())
    assert {name for name, value in left.items() if value is None} == {"pos_embed"}


def test_an_update_moves_the_drawn_row_alone_and_the_variants_move_it_alike(monkeypatch):
    monkeypatch.setattr(loading, "load_dit", lambda spec, device, random_seed: random_dit(random_seed))
    names = ["original", "ours", "bf16", "checkpointing"]
    updates = train_step.Updates(None, 2, torch.device("cpu"), names)
    before = {key: value.clone() for key, value in updates.routers["ours"].state().items()}
    for name in 2 * names:
        updates.run(name)
    shared = {id(p) for p in updates.models["ours"].parameters()}
    for name, router in updates.routers.items():
        own = name == "bf16"
        for key, row in router.state().items():
            assert torch.equal(row, before[key]) == (key != f"{updates.row}.prob")
            torch.testing.assert_close(row, updates.routers["ours"].state()[key], rtol=0, atol=2e-3 if own else 1e-5)
        assert {id(p) for p in updates.models[name].parameters()}.isdisjoint(shared) == own


@pytest.mark.slow
def test_an_update_takes_less_memory_than_the_originals(monkeypatch, record):
    for name in ("bf16", "checkpointing"):  # the memory of each variant takes a process of seconds
        monkeypatch.delitem(train_step.VARIANTS, name)
    flags = ["--model", "DiT-S/8", "--batch-size", 2, "--repeats", 2, "--device", "cpu"]
    saved, shown = record("train_step", *flags)
    assert [len(saved["seconds"][name]) for name in ("original", "ours")] == [2, 2] and len(shown) == 2
    assert {saved[ratio]["original"] for ratio in ("time_ratio", "peak_ratio", "above_base_ratio")} == {1.0}
    assert all(0 < memory["base"] < memory["peak"] for memory in saved["memory_bytes"].values())
    # The gradients of 33 million parameters alone are more than the rest at this batch.
    assert saved["above_base_ratio"]["ours"] < 0.9


# Sets and metrics


@pytest.mark.slow
def test_the_original_holds_all_images_twice_and_ours_a_few(tmp_path, record):
    # 9,000 images of 64 pixels are 111 MB.
    flags = ["--images", 96, "--original-images", 9000, "--image-size", 64, "--shard", 500, "--work", tmp_path]
    measured = record("assembly", *flags)[0]["measurements"]
    assert os.listdir(tmp_path) == ["record.json"]  # no folder is left
    assert [figures["images"] for figures in measured.values()] == [9000, 9000, 96]
    above = {name: figures["peak_bytes"] - figures["base_bytes"] for name, figures in measured.items()}
    # Python and NumPy take 40 MB; torch would add 150.
    assert all(0 < figures["base_bytes"] < 120e6 for figures in measured.values())
    array = 9000 * 64 * 64 * 3
    assert 1.8 * array < above["original"] < 3 * array and above["ours_as_many"] < array / 4


def test_both_ways_write_the_images_of_the_shards(tmp_path):
    assembly.write_shards(tmp_path, 23, 8, 5)
    shards = [np.load(path) for path in sorted((tmp_path / "set" / "shards").glob("*.npz"))]
    images, labels = (np.concatenate([shard[name] for shard in shards]) for name in ("images", "labels"))
    assert len(shards) == 5 and images.shape == (23, 8, 8, 3) and labels.tolist() == list(range(23))
    assert len({image.tobytes() for image in images}) == 23
    for original, name in ((True, "original.npz"), (False, "set.npz")):
        figures, arrays = assembly.assemble(original, tmp_path, 23, 8), np.load(tmp_path / name)
        assert np.array_equal(arrays["arr_0"], images) and np.array_equal(arrays["labels"], labels)
        assert figures["npz_bytes"] == os.path.getsize(tmp_path / name)
    assert not (tmp_path / "set").exists()
    assert assembly.contents(tmp_path / "original.npz") == assembly.contents(tmp_path / "set.npz")


@pytest.mark.slow
@needs_tensorflow
def test_both_backends_extract_the_same_features(tmp_path, record):
    graph = inception_v3(tmp_path / "narrow.pb", narrower=16)
    flags = ["--image-size", 16, "--batch-size", 3, "--batches", 2, "--repeats", 1, "--device", "cpu"]
    saved, shown = record("extraction", *flags, "--graph", graph)
    for (figures,) in saved["measurements"].values():
        assert figures["seconds"] > 0 and 1e8 < figures["peak_bytes"] < 1e10
    assert saved["measurements"]["torch"][0]["version"] == saved["torch"] == torch.__version__
    assert 0 < saved["distance"] < 1e-5
    assert "TensorFlow" in shown[0] and "| narrow.pb | 16 | 3 |" in shown[1]


@pytest.mark.parametrize("value, agree", [(1.000001, True), (1.0001, False), (np.nan, False)])
def test_backends_run_in_turn_and_must_agree(value, agree, monkeypatch, record):
    launched = []
    features = {"tensorflow": np.ones((4, 9)), "torch": np.full((4, 9), value)}

    def run_alone(function, backend, *args):
        launched.append(backend)
        seconds = len(launched) * (2 if backend == "tensorflow" else 1)  # 2, 2, 6, 4, 10, 6
        return {"seconds": seconds, "peak_bytes": 5e6, "version": "1"}, [np.ones((4, 3)), features[backend]]

    monkeypatch.setattr(common, "run_alone", run_alone)
    flags = ["--graph", "x.pb", "--device", "cpu"]
    if agree:
        saved, shown = record("extraction", *flags)
        assert saved["distance"] == pytest.approx(1e-6, rel=1e-3)
        # The median of 2/2, 6/4 and 10/6; 256 images in the median of 2, 4 and 6 seconds.
        assert "| PyTorch 1 | x.pb | 256 | 64 | 64 | 1.500 | 5 |" in shown[1]
    else:
        with pytest.raises(RuntimeError, match="apart"):
            record("extraction", *flags)
    assert launched == ["tensorflow", "torch"] * 3


@pytest.mark.slow
def test_evaluators_that_are_installed_agree_and_others_are_left_out(record, capfd):
    found = evaluators.installed()
    missing = capfd.readouterr().err.splitlines()
    flags = ["--image-size", 16, "--batch-size", 1, "--batches", 1, "--repeats", 1, "--features", 16, "--device", "cpu"]
    saved, shown = record("evaluators", *flags)
    measured = saved["measurements"]
    assert list(measured) == ["evaluator.py", *found] and len(shown) == len(measured)
    assert len(missing) == 3 - len(found) and all("left out: pip install" in line for line in missing)
    for figures in measured.values():
        assert figures["seconds"][0] > 0 and figures["distance_seconds"][0] > 0 and figures["distance"] > 0
    if "torch-fidelity" in found:
        assert 0 < measured["torch-fidelity"]["features_apart"] < 1e-5


@pytest.mark.parametrize(
    "features, distance, fault",
    [
        (1.000001, 7.000001, None),
        (1.0001, 7, "features of torch-fidelity"),
        (1, 7.001, "distance"),
        (np.nan, 7, "feat"),
    ],
)
def test_evaluators_take_turns_and_must_agree(features, distance, fault, monkeypatch, record):
    launched = []

    def run_alone(function, *args):
        if function is evaluators.measure_distances:
            values = {"evaluator.py": (7.0, [1, 2, 3]), "torch-fidelity": (distance, [2, 6, 12])}
            return {name: {"distance": value, "distance_seconds": some} for name, (value, some) in values.items()}
        if function is inception_v3:
            return "random.pb"
        launched.append(args[0])
        ours = args[0] == "evaluator.py"
        return len(launched) * (1 if ours else 2), np.full((2, 9), 1.0 if ours else features)  # 1, 4, 3, 8, 5, 12

    monkeypatch.setattr(common, "run_alone", run_alone)
    monkeypatch.setattr(evaluators, "installed", lambda: ["torch-fidelity"])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0")
    if fault:
        with pytest.raises(RuntimeError, match=fault):
            record("evaluators", "--device", "cpu")
    else:
        _, shown = record("evaluators", "--device", "cpu")
        # Medians of 4, 8/3 and 12/5, and of 2, 3 and 4; 128 images in 8 seconds.
        assert "| torch-fidelity 0 | 256 | 16 | 2.67 | 1.0e-06 | 6 | 3.00 |" in shown[1]
    assert launched == ["evaluator.py", "torch-fidelity"] * 3


@pytest.mark.slow
def test_both_fids_agree_and_distances_are_never_held_whole(record):
    saved, shown = record("metrics_speed", "--reference", 3000, "--sample", 12000, "--features", 64, "--repeats", 2)
    measured = saved["measurements"]
    assert [len(figures["seconds"]) for figures in measured.values()] == [2, 2, 1, 1]
    assert measured["eigh"]["fid"] == pytest.approx(measured["sqrtm"]["fid"], rel=1e-6) and measured["eigh"]["fid"] > 0
    for dtype in ("fp16", "fp32"):
        # All distances of 12,000 points to each other are 576 MB in float32, their features 3 MB.
        assert (
            0 < measured[dtype]["base_bytes"] <= measured[dtype]["peak_bytes"] < measured[dtype]["base_bytes"] + 200e6
        )
        assert 0.1 < measured[dtype]["precision"] < 1 and 0.1 < measured[dtype]["recall"] < 1
    assert [line.split(" | ")[1] for line in shown] == list(WAYS.values())
