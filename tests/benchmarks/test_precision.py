"""The benchmark of what lower precision and compiling change in the images of the shipped model."""

import json

import pytest
from conftest import call

from benchmarks import precision


@pytest.mark.slow
def test_a_record_compares_each_way_with_plain_float32(tmp_path, monkeypatch, capfd):
    ways = [("fp32", False, False), ("fp32", False, True), ("bf16", False, False)]
    monkeypatch.setattr(precision, "ways", lambda device: ways)
    record = tmp_path / "precision-tiny.json"
    result = call("benchmarks/precision.py", "--images", 10, "--device", "cpu", "--record", record, capfd=capfd)
    assert result.returncode == 0, result.stderr
    rows = json.loads(record.read_text())["rows"]
    assert [(row["dtype"], row["compiled"], row["recorded"]) for row in rows] == [way for way in ways for _ in range(2)]
    assert [row["schedule"] for row in rows] == ["full", "router"] * 3
    for row in rows[:4]:  # a CPU captures no CUDA graph, and computes the same
        assert (row["error"], row["psnr_db"], row["grey_levels"], row["differing"]) == (0, None, 0, 0)
    for row in rows[4:]:
        assert 0 < row["error"] < 0.1 and 25 < row["psnr_db"] < 70 and 0 < row["differing"] < 1
    assert all(row["class_accuracy"] > 0.8 for row in rows)
    assert len([line for line in result.stdout.splitlines() if line.startswith("|")]) == 2 + len(rows)
