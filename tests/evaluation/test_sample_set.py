"""The folder of a sample set: what counts as finished, what is refused, what comes out."""

import errno
import fcntl
import hashlib
import io
import json
import subprocess
import sys
import threading
import time

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


def begin(folder, *ranges, **options):
    """An open set of ten images, of which `ranges` are written."""
    samples = SampleSet(folder, "set", MANIFEST, **options)
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
    # A set from before the manifest had more keys stays valid.
    assert SampleSet(samples.npz.parent, "set", MANIFEST | {"schedule": None}).open() is True


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
    again = SampleSet(tmp_path, "set", MANIFEST, keep_shards=True)
    assert again.open() is True and names(tmp_path / "set" / "shards") == kept
    release(again)
    assert SampleSet(tmp_path, "set", MANIFEST).open() is True  # the same happens after a kill right after assembling
    assert names(tmp_path) == ["set.npz"]


def test_other_settings_are_refused_by_name(tmp_path):
    release(begin(tmp_path))
    other = MANIFEST | {"seed": 1, "router": "f" * 64}
    with pytest.raises(
        UserError, match=r"router was null, now it is \"f{11}\.\.\..*seed was 0, now it is 1; keep them"
    ):
        SampleSet(tmp_path, "set", other).open()
    begin(tmp_path, (0, 10)).assemble()
    with pytest.raises(UserError, match="seed was 0, now it is 1"):
        SampleSet(tmp_path, "set", other).open()


