"""The benchmark of what lower precision and compiling change in the images of the shipped model."""

import json

import torch
from conftest import call

from benchmarks import common, precision


def test_a_record_compares_each_way_with_plain_float32(tmp_path, monkeypatch, capfd):
    ways = [("fp32", False, False), ("fp32", False, True), ("bf16", False, False)]
    monkeypatch.setattr(precision, "ways", lambda device: ways)
    record = tmp_path / "precision-tiny.json"
    result = call("precision.py", "--images", 10, "--device", "cpu", "--record", record, capfd=capfd)
    assert result.returncode == 0, result.stderr
    rows = json.loads(record.read_text())["rows"]
    assert [(row["dtype"], row["compiled"], row["recorded"]) for row in rows] == [way for way in ways for _ in range(2)]
    assert [row["schedule"] for row in rows] == ["full", "router"] * 3
    for row in rows[:4]:  # a CPU records nothing, and runs the same
        assert (row["error"], row["psnr_db"], row["grey_levels"], row["differing"]) == (0, None, 0, 0)
    for row in rows[4:]:
        assert 0 < row["error"] < 0.1 and 25 < row["psnr_db"] < 70 and 0 < row["differing"] < 1
    assert all(row["class_accuracy"] > 0.8 for row in rows)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    printed = call("precision.py", "--table", capfd=capfd).stdout
    assert printed.strip() == result.stdout.split("Record:")[0].strip() and len(printed.splitlines()) == 2 + len(rows)


def test_a_known_difference_is_told(monkeypatch, tmp_path, capfd):
    """One way has images of grey 100, the other has one of three values higher by 3."""
    images = iter([torch.full((2, 32, 32, 3), 100, dtype=torch.uint8)] * 2)
    other = torch.full((2, 32, 32, 3), 100, dtype=torch.uint8)
    other[..., 0] += 3
    sets = [*images, other, other]
    latents = iter([torch.ones(2, 4, 8, 8)] * 2 + [torch.full((2, 4, 8, 8), 1.25)] * 2)
    monkeypatch.setattr(precision, "ways", lambda device: [("fp32", False, False)] * 2)
    monkeypatch.setattr(precision, "sample", lambda *_: (next(latents), sets.pop(0)))
    record = tmp_path / "r.json"
    assert call("precision.py", "--images", 2, "--device", "cpu", "--record", record, capfd=capfd).returncode == 0
    row = json.loads(record.read_text())["rows"][2]
    assert row["error"] == 0.25 and row["grey_levels"] == 3 and abs(row["differing"] - 1 / 3) < 1e-6
    assert abs(row["psnr_db"] - 43.36) < 0.01  # 10 log10(255**2 / 3)
