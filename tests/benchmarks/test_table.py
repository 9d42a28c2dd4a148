"""The table of speed and quality: its rows, what it makes again, and what it prints of it."""

import hashlib
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, call
from PIL import Image

from benchmarks import table
from benchmarks.table import Row
from pretrained.loading import load_dit
from pretrained.spec import model_spec
from router import Router

STEPS = 4


@pytest.mark.parametrize("steps, reused, fora2, fora3", [(20, 186, 10, 13), (50, 555, 25, 33)])
def test_policies_reuse_as_many_layers_as_the_router_and_fora_whole_steps(steps, reused, fora2, fora3):
    methods = [method for method in table.METHODS if method not in table.SETTINGS]
    plans = {method: table.plan(Row(method, steps), SimpleNamespace(depth=12)).compute for method in methods}
    counts = {method: int((~compute).sum()) for method, compute in plans.items() if "-f" not in method}
    expected = dict.fromkeys(("router", "random", "first", "last"), reused)
    assert counts == expected | {"ddim": 0, "fora2": 24 * fora2, "fora3": 24 * fora3}
    for method, order in (("router", 2), ("fora2", 1), ("fora2", 2), ("fora3", 1), ("fora3", 2)):
        forecast = table.plan(Row(f"{method}-f{order}", steps), SimpleNamespace(depth=12))
        assert forecast.order == order and torch.equal(forecast.compute, plans[method])
    assert (~plans["first"][:, 0]).sum() == (~plans["last"][:, 11]).sum() == 2 * (steps // 2)


def test_the_committed_records_are_complete_and_made_by_todays_flags_and_plans():
    args = table.parse_args([])
    timing = table.read(args.results / "timing.json")
    records = {row: table.read(args.results / f"{row.name}.json") for row in table.ROWS}
    assert table.missing(records, timing) == []
    dit = load_dit(model_spec(ckpt=str(ROOT / table.MODEL)), "cpu")
    for row, record in records.items():
        assert record["flags"]["sample_ddp"] == table.sampling_flags(row, args.folder, args.samples)
        assert record["schedule"]["sha256"] == table.plan(row, dit).sha256()
    shown = (ROOT / "docs" / "results.md").read_text()
    assert all(line in shown for text in table.tables(records, timing).values() for line in text.splitlines())


@pytest.fixture
def small(model_folder, tmp_path, monkeypatch):
    """The table of a tiny model with four steps, and a router for them: five rows, 12 images each."""
    folder = tmp_path / "tiny"
    shutil.copytree(model_folder, folder)
    shutil.copy(folder / "router4.pt", folder / "DDIM4_router.pt")
    np.savez(folder / "reference.npz", arr_0=np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8))
    rows = tuple(Row(method, STEPS) for method in ("ddim", "router", "first", "fora2")) + (Row("ddim", 3),)
    judges = {"reference": f"{folder}/reference.npz", "graph": f"{ROOT}/ckpt/fashion_mnist/classifier.pb"}
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
    assert re.search(r"^\| first blocks \| 4 \| [\d.]+% \| [\d.]+ \|  \|  \|", out, re.M)  # without times
    assert "Missing: ddim-4 (seed 0, 1, 2); fora2-4 (seed 0); ddim-3 (seed 0); the times of" in out
    rows, out = fills()
    assert rows == [("ddim-4", 0), ("fora2-4", 0), ("ddim-3", 0), ("ddim-4", 1), ("ddim-4", 2)]
    assert "Missing" not in out and Image.open(small / "samples-12" / "table.png").format == "PNG"
    # The first seed, with the deviation of the FIDs 4, 4.1 and 4.2.
    assert "| DDIM | 4 | 100.0% |" in out and " | 5.000 | 4.000 ± 0.100 | 2.000 | 0.5000 | 0.2500 | 75.00% |" in out
    assert fills()[0] == []
    # One seed is lost.
    record = json.loads((results / "ddim-4.json").read_text())
    assert {seed: row["metrics"]["fid"] for seed, row in record["seeds"].items()} == {"0": 4.0, "1": 4.1, "2": 4.2}
    del record["seeds"]["1"]
    (results / "ddim-4.json").write_text(json.dumps(record))
    assert fills()[0] == [("ddim-4", 1)]
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
    assert 0 <= result["class_accuracy"] <= 1
