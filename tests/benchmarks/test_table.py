"""The table of speed and quality: its rows, what it leaves and takes up again, and what it prints."""

import hashlib
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_refused, call
from PIL import Image

from benchmarks import table
from benchmarks.table import Row
from evaluation.graph_file import FLOAT, GraphWriter
from router import Router

STEPS = 4
# Of a network that judges: 1x1 pixels to eight features, and five classes of their means.
KERNEL = np.random.default_rng(1).standard_normal((1, 1, 3, 8)) / 100
WEIGHTS = np.random.default_rng(2).standard_normal((8, 5))


def test_the_rows_are_those_of_the_plan():
    assert [row.name for row in table.ROWS] == (
        "ddim-50 router-50 random-50 first-50 last-50 fora2-50 fora3-50 ddim-40 ddim-38 "
        "ddim-20 router-20 random-20 first-20 last-20 fora2-20 fora3-20 ddim-16 ddim-15 ddim-10"
    ).split()
    assert {row.name for row in table.ROWS if row.seeds == (0, 1, 2)} == {
        "ddim-50",
        "router-50",
        "ddim-20",
        "router-20",
    }
    assert all(row.seeds in ((0,), (0, 1, 2)) for row in table.ROWS)


@pytest.mark.parametrize("steps, reused, fora2, fora3", [(20, 186, 10, 13), (50, 555, 25, 33)])
def test_policies_reuse_as_many_layers_as_the_router_and_fora_whole_steps(steps, reused, fora2, fora3):
    def count(method):
        rows = table.plan(Row(method, steps), 12).rows()
        assert len(rows) == steps and all(len(row) == 12 for row in rows)
        return sum(not runs for row in rows for block in row for runs in block)

    assert count("ddim") == 0
    assert [count(method) for method in ("router", "random", "first", "last")] == [reused] * 4
    assert [count(method) for method in ("fora2", "fora3")] == [24 * fora2, 24 * fora3]
    first, last = (table.plan(Row(method, steps), 12).compute for method in ("first", "last"))
    assert first[:, 11].all() or steps == 50  # a block more where the router leaves hardly any
    assert (~first[:, 0]).sum() == (~last[:, 11]).sum() == 2 * (steps // 2)


def test_sets_are_made_by_these_command_lines():
    """They are those of sets that were made before."""
    common = "--ckpt ckpt/fashion_mnist --ddim-sample --num-fid-samples 5000 --balanced-labels --per-proc-batch-size 50"
    common += " --sample-dir samples/table --num-sampling-steps "
    args = table.parse_args([])
    for row, more in (
        (Row("ddim", 38), "38"),
        (
            Row("router", 20),
            "20 --accelerate-method dynamiclayer --path ckpt/fashion_mnist/DDIM20_router.pt --thres 0.1",
        ),
        (Row("fora2", 50), "50 --accelerate-method schedule --path samples/table/schedules/fora2-50.pt"),
    ):
        assert " ".join(table.sampling_flags(row, args)) == common + more


def test_other_counts_of_images_go_elsewhere():
    args, trial = table.parse_args([]), table.parse_args(["--samples", "60"])
    assert (args.folder, args.results) == ("samples/table", ROOT / "benchmarks" / "results" / "table")
    assert args.picture == ROOT / "assets" / "table.png"
    assert trial.folder == "samples/table-60"
    assert all(ROOT / trial.folder in path.parents for path in (trial.results, trial.picture))


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
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "reference.npz", arr_0=images)
    monkeypatch.setattr(table, "MODEL", str(folder))
    monkeypatch.setattr(table, "FOLDER", str(tmp_path / "samples"))
    judges = {"reference": f"{folder}/reference.npz", "graph": f"{folder}/classifier.pb"}
    monkeypatch.setattr(table, "JUDGES", judges)
    monkeypatch.setattr(table, "THRESHOLD", 0.5)
    monkeypatch.setattr(table, "WITH_ROUTER", (STEPS,))
    rows = tuple(Row(method, STEPS) for method in ("ddim", "router", "first", "fora2")) + (Row("ddim", 3),)
    monkeypatch.setattr(table, "ROWS", rows)
    monkeypatch.setattr(table, "REPEATS", 2)
    monkeypatch.setattr(table, "BATCH", 6)
    return tmp_path


def judged(row, seed):
    """Made-up figures of a row and seed."""
    metrics = {"inception_score": 5.0, "fid": row.steps + seed / 10, "sfid": 2.0, "precision": 0.5, "recall": 0.25}
    return {"images": 12, "sha256": "ab", "metrics": metrics, "class_accuracy": 0.75}


