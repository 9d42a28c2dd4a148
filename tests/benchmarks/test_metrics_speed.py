"""The benchmark of the metrics: what it measures, records and prints, at small sizes."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT, assert_refused, call, run

from benchmarks import common, metrics_speed
from evaluation import metrics

PROGRAM = "benchmarks/metrics_speed.py"


def test_a_record_holds_what_was_measured_and_the_table_reads_it(tmp_path, monkeypatch, capsys):
    result = run(PROGRAM, "--quick", "--sample", 400, "--repeats", 2, "--record", "metrics-small.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert os.listdir(tmp_path) == ["metrics-small.json"]
    saved = json.loads((tmp_path / "metrics-small.json").read_text())
    measured = saved["measurements"]
    assert list(measured) == list(metrics_speed.WAYS)
    assert [len(figures["seconds"]) for figures in measured.values()] == [2, 2, 1, 1]
    assert all(0 < seconds < 60 for figures in measured.values() for seconds in figures["seconds"])
    assert measured["eigh"]["fid"] == pytest.approx(measured["sqrtm"]["fid"], rel=1e-6) and measured["eigh"]["fid"] > 0
    for dtype in ("fp16", "fp32"):
        assert 0 < measured[dtype]["base_bytes"] <= measured[dtype]["peak_bytes"]
        assert 0.1 < measured[dtype]["precision"] < 1 and 0.1 < measured[dtype]["recall"] < 1
    assert saved["flags"] == {"reference": 300, "sample": 400, "features": 64, "repeats": 2}
    assert torch.backends.cpu.get_cpu_capability() in saved["device"] and saved["torch"] == torch.__version__

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    (tmp_path / "assembly-other.json").write_text("{}")
    metrics_speed.main(metrics_speed.parse_args(["--table"]))
    printed = capsys.readouterr().out
    assert printed.strip() == "\n".join(line for line in result.stdout.splitlines() if line.startswith("|"))
    assert [line.split(" | ")[1] for line in printed.splitlines()[2:]] == list(metrics_speed.WAYS.values())


def test_the_table_has_the_figures_of_a_record():
    memory = {"base_bytes": 700_000_000, "peak_bytes": 1_000_400_000}
    record = {
        "flags": {"reference": 10000, "sample": 50000, "features": 2048},
        "device": "a processor",
        "measurements": {
            "eigh": {"seconds": [11, 13, 12.04], "fid": 3.25},
            "fp16": {"seconds": [61.3], **memory, "precision": 0.82651, "recall": 0.5309},
        },
    }
    rows = metrics_speed.table([record]).splitlines()
    assert rows[2] == "| a processor | FID: eigenvalues (metrics.py) | 2,048 | 12 |  |  | 3.25 |"
    way, size = "precision and recall, float16 distances", "10,000 x 50,000, 2,048"
    assert rows[3] == f"| a processor | {way} | {size} | 61.3 | 1,000 | 300 | 0.8265, 0.5309 |"
    assert len({line.count("|") for line in rows}) == 1


def test_distances_are_never_held_whole():
    # All distances of 12,000 points to each other are 576 MB in float32, and of features there are 3 MB.
    program = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import metrics_speed as speed, json; "
    program += "print(json.dumps([speed.alone(speed.measure_precision_recall, dtype, 3000, 12000, 64) "
    program += "for dtype in ('fp16', 'fp32')]))"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    for figures in json.loads(result.stdout):
        assert figures["peak_bytes"] - figures["base_bytes"] < 200e6


def test_ways_that_disagree_are_an_error(monkeypatch, capsys):
    monkeypatch.setattr(metrics_speed, "alone", lambda function, *args: {"eigh": {"fid": 1.0}, "sqrtm": {"fid": 1.001}})
    with pytest.raises(RuntimeError, match="1.0 from eigenvalues, 1.001"):
        metrics_speed.main(metrics_speed.parse_args(["--quick"]))
    assert capsys.readouterr().out == ""


def test_smaller_blocks_for_want_of_memory_are_no_measurement(monkeypatch):
    def little(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(metrics, "_squared_distances", little)
    with warnings.catch_warnings(), pytest.raises(MemoryError):
        metrics_speed.measure_precision_recall("fp32", 9, 9, 2)


def test_sizes_that_are_given_come_before_those_of_quick():
    sizes = {tuple(vars(metrics_speed.parse_args(flags)).values())[:3] for flags in ([], ["--quick"])}
    assert sizes == {(10000, 50000, 2048), (300, 500, 64)}
    assert metrics_speed.parse_args(["--quick", "--features", "9"]).features == 9


@pytest.mark.parametrize("flags, words", [(["--record", "r.txt"], ".json"), (["--features", 0], "0")])
def test_what_cannot_be_measured_is_refused(flags, words, capfd):
    assert_refused(call("metrics_speed.py", *flags, capfd=capfd), words)
