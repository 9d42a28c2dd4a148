"""The benchmark of the metrics, at small sizes."""

import json
import os

import pytest
from conftest import run

from benchmarks import common, metrics_speed


@pytest.mark.slow
def test_a_record_holds_what_was_measured(tmp_path):
    flags = ["--reference", 300, "--sample", 400, "--features", 64, "--repeats", 2, "--record", "metrics-small.json"]
    result = run("benchmarks/metrics_speed.py", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert os.listdir(tmp_path) == ["metrics-small.json"]
    saved = json.loads((tmp_path / "metrics-small.json").read_text())
    measured = saved["measurements"]
    assert list(measured) == list(metrics_speed.WAYS)
    assert [len(figures["seconds"]) for figures in measured.values()] == [2, 2, 1, 1]
    assert measured["eigh"]["fid"] == pytest.approx(measured["sqrtm"]["fid"], rel=1e-6) and measured["eigh"]["fid"] > 0
    for dtype in ("fp16", "fp32"):
        assert 0 < measured[dtype]["base_bytes"] <= measured[dtype]["peak_bytes"]
        assert 0.1 < measured[dtype]["precision"] < 1 and 0.1 < measured[dtype]["recall"] < 1
    assert saved["flags"] == {"reference": 300, "sample": 400, "features": 64, "repeats": 2}
    assert [line.split(" | ")[1] for line in result.stdout.splitlines()[2:6]] == list(metrics_speed.WAYS.values())


def test_distances_are_never_held_whole():
    # All distances of 12,000 points to each other are 576 MB in float32, their features 3 MB.
    figures = common.run_alone(metrics_speed.measure_precision_recall, "fp32", 3000, 12000, 64)
    assert figures["peak_bytes"] - figures["base_bytes"] < 200e6
