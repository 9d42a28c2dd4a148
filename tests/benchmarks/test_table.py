"""The table of speed and quality: its rows, what it makes again, and what it prints."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, call
from PIL import Image

from benchmarks import table
from benchmarks.table import Row
from evaluation.graph_file import FLOAT, GraphWriter
from router import Router

STEPS = 4
# A network that judges: 1x1 pixels to eight features, and five classes of their means.
KERNEL = np.random.default_rng(1).standard_normal((1, 1, 3, 8)) / 100
WEIGHTS = np.random.default_rng(2).standard_normal((8, 5))


@pytest.mark.parametrize("steps, reused, fora2, fora3", [(20, 186, 10, 13), (50, 555, 25, 33)])
def test_policies_reuse_as_many_layers_as_the_router_and_fora_whole_steps(steps, reused, fora2, fora3):
    plans = {method: table.plan(Row(method, steps), 12).compute for method in table.METHODS}
    counts = {method: int((~compute).sum()) for method, compute in plans.items()}
    expected = dict.fromkeys(("router", "random", "first", "last"), reused)
    assert counts == expected | {"ddim": 0, "fora2": 24 * fora2, "fora3": 24 * fora3}
    assert (~plans["first"][:, 0]).sum() == (~plans["last"][:, 11]).sum() == 2 * (steps // 2)


def test_the_committed_records_are_complete_and_made_by_todays_flags_and_plans():
    args = table.parse_args([])
    timing = table.read(args.results / "timing.json")
    records = {row: table.read(args.results / f"{row.name}.json") for row in table.ROWS}
    assert table.missing(records, timing) == []
    for row, record in records.items():
        assert record["flags"]["sample_ddp"] == table.sampling_flags(row, args.folder, args.samples)
        assert record["schedule"]["sha256"] == table.plan(row, 12).sha256()
    shown = (ROOT / "docs" / "results.md").read_text()
    assert all(line in shown for text in table.tables(records, timing).values() for line in text.splitlines())


@pytest.fixture
def small(model_folder, tmp_path, monkeypatch):
    """The table of a tiny model with four steps, a router for them and a graph: five rows, 12 images each."""
    folder = tmp_path / "tiny"
    shutil.copytree(model_folder, folder)
    shutil.copy(folder / "router4.pt", folder / "DDIM4_router.pt")
    graph = GraphWriter()
    graph.node("ExpandDims", "Placeholder", dtype={"type": FLOAT})
    x = graph.resize("ExpandDims", 8, 0, 1)  # nothing changes for images of 8 pixels
    graph.convolution("mixed_6/conv", x, KERNEL, *np.zeros((3, 8)), np.ones(8), epsilon=0.0, scaled=False)
    graph.classes(graph.pool("pool_3", "AvgPool", "mixed_6/conv", size=8, padding=b"VALID"), WEIGHTS)
    graph.save(folder / "classifier.pb")
    np.savez(folder / "reference.npz", arr_0=np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8))
    rows = tuple(Row(method, STEPS) for method in ("ddim", "router", "first", "fora2")) + (Row("ddim", 3),)
    judges = {"reference": f"{folder}/reference.npz", "graph": f"{folder}/classifier.pb"}
    settings = {"MODEL": str(folder), "FOLDER": str(tmp_path / "samples"), "JUDGES": judges, "THRESHOLD": 0.5}
    settings |= {"WITH_ROUTER": (STEPS,), "ROWS": rows, "REPEATS": 2, "BATCH": 6}
    for name, value in settings.items():
        monkeypatch.setattr(table, name, value)
    return tmp_path


def fill(*flags, capfd):
    """Run the program with 12 images; returns what it printed."""
    result = call("benchmarks/table.py", "--samples", 12, "--processes", 1, *flags, capfd=capfd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_only_what_is_missing_or_outdated_is_made(small, monkeypatch, capfd):
    results, made = small / "samples-12" / "results", []

    def sample(flags, seed, processes):
        (row,) = (row for row in table.ROWS if table.sampling_flags(row, f"{small}/samples-12", 12) == flags)
        made.append((row.name, seed))
        return row.steps + seed / 10

    def judge(fid):
        metrics = {"inception_score": 5.0, "fid": fid, "sfid": 2.0, "precision": 0.5, "recall": 0.25}
        return {"images": 12, "sha256": "ab", "metrics": metrics, "class_accuracy": 0.75}

    def fills(*flags):
        """The rows and seeds that are made, and what is printed."""
        made.clear()
        out = fill(*flags, capfd=capfd)
        return made.copy(), out

    monkeypatch.setattr(table, "sample", sample)
    monkeypatch.setattr(table, "judge", judge)
    rows, out = fills("--table")
    assert not rows and not (small / "samples-12").exists()
    assert "Missing: ddim-4 (seed 0, 1, 2); router-4 (seed 0, 1, 2); first-4 (seed 0); fora2-4 (seed 0)" in out
    rows, out = fills("--rows", "first-4,router-4")
    routed = [("router-4", 0), ("first-4", 0), ("router-4", 1), ("router-4", 2)]
    assert rows == routed and not (results / "timing.json").exists()
    assert "Missing: ddim-4 (seed 0, 1, 2); fora2-4 (seed 0); ddim-3 (seed 0); the times of" in out
    rows, out = fills()
    assert rows == [("ddim-4", 0), ("fora2-4", 0), ("ddim-3", 0), ("ddim-4", 1), ("ddim-4", 2)]
    assert "Missing" not in out and (results / "timing.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in results.iterdir()}
    assert fills()[0] == [] and before == {path.name: path.stat().st_mtime_ns for path in results.iterdir()}

    # One seed is lost, one row was made with other flags.
    record, other = (json.loads((results / f"{name}.json").read_text()) for name in ("ddim-4", "first-4"))
    assert {seed: row["metrics"]["fid"] for seed, row in record["seeds"].items()} == {"0": 4.0, "1": 4.1, "2": 4.2}
    del record["seeds"]["1"]
    (results / "ddim-4.json").write_text(json.dumps(record))
    other["flags"]["sample_ddp"][-1] = "elsewhere.pt"
    (results / "first-4.json").write_text(json.dumps(other))
    assert fills()[0] == [("first-4", 0), ("ddim-4", 1)]
    assert list(json.loads((results / "ddim-4.json").read_text())["seeds"]) == ["0", "1", "2"]
    # The router was trained again: its row and those that follow its share are outdated.
    Router(STEPS, 3, torch.Generator().manual_seed(7)).save(small / "tiny" / "DDIM4_router.pt")
    assert fills()[0] == routed
    # Another reference: all rows are judged again.
    np.savez(small / "tiny" / "reference.npz", arr_0=np.zeros((9, 8, 8, 3), np.uint8))
    assert len(fills()[0]) == 9


@pytest.mark.slow
def test_a_row_is_sampled_and_judged_by_the_programs(small, capfd):
    """Nothing is stubbed: a schedule file, sample_ddp.py, evaluator.py."""
    fill("--rows", "fora2-4", capfd=capfd)
    (npz,) = (small / "samples-12").glob("*.npz")
    with np.load(npz) as arrays:
        images, labels, manifest = arrays["arr_0"], arrays["labels"], json.loads(str(arrays["manifest"]))
    assert images.shape == (12, 8, 8, 3) and labels.tolist() == [k % 5 for k in range(12)]
    # Step 3 runs first, in full, and so does step 1.
    cells = bytes([i % 2 for i in range(4) for _ in range(6)])
    record = json.loads((small / "samples-12" / "results" / "fora2-4.json").read_text())
    assert record["schedule"]["sha256"] == manifest["schedule"] == hashlib.sha256(cells).hexdigest()
    assert (record["schedule"]["layers"], record["schedule"]["layers_run"]) == (24, 12)
    (result,) = record["seeds"].values()
    assert (result["images"], result["sha256"]) == (12, hashlib.sha256(images.tobytes()).hexdigest())
    assert set(result["metrics"]) == {"inception_score", "fid", "sfid", "precision", "recall"}
    guesses = (np.maximum(images @ KERNEL[0, 0], 0).mean((1, 2)) @ WEIGHTS).argmax(1)
    assert result["class_accuracy"] == pytest.approx((guesses == labels).mean())


def test_the_tables_and_the_picture(small, capfd):
    """Records by hand: the first seed is shown, with the spread of the FID over all seeds."""
    results = small / "samples-12" / "results"
    results.mkdir(parents=True)

    def write(name, layers_run, bound, *scores):
        schedule = {"layers": 480, "layers_run": layers_run, "g_multiply_adds": 1.5, "bound": bound}
        names = ("inception_score", "fid", "sfid", "precision", "recall")
        seeds = {str(k): {"metrics": dict(zip(names, row)), "class_accuracy": row[5]} for k, row in enumerate(scores)}
        (results / f"{name}.json").write_text(json.dumps({"schedule": schedule, "seeds": seeds}))

    write("ddim-4", 480, 1.0, (9, 1, 3, 0.5, 0.25, 0.9), (9, 2, 4, 0.5, 0.25, 0.8), (9, 6, 5, 0.5, 0.25, 0.7))
    write("router-4", 294, 1.599, (8, 12.34567, 3, 0.5, 0.25, 0.9))
    write("first-4", 294, 1.6, (7, 30, 3, 0.5, 0.25, 0.1))
    timing = {"batch": 6, "rows": {"ddim-4": {"seconds": [3.0, 2.0, 9.0], "speedup": 1.0}}}
    timing["rows"]["router-4"] = {"seconds": [2.0, 1.5, 6.0], "speedup": 1.4142}
    (results / "timing.json").write_text(json.dumps(timing))
    out = fill("--table", capfd=capfd)
    # The deviation of 1, 2 and 6: the root of (4 + 1 + 9) / 2.
    plain = "| DDIM | 4 | 100.0% | 1.500 | 3.00 | 1.000 | 1.000 "
    plain += "| 9.000 | 1.000 ± 2.646 | 3.000 | 0.5000 | 0.2500 | 90.00% |"
    router = "| router | 4 | 61.3% | 1.500 | 2.00 | 1.414 | 1.599 | 8.000 | 12.346 | 3.000 | 0.5000 | 0.2500 | 90.00% |"
    first = "| first blocks | 4 | 61.3% | 1.500 |  |  | 1.600 | 7.000 | 30.000 | 3.000 | 0.5000 | 0.2500 | 10.00% |"
    rows = [line for line in out.splitlines() if line.startswith("|") and "---" not in line and "method" not in line]
    assert rows == [plain, router, plain, router, first]
    assert "Missing: router-4 (seed 1, 2); fora2-4 (seed 0); ddim-3 (seed 0); the times of first-4, " in out
    assert Image.open(small / "samples-12" / "table.png").format == "PNG"
