"""The benchmark of the metrics, at small sizes."""

import json

import pytest
from conftest import run

from benchmarks.metrics_speed import WAYS


@pytest.mark.slow
def test_a_record_holds_what_was_measured_and_distances_are_never_held_whole(tmp_path):
    flags = ["--reference", 3000, "--sample", 12000, "--features", 64, "--repeats", 2, "--record", "r.json"]
    result = run("benchmarks/metrics_speed.py", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    measured = json.loads((tmp_path / "r.json").read_text())["measurements"]
    assert list(measured) == list(WAYS)
    assert [len(figures["seconds"]) for figures in measured.values()] == [2, 2, 1, 1]
    assert measured["eigh"]["fid"] == pytest.approx(measured["sqrtm"]["fid"], rel=1e-6) and measured["eigh"]["fid"] > 0
    for dtype in ("fp16", "fp32"):
        # All distances of 12,000 points to each other are 576 MB in float32, their features 3 MB.
        assert (
            0 < measured[dtype]["base_bytes"] <= measured[dtype]["peak_bytes"] < measured[dtype]["base_bytes"] + 200e6
        )
        assert 0.1 < measured[dtype]["precision"] < 1 and 0.1 < measured[dtype]["recall"] < 1
    assert [line.split(" | ")[1] for line in result.stdout.splitlines()[2:6]] == list(WAYS.values())
