"""The benchmark of what lower precision and compiling change in the images of the shipped model."""

import json

import pytest
import torch
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


def test_a_known_difference_is_reported(monkeypatch, tmp_path, capfd):
    """Images of grey 100; in the second way one of three values is higher by 3, and the latents by a quarter."""
    plain = torch.ones(2, 4, 8, 8), torch.full((2, 32, 32, 3), 100, dtype=torch.uint8)
    other = 1.25 * plain[0], plain[1] + torch.tensor([3, 0, 0], dtype=torch.uint8)
    samples = iter([plain, plain, other, other])
    monkeypatch.setattr(precision, "ways", lambda device: [("fp32", False, False)] * 2)
    monkeypatch.setattr(precision, "sample", lambda *_: next(samples))
    record = tmp_path / "r.json"
    result = call("benchmarks/precision.py", "--images", 2, "--device", "cpu", "--record", record, capfd=capfd)
    assert result.returncode == 0, result.stderr
    row = json.loads(record.read_text())["rows"][2]
    assert row["error"] == 0.25 and row["grey_levels"] == 3 and row["differing"] == pytest.approx(1 / 3)
    assert row["psnr_db"] == pytest.approx(43.36, abs=0.01)  # 10 log10(255**2 / 3)
