"""The folder of a sample set: what counts as finished, what is refused, what comes out."""

import errno
import fcntl
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from evaluation.sample_set import ROWS, SampleSet
from runtime.errors import UserError
from runtime.files import lock_file

MANIFEST = {"images": 10, "image_size": 4, "seed": 0}
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
LABELS = np.arange(10) * 3


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(SampleSet, "PATIENCE", 0.1)


def sample_set(folder, changes=(), **options):
    return SampleSet(folder, "set", MANIFEST | dict(changes), **options)


def begin(folder, *ranges, **options):
    """An open set of ten images, of which `ranges` are written."""
    samples = sample_set(folder, **options)
    assert samples.open() is False
    fill(samples, *ranges)
    return samples


def fill(samples, *ranges):
    for start, stop in ranges:
        samples.write(start, IMAGES[start:stop], LABELS[start:stop])


def release(samples):
    """What the end of its process does."""
    samples._lock.release()


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_the_set_becomes_one_file_with_images_labels_and_manifest(tmp_path):
    samples = begin(tmp_path / "new" / "folder", (4, 7), (0, 4), (7, 10))
    assert samples.assemble() == hashlib.sha256(IMAGES.tobytes()).hexdigest()
    assert names(tmp_path / "new" / "folder") == ["set.npz"]
    with np.load(samples.npz, allow_pickle=False) as read:
        assert read.files == ["arr_0", "labels", "manifest"]
        assert read["arr_0"].dtype == np.uint8 and np.array_equal(read["arr_0"], IMAGES)
        assert np.array_equal(read["labels"], LABELS)
        assert json.loads(str(read["manifest"])) == MANIFEST
    # A set from before manifests had another key stays valid.
    assert sample_set(samples.npz.parent, {"schedule": None}).open() is True


def test_a_set_that_names_the_version_of_timm_continues(tmp_path):
    """Manifests named it while the DiT was made of timm's layers; ours compute the same bits."""
    samples = begin(tmp_path, (0, 4))
    release(samples)
    path = samples.shards / "manifest.json"
    path.write_text(json.dumps(MANIFEST | {"timm": "1.0.31"}))
    samples = begin(tmp_path)
    assert samples.missing(10) == [(4, 10)]
    release(samples)
    path.write_text(json.dumps(MANIFEST | {"tim": "1.0.31"}))
    with pytest.raises(UserError, match="tim was"):
        sample_set(tmp_path).open()


def test_missing_images_are_cut_at_multiples_of_the_batch_size(tmp_path):
    samples = begin(tmp_path)
    assert samples.missing(4) == [(0, 4), (4, 8), (8, 10)]
    fill(samples, (2, 3), (5, 9))
    assert samples.finished() == [(2, 3), (5, 9)] and samples.count_finished() == 5
    assert samples.missing(4) == [(0, 2), (3, 4), (4, 5), (9, 10)]
    assert samples.missing(100) == [(0, 2), (3, 5), (9, 10)]
    fill(samples, (0, 4))  # overlaps (2, 3), as two launches without a common lock would leave it
    assert samples.finished() == [(0, 4), (5, 9)] and samples.missing(8) == [(4, 5), (9, 10)]
    with pytest.raises(UserError, match="2 images are missing"):
        samples.assemble()
    fill(samples, (4, 5), (9, 10))
    assert samples.missing(3) == []
    samples.assemble()
    assert names(tmp_path) == ["set.npz"] and np.array_equal(np.load(samples.npz)["arr_0"], IMAGES)


def test_shards_are_kept_on_request_until_a_launch_without_it(tmp_path):
    samples = begin(tmp_path, (0, 10), keep_shards=True)
    samples.assemble()
    release(samples)
    kept = names(tmp_path / "set" / "shards")
    assert kept == ["0000000-0000010.npz", "manifest.json", "process-0.lock"]
    again = sample_set(tmp_path, keep_shards=True)
    assert again.open() is True and names(tmp_path / "set" / "shards") == kept
    release(again)
    assert sample_set(tmp_path).open() is True  # also after a kill right after assembling
    assert names(tmp_path) == ["set.npz"]