def test_files_that_are_damaged_or_not_ours_are_refused_and_left_alone(tmp_path):
    def refused(path, content, words):
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            SampleSet(tmp_path, "set", MANIFEST).open()
        assert path.read_bytes() == content

    release(begin(tmp_path))
    manifest = tmp_path / "set" / "shards" / "manifest.json"
    whole = manifest.read_bytes()
    for content in (b"", b"{", b"[1]", b"7", b"\xff\xfe{}"):
        refused(manifest, content, "manifest.json is damaged or not ours: remove .*/set/shards, or")
    manifest.write_bytes(whole)
    samples = begin(tmp_path, (0, 10))
    samples.assemble()
    whole, no_manifest, no_json = samples.npz.read_bytes(), io.BytesIO(), io.BytesIO()
    np.savez(no_manifest, arr_0=IMAGES)
    np.savez(no_json, arr_0=IMAGES, manifest=np.array("no JSON"))
    for content in (whole[: len(whole) // 2], b"", no_manifest.getvalue(), no_json.getvalue()):
        refused(samples.npz, content, "move it away")


@pytest.mark.parametrize("rank", [0, 3])
def test_a_second_launch_is_refused_while_any_rank_of_the_first_lives(tmp_path, rank):
    samples = begin(tmp_path)
    if rank:
        release(samples)
        samples = SampleSet(tmp_path, "set", MANIFEST)
        samples.hold(rank)
    with pytest.raises(UserError, match="in use"):
        SampleSet(tmp_path, "set", MANIFEST).open()
    release(samples)
    begin(tmp_path)


def test_a_launch_waits_for_the_one_before_it_to_complete_the_set(tmp_path, monkeypatch):
    monkeypatch.setattr(SampleSet, "PATIENCE", 120)
    program = f"""
import sys, numpy as np
from evaluation.sample_set import SampleSet
samples = SampleSet({str(tmp_path)!r}, "set", {MANIFEST})
samples.open()
print("open", flush=True)
sys.stdin.readline()
samples.write(0, np.zeros((10, 4, 4, 3), np.uint8), np.arange(10))
samples.assemble()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, **pipes)
    assert process.stdout.readline() == "open\n"
    threading.Timer(0.3, lambda: process.communicate("go\n")).start()
    assert SampleSet(tmp_path, "set", MANIFEST).open() is True
    assert process.wait(120) == 0 and names(tmp_path) == ["set.npz"]


def test_rank_0_waits_while_another_rank_lives_and_returns_what_it_left(tmp_path, capsys):
    samples = begin(tmp_path, (0, 5))
    other = lock_file(tmp_path / "set" / "shards" / "process-2.lock", 0)
    calls = []

    def show():
        calls.append(time.monotonic())
        if len(calls) == 2:
            fill(samples, (5, 8))
            other.release()

    assert samples.wait_for_others(3, 4, show) == [(8, 10)]
    assert len(calls) == 2 and "other processes ended early" in capsys.readouterr().out
    fill(samples, (8, 10))
    assert samples.wait_for_others(3, 4) == []


def test_files_that_a_killed_process_was_writing_are_removed_by_the_next_launch(tmp_path):
    release(begin(tmp_path))
    left = ["set/shards/.0000000-0000004.npz.abc.part", "set/.000000.png.abc.part", ".set.npz.abc.part"]
    others = [".other.npz.abc.part", "set/mine.txt"]
    for name in left + others:
        (tmp_path / name).write_text("half")
    begin(tmp_path)
    assert not any((tmp_path / name).exists() for name in left)
    assert all((tmp_path / name).exists() for name in others)


def test_damaged_shards_are_found_wherever_the_damage_is(tmp_path):
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
    with pytest.raises(UserError, match="0000000-0000010.npz is damaged .* was removed: the same command"):
        samples.assemble()
    assert samples.missing(10) == [(0, 10)]
    assert names(tmp_path) == ["set", "set/shards", "set/shards/manifest.json", "set/shards/process-0.lock"]


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), MemoryError()])
def test_a_shard_that_cannot_be_read_for_now_is_kept(tmp_path, monkeypatch, error):
    samples = begin(tmp_path, (0, 10))

    def fail(*arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("evaluation.sample_set.read_parts", fail)
        for read in (samples.assemble, lambda: samples.damaged([(0, 10)])):
            with pytest.raises(UserError, match="cannot read .*0000000-0000010.npz"):
                read()
    assert samples.damaged([(0, 10)]) == [] and samples.missing(10) == []


def test_pngs_hold_the_pixels_of_the_set(tmp_path):
    def check():
        assert names(tmp_path) == ["set", "set.npz", *(f"set/{k:06d}.png" for k in range(10))]
        for k in range(10):
            assert np.array_equal(np.asarray(Image.open(tmp_path / "set" / f"{k:06d}.png")), IMAGES[k])

    samples = begin(tmp_path, (0, 4), pngs=True)
    before = (tmp_path / "set" / "000003.png").stat().st_mtime_ns
    (tmp_path / "set" / "000002.png").unlink()  # as in a set that was begun without PNGs
    Image.new("RGB", (4, 4)).save(tmp_path / "set" / "000006.png")  # of a batch that was killed before its shard
    fill(samples, (4, 10))
    samples.assemble()
    check()
    assert (tmp_path / "set" / "000003.png").stat().st_mtime_ns == before  # it was right
    (tmp_path / "set" / "000000.png").unlink()
    (tmp_path / "set" / "000003.png").write_bytes(b"damaged")
    again = SampleSet(tmp_path, "set", MANIFEST, pngs=True)
    assert again.open() is True
    again.complete_pngs()
    check()


def test_a_disk_that_is_too_small_gets_a_note(tmp_path, capsys):
    begin(tmp_path).check_space()
    assert capsys.readouterr().out == ""
    big = SampleSet(tmp_path, "big", MANIFEST | {"images": 10**12})
    big.open()
    big.check_space()
    assert "GB will be written" in capsys.readouterr().out


def test_a_place_that_cannot_be_used_is_refused(tmp_path, monkeypatch, recwarn):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", "/proc/nowhere"):
        with pytest.raises(UserError, match="cannot write into .* name another --sample-dir"):
            SampleSet(place, "set", MANIFEST).open()
    with pytest.raises(UserError, match="process 1 does not see .* one folder that all machines share"):
        SampleSet(tmp_path / "other", "set", MANIFEST).hold(1)
    assert names(tmp_path) == ["file"]

    def flock(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="its file system has no locks; name another --sample-dir"):
        SampleSet(tmp_path, "set", MANIFEST).open()
    assert not recwarn.list and not list(tmp_path.rglob("*.lock"))


def test_assembling_holds_a_few_images_and_needs_no_torch(tmp_path):
    """40 MB of images in two shards, in a process of its own, whose memory starts small."""
    opened = f"""
import sys
import numpy as np
from evaluation.sample_set import SampleSet
from runtime.memory import peak_resident
samples = SampleSet({str(tmp_path)!r}, "set", {{"images": 800, "image_size": 128}})
samples.open()
"""
    shape = "(400, 128, 128, 3)"
    write = f"for k in (0, 400): samples.write(k, np.broadcast_to(np.uint8(k // 4), {shape}), np.zeros(400, np.int64))"
    assemble = "before = peak_resident(); samples.assemble(); print(peak_resident() - before, 'torch' in sys.modules)"
    for work in (write, assemble):
        command = [sys.executable, "-c", opened + work]
        result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    taken, torch = result.stdout.split()
    assert torch == "False" and int(taken) < 5 * ROWS * 128**2 * 3
    images = np.load(tmp_path / "set.npz")["arr_0"]
    assert (images[:400] == 0).all() and (images[400:] == 100).all()
