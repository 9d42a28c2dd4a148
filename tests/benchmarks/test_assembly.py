"""The benchmark of assembling: what both ways write, their memory, and what is left behind."""

import json
import os

import numpy as np
import pytest
from conftest import run

from benchmarks import assembly


@pytest.mark.slow
def test_the_original_holds_all_images_twice_and_ours_a_few(tmp_path):
    # 9,000 images of 64 pixels are 111 MB.
    flags = ["--images", 96, "--original-images", 9000, "--image-size", 64, "--shard", 500, "--record", "r.json"]
    result = run("benchmarks/assembly.py", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert os.listdir(tmp_path) == ["r.json"]  # no folder is left
    measured = json.loads((tmp_path / "r.json").read_text())["measurements"]
    assert [figures["images"] for figures in measured.values()] == [9000, 9000, 96]
    above = {name: figures["peak_bytes"] - figures["base_bytes"] for name, figures in measured.items()}
    # Python and NumPy take 40 MB; torch would add 150.
    assert all(0 < figures["base_bytes"] < 120e6 for figures in measured.values())
    array = 9000 * 64 * 64 * 3
    assert 1.8 * array < above["original"] < 3 * array and above["ours_as_many"] < array / 4


def test_both_ways_write_the_images_of_the_shards(tmp_path):
    assembly.write_shards(tmp_path, 23, 8, 5)
    shards = [np.load(path) for path in sorted((tmp_path / "set" / "shards").glob("*.npz"))]
    images, labels = (np.concatenate([shard[name] for shard in shards]) for name in ("images", "labels"))
    assert len(shards) == 5 and images.shape == (23, 8, 8, 3) and labels.tolist() == list(range(23))
    assert len({image.tobytes() for image in images}) == 23
    for original, name in ((True, "original.npz"), (False, "set.npz")):
        figures, arrays = assembly.assemble(original, tmp_path, 23, 8), np.load(tmp_path / name)
        assert np.array_equal(arrays["arr_0"], images) and np.array_equal(arrays["labels"], labels)
        assert figures["npz_bytes"] == os.path.getsize(tmp_path / name)
    assert not (tmp_path / "set").exists()
    assert assembly.contents(tmp_path / "original.npz") == assembly.contents(tmp_path / "set.npz")