def test_other_settings_are_refused_by_name(tmp_path):
    def refused(words):
        with pytest.raises(UserError, match=words):
            sample_set(tmp_path, {"seed": 1, "router": "f" * 64}).open()

    release(begin(tmp_path))
    refused(r"router was null, now it is \"f{11}\.\.\..*seed was 0, now it is 1; keep")
    begin(tmp_path, (0, 10)).assemble()
    refused("seed was 0, now it is 1")


def test_files_that_are_damaged_or_not_ours_are_refused_and_left_alone(tmp_path):
    def refused(path, content, way_out):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path.name} is damaged or not ours: {way_out}, or name another"):
            sample_set(tmp_path).open()
        assert path.read_bytes() == content

    samples = begin(tmp_path, (0, 10), keep_shards=True)
    release(samples)
    for content in (b"", b"{", b"[1]", b"7", b"\xff\xfe{}"):
        refused(samples.shards / "manifest.json", content, "remove .*/shards")
    samples.assemble()
    other = io.BytesIO()
    np.savez(other, arr_0=IMAGES)
    for content in (b"", samples.npz.read_bytes()[:-100], other.getvalue()):
        refused(samples.npz, content, "move it away")


@pytest.mark.parametrize("rank", [0, 3])
def test_a_second_launch_is_refused_while_any_rank_of_the_first_lives(tmp_path, rank):
    samples = begin(tmp_path)
    if rank:
        release(samples)
        samples = sample_set(tmp_path)
        samples.hold(rank)
    with pytest.raises(UserError, match="in use"):
        sample_set(tmp_path).open()
    release(samples)
    begin(tmp_path)


def test_a_launch_waits_for_the_one_before_it_to_complete_the_set(tmp_path, monkeypatch):
    monkeypatch.setattr(SampleSet, "PATIENCE", 120)
    samples, opened = begin(tmp_path, (0, 10)), []
    second = threading.Thread(target=lambda: opened.append(sample_set(tmp_path).open()))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    samples.assemble()
    second.join(120)
    assert opened == [True] and names(tmp_path) == ["set.npz"]


def test_rank_0_waits_while_another_rank_lives_and_returns_what_it_left(tmp_path, capsys):
    samples = begin(tmp_path, (0, 5))
    other = lock_file(tmp_path / "set" / "shards" / "process-2.lock", 0)

    def show():
        fill(samples, (5, 8))
        other.release()

    assert samples.wait_for_others(3, 4, show) == [(8, 10)]
    assert "other processes ended early" in capsys.readouterr().out
    fill(samples, (8, 10))
    assert samples.wait_for_others(3, 4) == []


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_launch_after_a_kill_while_assembling_removes_the_parts_and_completes_the_set(tmp_path):
    def kill(ranges):
        yield ranges[0]
        os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        try:
            begin(tmp_path, (0, 4), (4, 10)).assemble(kill)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert len(list(tmp_path.glob(".set.npz.*.part"))) == 1 and not (tmp_path / "set.npz").exists()
    parts = ["set/shards/.0000000-0000004.npz.abc.part", "set/.000000.png.abc.part"]
    for name in [*parts, ".other.npz.abc.part"]:
        (tmp_path / name).touch()
    begin(tmp_path).assemble()
    assert names(tmp_path) == [".other.npz.abc.part", "set.npz"]
    assert np.array_equal(np.load(tmp_path / "set.npz")["arr_0"], IMAGES)