@pytest.fixture
def stubs(small, monkeypatch):
    """Neither samples nor judges; a list of what would have been, to be emptied."""
    made = []
    monkeypatch.setattr(table, "sample", lambda row, seed, args: made.append((row.name, seed)) or (row, seed))
    monkeypatch.setattr(table, "judge", lambda pair: judged(*pair))
    return made


def fill(*flags, capfd):
    """Runs the program with 12 images; what it printed."""
    result = call("table.py", "--samples", 12, "--processes", 1, *flags, capfd=capfd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_what_is_there_is_not_made_again(stubs, small, capfd):
    results = small / "samples-12" / "results"
    out = fill("--table", capfd=capfd)
    assert not stubs and not (small / "samples-12").exists()
    assert "Missing: ddim-4 (seed 0, 1, 2); router-4 (seed 0, 1, 2); first-4 (seed 0); fora2-4 (seed 0)" in out
    assert "the times of ddim-4, router-4, first-4, fora2-4, ddim-3" in out

    out = fill("--rows", "first-4,router-4", capfd=capfd)
    assert stubs == [("router-4", 0), ("first-4", 0), ("router-4", 1), ("router-4", 2)]
    assert sorted(path.name for path in results.iterdir()) == ["first-4.json", "router-4.json"]
    assert "Missing: ddim-4 (seed 0, 1, 2); fora2-4 (seed 0); ddim-3 (seed 0); the times of" in out
    stubs.clear()

    out = fill(capfd=capfd)
    assert stubs == [("ddim-4", 0), ("fora2-4", 0), ("ddim-3", 0), ("ddim-4", 1), ("ddim-4", 2)]
    assert "Missing" not in out and (results / "timing.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in results.iterdir()}
    assert len(before) == 6
    stubs.clear()

    fill(capfd=capfd)
    assert not stubs and before == {path.name: path.stat().st_mtime_ns for path in results.iterdir()}
    assert "fora2-4.json" in before

    # One seed is lost, one row was made with other flags.
    record = json.loads((results / "ddim-4.json").read_text())
    assert list(record["seeds"]) == ["0", "1", "2"] and record["seeds"]["1"] == judged(Row("ddim", 4), 1)
    del record["seeds"]["1"]
    (results / "ddim-4.json").write_text(json.dumps(record))
    other = json.loads((results / "first-4.json").read_text())
    other["flags"]["sample_ddp"][-1] = "elsewhere.pt"
    (results / "first-4.json").write_text(json.dumps(other))
    fill(capfd=capfd)
    assert stubs == [("first-4", 0), ("ddim-4", 1)]
    assert list(json.loads((results / "ddim-4.json").read_text())["seeds"]) == ["0", "1", "2"]
    stubs.clear()

    # The router was trained again: it and what follows its share are others.
    Router(STEPS, 3, torch.Generator().manual_seed(7)).save(small / "tiny" / "DDIM4_router.pt")
    fill(capfd=capfd)
    assert stubs == [("router-4", 0), ("first-4", 0), ("router-4", 1), ("router-4", 2)]
    stubs.clear()

    # Another reference: all are judged again.
    np.savez(small / "tiny" / "reference.npz", arr_0=np.zeros((9, 8, 8, 3), np.uint8))
    fill(capfd=capfd)
    assert len(stubs) == 9


def test_the_times_are_measured_again_when_asked(stubs, small, capfd):
    timing = small / "samples-12" / "results" / "timing.json"
    fill("--rows", "ddim-3", capfd=capfd)
    assert not timing.exists()
    fill("--rows", "ddim-3", "--timing", capfd=capfd)
    record = json.loads(timing.read_text())
    assert list(record["rows"]) == ["ddim-4", "router-4", "first-4", "fora2-4", "ddim-3"]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in record["rows"].values())
    assert (record["batch"], record["cfg_scale"], record["torch"]) == (6, 2.0, torch.__version__)
    assert record["rows"]["ddim-4"]["speedup"] == 1
    pairs = zip(record["rows"]["ddim-4"]["seconds"], record["rows"]["fora2-4"]["seconds"])
    assert record["rows"]["fora2-4"]["speedup"] == pytest.approx(np.median([plain / fora for plain, fora in pairs]))
    assert [name for name, _ in stubs] == ["ddim-3"]


def test_a_row_is_sampled_and_judged_by_the_programs(small, capfd):
    """One row with all that is real: a schedule file, torchrun, the evaluator, which fails at first."""
    folder, reference = small / "samples-12", small / "tiny" / "reference.npz"
    content = reference.read_bytes()
    reference.write_bytes(b"damaged")
    result = call("table.py", "--samples", 12, "--processes", 1, "--rows", "fora2-4", capfd=capfd)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    assert "reference.npz" in lines[-2] and lines[-1].startswith("table.py: error: evaluator.py failed, see above")
    assert "12 images in" in result.stdout and not (folder / "results").exists()

    reference.write_bytes(content)
    out = fill("--rows", "fora2-4", capfd=capfd)
    assert "is there already, complete" in out
    (npz,) = folder.glob("*.npz")
    with np.load(npz) as arrays:
        images, labels, manifest = arrays["arr_0"], arrays["labels"], json.loads(str(arrays["manifest"]))
    assert images.shape == (12, 8, 8, 3) and labels.tolist() == [k % 5 for k in range(12)]
    # Step 3 is executed first, in full, as step 1 is.
    cells = bytes([i % 2 for i in range(4) for _ in range(6)])
    assert manifest["schedule"] == hashlib.sha256(cells).hexdigest()
    record = json.loads((folder / "results" / "fora2-4.json").read_text())
    assert record["schedule"]["sha256"] == manifest["schedule"]
    assert (record["schedule"]["layers"], record["schedule"]["layers_run"]) == (24, 12)
    (result,) = record["seeds"].values()
    assert (result["images"], result["sha256"]) == (12, hashlib.sha256(images.tobytes()).hexdigest())
    assert set(result["metrics"]) == {"inception_score", "fid", "sfid", "precision", "recall"}
    assert f"FID: {result['metrics']['fid']:.6g}" in out

    guesses = (np.maximum(images @ KERNEL[0, 0], 0).mean((1, 2)) @ WEIGHTS).argmax(1)
    assert result["class_accuracy"] == pytest.approx((guesses == labels).mean())


def test_a_missing_judge_is_said_at_once(stubs, small, capfd):
    (small / "tiny" / "classifier.pb").unlink()
    assert_refused(
        call("table.py", "--samples", "12", "--rows", "ddim-3", capfd=capfd), "no such file", "classifier.pb"
    )
    assert not stubs


@pytest.mark.parametrize(
    "flags, words", [(["--rows", "ddim-50,x"], "'x' is none of"), (["--samples", "0"], "--samples")]
)
def test_wrong_flags_are_refused_in_one_line(flags, words, capfd):
    assert_refused(call("table.py", *flags, capfd=capfd), words)


def test_the_tables_and_the_picture(small, monkeypatch, capfd):
    """Of records by hand: the first seed, the spread of the FID over all, what is not there."""
    results = small / "samples-12" / "results"
    results.mkdir(parents=True)

    def write(name, layers_run, bound, *scores, **more):
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
    head = "| method | steps | layers run | G multiply-adds | seconds a batch | speed-up | bound "
    head += "| IS | FID | sFID | precision | recall | class accuracy |"
    # The deviation of 1, 2 and 6: the root of (4 + 1 + 9) / 2.
    plain = "| DDIM | 4 | 100.0% | 1.500 | 3.00 | 1.000 | 1.000 "
    plain += "| 9.000 | 1.000 ± 2.646 | 3.000 | 0.5000 | 0.2500 | 90.00% |"
    router = "| router | 4 | 61.3% | 1.500 | 2.00 | 1.414 | 1.599 | 8.000 | 12.346 | 3.000 | 0.5000 | 0.2500 | 90.00% |"
    first = "| first blocks | 4 | 61.3% | 1.500 |  |  | 1.600 | 7.000 | 30.000 | 3.000 | 0.5000 | 0.2500 | 10.00% |"
    lines = [line for line in out.splitlines() if line.startswith("|") and "---" not in line]
    assert lines == [head, plain, router, head, plain, router, first]
    assert "Missing: router-4 (seed 1, 2); fora2-4 (seed 0); ddim-3 (seed 0); the times of first-4, " in out
    assert Image.open(small / "samples-12" / "table.png").format == "PNG"


def test_what_is_committed_is_what_the_readmes_say():
    args = table.parse_args([])
    records = {row: table.read(args.results / f"{row.name}.json") for row in table.ROWS}
    records = {row: record for row, record in records.items() if record}
    if not records:
        pytest.skip("no row is committed yet")
    told = (ROOT / "README.md").read_text() + (ROOT / "benchmarks" / "README.md").read_text()
    for text in table.tables(records, table.read(args.results / "timing.json")).values():
        assert text in told
    assert all(
        re.fullmatch(r"[0-9a-f]{64}", r["sha256"]) for record in records.values() for r in record["seeds"].values()
    )
