"""The benchmark of assembling: what it records, the memory of both ways, and what it leaves behind."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import assert_refused, call, run

from benchmarks import assembly

PROGRAM = "benchmarks/assembly.py"
SMALL = ["--images", 96, "--original-images", 40, "--image-size", 16, "--shard", 7]


@pytest.mark.slow
def test_the_original_holds_all_images_twice_and_ours_a_few(tmp_path):
    # 9,000 images of 64 pixels are 111 MB.
    flags = ["--images", 96, "--original-images", 9000, "--image-size", 64, "--shard", 500, "--record", "r.json"]
    result = run(PROGRAM, *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert os.listdir(tmp_path) == ["r.json"]  # no folder is left
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["flags"] == {"images": 96, "original_images": 9000, "image_size": 64, "shard": 500}
    measured, above = saved["measurements"], {}
    assert [figures["images"] for figures in measured.values()] == [9000, 9000, 96]
    for name, figures in measured.items():
        above[name] = figures["peak_bytes"] - figures["base_bytes"]
        pixels = figures["images"] * 64 * 64 * 3
        assert pixels < figures["npz_bytes"] < pixels + figures["images"] * 8 + 2000
        # Python and NumPy take 40 MB; torch would add 150. The peak of the parent process is inherited.
        assert 0 < figures["base_bytes"] < 120e6
    array = 9000 * 64 * 64 * 3
    assert 1.8 * array < above["original"] < 3 * array and above["ours_as_many"] < array / 4


def test_both_ways_write_the_images_of_the_shards(tmp_path):
    assembly.write_shards(tmp_path, 23, 8, 5)
    shards = [np.load(path) for path in sorted((tmp_path / "set" / "shards").glob("*.npz"))]
    assert [len(shard["images"]) for shard in shards] == [5, 5, 5, 5, 3]
    images, labels = (np.concatenate([shard[name] for shard in shards]) for name in ("images", "labels"))
    assert images.shape == (23, 8, 8, 3) and labels.tolist() == list(range(23))
    assert len({image.tobytes() for image in images}) == 23
    for original, name in ((True, "original.npz"), (False, "set.npz")):
        figures, arrays = assembly.assemble(original, tmp_path, 23, 8), np.load(tmp_path / name)
        assert np.array_equal(arrays["arr_0"], images) and np.array_equal(arrays["labels"], labels)
        assert figures["npz_bytes"] == os.path.getsize(tmp_path / name)
    assert not (tmp_path / "set").exists()
    assert assembly.contents(tmp_path / "original.npz") == assembly.contents(tmp_path / "set.npz")


@pytest.mark.parametrize(
    "flags, gigabytes",
    # Two copies of the large set; the small set exists as shards and as two files.
    [(["--images", 50000], "19.7"), (["--images", 1, "--original-images", 40000], "23.6")],
)
def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(flags, gigabytes, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(assembly.shutil, "disk_usage", lambda folder: SimpleNamespace(free=19_000_000_000))
    result = call(PROGRAM, *flags, "--work", tmp_path, capfd=capfd)
    assert_refused(result, "19.0 GB free", f"{gigabytes} GB")
    assert os.listdir(tmp_path) == []