def test_damaged_shards_are_found_and_removed_unless_they_may_be_whole(tmp_path, monkeypatch):
    samples = begin(tmp_path, (0, 10))
    path = samples.shards / "0000000-0000010.npz"
    whole = path.read_bytes()
    assert samples.damaged(samples.finished()) == []
    contents = [whole[:-30], whole[:300], b"", b"no npz"]
    for at in (0, whole.index(IMAGES.tobytes()) + 77, whole.index(LABELS.tobytes()) + 8, len(whole) - 10):
        contents.append(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
    for images, labels in ((IMAGES[:9], LABELS), (IMAGES.astype(np.int16), LABELS), (IMAGES, LABELS.astype(np.int32))):
        np.savez(path, images=images, labels=labels)
        contents.append(path.read_bytes())
    for content in contents:
        path.write_bytes(content)
        assert samples.damaged([(0, 10)]) == [(0, 10)]
    for error in (OSError(24, "Too many open files"), MemoryError()):
        monkeypatch.setattr("evaluation.sample_set.read_parts", Mock(side_effect=error))
        for read in (samples.assemble, lambda: samples.damaged([(0, 10)])):
            with pytest.raises(UserError, match="cannot read .*0000000-0000010.npz"):
                read()
    monkeypatch.undo()
    with pytest.raises(UserError, match="0000000-0000010.npz is damaged .* was removed: the same command"):
        samples.assemble()
    assert names(tmp_path) == ["set", "set/shards", "set/shards/manifest.json", "set/shards/process-0.lock"]


def test_pngs_hold_the_pixels_of_the_set(tmp_path):
    def check():
        assert names(tmp_path) == ["set", "set.npz", *(f"set/{k:06d}.png" for k in range(10))]
        for k in range(10):
            assert np.array_equal(np.asarray(Image.open(tmp_path / "set" / f"{k:06d}.png")), IMAGES[k])

    samples = begin(tmp_path, (0, 4), pngs=True)
    (tmp_path / "set" / "000002.png").unlink()  # as in a set that was begun without PNGs
    Image.new("RGB", (4, 4)).save(tmp_path / "set" / "000006.png")  # of a batch that was killed before its shard
    fill(samples, (4, 10))
    samples.assemble()
    check()
    (tmp_path / "set" / "000003.png").write_bytes(b"damaged")
    samples.complete_pngs()
    check()


def test_a_place_that_cannot_be_used_is_refused(tmp_path, monkeypatch, recwarn):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", "/proc/nowhere"):
        with pytest.raises(UserError, match="cannot write into .* name another --sample-dir"):
            sample_set(place).open()
    with pytest.raises(UserError, match="process 1 does not see .* one folder that all machines share"):
        sample_set(tmp_path / "other").hold(1)
    assert names(tmp_path) == ["file"]
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented")))
    with pytest.raises(UserError, match="its file system has no locks; name another --sample-dir"):
        sample_set(tmp_path).open()
    assert not recwarn.list


def test_assembling_holds_a_few_images_and_needs_no_torch(tmp_path):
    """40 MB of images in two shards, in a process of its own, whose memory starts small."""
    program = f"""
import sys, numpy as np
from evaluation.sample_set import SampleSet
from runtime.memory import peak_resident
samples = SampleSet({str(tmp_path)!r}, "set", {{"images": 800, "image_size": 128}})
samples.open()
before = peak_resident()
"""
    shards = "np.broadcast_to(np.uint8(k // 4), (400, 128, 128, 3)), np.zeros(400, np.int64)"
    for work in (
        f"for k in (0, 400): samples.write(k, {shards})",
        "samples.assemble(); print(peak_resident() - before, 'torch' in sys.modules)",
    ):
        taken = subprocess.run([sys.executable, "-c", program + work], cwd=ROOT, check=True, capture_output=True).stdout
    assert taken.split()[1] == b"False" and int(taken.split()[0]) < 5 * ROWS * 128**2 * 3
    images = np.load(tmp_path / "set.npz")["arr_0"]
    assert (images[:400] == 0).all() and (images[400:] == 100).all()
