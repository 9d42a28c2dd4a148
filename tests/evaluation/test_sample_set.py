"""The folder of a set of samples: what counts as finished, what is refused, what comes out."""

import errno
import fcntl
import hashlib
import io
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from evaluation.sample_set import ROWS, SampleSet
from runtime.errors import UserError

MANIFEST = {"images": 10, "image_size": 4, "seed": 0}
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
LABELS = np.arange(10) * 3


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(SampleSet, "PATIENCE", 0.1)


def begin(folder, **more):
    """An open set of ten images."""
    samples = SampleSet(folder, "set", MANIFEST, **more)
    assert samples.open() is False
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
    samples = begin(tmp_path / "new" / "folder")
    fill(samples, (4, 7), (0, 4), (7, 10))
    digest = samples.assemble()
    assert names(tmp_path / "new" / "folder") == ["set.npz"]
    with np.load(tmp_path / "new" / "folder" / "set.npz", allow_pickle=False) as read:
        assert read.files == ["arr_0", "labels", "manifest"]
        assert read["arr_0"].dtype == np.uint8 and np.array_equal(read["arr_0"], IMAGES)
        assert np.array_equal(read["labels"], LABELS)
        assert json.loads(str(read["manifest"])) == MANIFEST
    assert digest == hashlib.sha256(IMAGES.tobytes()).hexdigest()
    assert SampleSet(tmp_path / "new" / "folder", "set", MANIFEST).open() is True


def test_what_is_missing_is_cut_at_multiples_of_the_batch_size(tmp_path):
    samples = begin(tmp_path)
    assert samples.missing(4) == [(0, 4), (4, 8), (8, 10)]
    fill(samples, (2, 3), (5, 9))
    assert samples.finished() == [(2, 3), (5, 9)] and samples.count_finished() == 5
    assert samples.missing(4) == [(0, 2), (3, 4), (4, 5), (9, 10)]
    assert samples.missing(100) == [(0, 2), (3, 5), (9, 10)]
    fill(samples, (0, 4))  # overlaps (2, 3), as what two starts without a common lock would leave
    assert samples.finished() == [(0, 4), (5, 9)] and samples.missing(8) == [(4, 5), (9, 10)]
    fill(samples, (4, 5), (9, 10))
    assert samples.missing(3) == []
    (samples.shards / ".0000000-0000004.npz.abc.part").touch()  # of a process that was killed meanwhile
    samples.assemble()
    assert names(tmp_path) == ["set.npz"]
    assert np.array_equal(np.load(samples.npz)["arr_0"], IMAGES)


def test_shards_stay_where_they_are_asked_to_until_a_start_that_does_not_ask(tmp_path):
    samples = begin(tmp_path, keep_shards=True)
    fill(samples, (0, 10))
    samples.assemble()
    release(samples)
    kept = names(tmp_path / "set" / "shards")
    assert kept == ["0000000-0000010.npz", "manifest.json", "process-0.lock"]
    again = SampleSet(tmp_path, "set", MANIFEST, keep_shards=True)
    assert again.open() is True and names(tmp_path / "set" / "shards") == kept
    release(again)
    assert SampleSet(tmp_path, "set", MANIFEST).open() is True  # as after a kill between the .npz and its shards' end
    assert names(tmp_path) == ["set.npz"]


def test_missing_images_are_not_assembled(tmp_path):
    samples = begin(tmp_path)
    fill(samples, (0, 4), (5, 10))
    with pytest.raises(UserError, match="1 images are missing"):
        samples.assemble()
    assert not samples.npz.exists() and samples.finished() == [(0, 4), (5, 10)]


def test_other_settings_are_refused_by_name(tmp_path):
    release(begin(tmp_path))
    other = MANIFEST | {"seed": 1, "router": "f" * 64}
    with pytest.raises(UserError, match=r"router was null, now it is \"f{11}\.\.\..*seed was 0, now it is 1;.*same"):
        SampleSet(tmp_path, "set", other).open()
    samples = begin(tmp_path)
    fill(samples, (0, 10))
    samples.assemble()
    with pytest.raises(UserError, match="seed was 0, now it is 1"):
        SampleSet(tmp_path, "set", other).open()
    assert np.array_equal(np.load(samples.npz)["arr_0"], IMAGES)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"7", b"\xff\xfe{}"])
def test_a_damaged_manifest_is_refused(tmp_path, content):
    release(begin(tmp_path))
    (tmp_path / "set" / "shards" / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match="manifest.json is damaged: remove .*/set/shards, or"):
        SampleSet(tmp_path, "set", MANIFEST).open()


def test_a_file_of_the_name_that_is_not_ours_or_cut_off_is_left_alone(tmp_path):
    samples = begin(tmp_path / "whole")
    fill(samples, (0, 10))
    samples.assemble()
    whole = samples.npz.read_bytes()
    np.savez(tmp_path / "set.npz", arr_0=IMAGES)
    theirs = (tmp_path / "set.npz").read_bytes()
    other = io.BytesIO()
    np.savez(other, arr_0=IMAGES, manifest=np.array("no JSON"))
    for content in (theirs, whole[: len(whole) // 2], b"", other.getvalue()):
        (tmp_path / "set.npz").write_bytes(content)
        with pytest.raises(UserError, match="move it away"):
            SampleSet(tmp_path, "set", MANIFEST).open()
        assert (tmp_path / "set.npz").read_bytes() == content


@pytest.mark.parametrize("rank", [0, 3])
def test_a_second_start_is_refused_while_any_process_of_the_first_lives(tmp_path, rank):
    samples = begin(tmp_path)
    held = SampleSet(tmp_path, "set", MANIFEST)
    if rank:
        held.hold(rank)
        release(samples)
        assert samples.others_live(4)
    with pytest.raises(UserError, match="in use"):
        SampleSet(tmp_path, "set", MANIFEST).open()
    release(held if rank else samples)
    assert not samples.others_live(4)
    begin(tmp_path)


def test_what_a_killed_process_was_writing_goes_at_the_next_start(tmp_path):
    release(begin(tmp_path))
    left = ["set/shards/.0000000-0000004.npz.abc.part", "set/.000000.png.abc.part", ".set.npz.abc.part"]
    others = [".other.npz.abc.part", "set/mine.txt"]
    for name in left + others:
        (tmp_path / name).write_text("half")
    begin(tmp_path)
    assert not any((tmp_path / name).exists() for name in left)
    assert all((tmp_path / name).exists() for name in others)


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_damaged_shards_are_found_wherever_the_damage_is(tmp_path):
    samples = begin(tmp_path)
    path = samples.shards / "0000000-0000010.npz"
    fill(samples, (0, 10))
    whole = path.read_bytes()
    assert samples.damaged(samples.finished()) == []
    for at in (0, whole.index(IMAGES.tobytes()) + 77, whole.index(LABELS.tobytes()) + 8, len(whole) - 10):
        path.write_bytes(whole)
        flip(path, at)
        assert samples.damaged([(0, 10)]) == [(0, 10)], at
    for content in (whole[:-30], whole[:300], b"", b"no npz"):
        path.write_bytes(content)
        assert samples.damaged([(0, 10)]) == [(0, 10)]
    for images, labels in ((IMAGES[:9], LABELS), (IMAGES.astype(np.int16), LABELS), (IMAGES, LABELS.astype(np.int32))):
        np.savez(path, images=images, labels=labels)
        assert samples.damaged([(0, 10)]) == [(0, 10)]
    samples.remove([(0, 10)])
    assert samples.missing(10) == [(0, 10)]


def test_a_shard_that_is_damaged_while_assembling_is_removed_and_no_file_is_left(tmp_path):
    samples = begin(tmp_path)
    fill(samples, (0, 4), (4, 10))
    flip(samples.shards / "0000004-0000010.npz", 300)
    with pytest.raises(UserError, match="0000004-0000010.npz is damaged .* removed: the same command"):
        samples.assemble()
    assert samples.missing(10) == [(4, 10)]
    assert names(tmp_path) == ["set", "set/shards"] + [
        f"set/shards/{name}" for name in ("0000000-0000004.npz", "manifest.json", "process-0.lock")
    ]


def test_pngs_hold_the_pixels_of_the_set(tmp_path):
    samples = begin(tmp_path, pngs=True)
    fill(samples, (0, 4))
    before = (tmp_path / "set" / "000003.png").stat().st_mtime_ns
    (tmp_path / "set" / "000002.png").unlink()  # as in a set that was begun without PNGs
    Image.new("RGB", (4, 4)).save(tmp_path / "set" / "000006.png")  # of a batch that was killed before its shard
    fill(samples, (4, 10))
    samples.assemble()

    def check():
        assert names(tmp_path) == ["set", "set.npz", *(f"set/{k:06d}.png" for k in range(10))]
        for k in range(10):
            assert np.array_equal(np.asarray(Image.open(tmp_path / "set" / f"{k:06d}.png")), IMAGES[k])

    check()
    assert (tmp_path / "set" / "000003.png").stat().st_mtime_ns == before  # it was right already
    (tmp_path / "set" / "000000.png").unlink()
    (tmp_path / "set" / "000003.png").write_bytes(b"damaged")
    Image.fromarray(IMAGES[0]).save(tmp_path / "set" / "000009.png")  # of an older set of this name
    again = SampleSet(tmp_path, "set", MANIFEST, pngs=True)
    assert again.open() is True
    again.complete_pngs()
    check()
    SampleSet(tmp_path, "other", MANIFEST).complete_pngs()  # none are wanted: nothing to do


def test_a_full_disk_is_announced(tmp_path, monkeypatch, capsys):
    samples = begin(tmp_path)
    samples.check_space()
    assert capsys.readouterr().out == ""
    big = SampleSet(tmp_path, "big", MANIFEST | {"images": 10**12})
    big.open()
    big.check_space()
    assert "GB will be written" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", "/proc/nowhere"):
        with pytest.raises(UserError, match="cannot write into .* name another --sample-dir"):
            SampleSet(place, "set", MANIFEST).open()


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch, recwarn):
    def flock(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="its file system has no locks; name another --sample-dir"):
        SampleSet(tmp_path, "set", MANIFEST).open()
    assert not recwarn.list and not list(tmp_path.rglob("*.lock"))


def test_a_start_that_waited_for_another_to_complete_finds_the_set(tmp_path, monkeypatch):
    monkeypatch.setattr(SampleSet, "PATIENCE", 10)
    program = f"""
import sys, time
import test_shards
samples = test_shards.begin({str(tmp_path)!r})
print("begun", flush=True)
sys.stdin.readline()
test_shards.fill(samples, (0, 10))
samples.assemble()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", program], **pipes)
    assert process.stdout.readline() == "begun\n"
    threading.Timer(0.3, lambda: process.communicate("go\n")).start()
    assert SampleSet(tmp_path, "set", MANIFEST).open() is True
    assert process.wait(20) == 0 and names(tmp_path) == ["set.npz"]


def test_other_machines_must_see_the_same_folder(tmp_path):
    begin(tmp_path / "one")
    SampleSet(tmp_path / "one", "set", MANIFEST).hold(1)
    with pytest.raises(UserError, match="process 1 finds nothing .* one folder that all machines share"):
        SampleSet(tmp_path / "other", "set", MANIFEST).hold(1)
    assert names(tmp_path / "one") and not (tmp_path / "other").exists()


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), MemoryError()])
def test_a_shard_that_cannot_be_read_now_is_kept(tmp_path, monkeypatch, error):
    samples = begin(tmp_path)
    fill(samples, (0, 10))

    def fail(*arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("evaluation.sample_set.read_parts", fail)
        for read in (samples.assemble, lambda: samples.damaged([(0, 10)])):
            with pytest.raises(UserError, match="cannot read .*0000000-0000010.npz"):
                read()
    assert samples.damaged([(0, 10)]) == [] and samples.missing(10) == []


def test_assembling_holds_a_few_images_and_needs_no_torch(tmp_path):
    """40 MB of images in two shards; in a process of its own, whose memory starts small."""
    program = f"""
import sys
import numpy as np
from evaluation.sample_set import ROWS, SampleSet
count, size = 800, 128
samples = SampleSet({str(tmp_path)!r}, "set", {{"images": count, "image_size": size}})
samples.open()
for start in (0, 400):
    samples.write(start, np.broadcast_to(np.uint8(start // 4), (400, size, size, 3)), np.zeros(400, np.int64))
"""
    assemble = program[: program.index("for start")] + (
        "from runtime.memory import peak_resident\nbefore = peak_resident()\n"
        "samples.assemble()\n"
        "print(peak_resident() - before, 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    result = subprocess.run([sys.executable, "-c", assemble], check=True, capture_output=True, text=True)
    taken, torch = result.stdout.split()
    assert torch == "False"
    assert int(taken) < 5 * ROWS * 128**2 * 3
    assert hashlib.sha256(np.load(tmp_path / "set.npz")["arr_0"][400:].tobytes()).hexdigest() == (
        hashlib.sha256(bytes([100]) * (400 * 128**2 * 3)).hexdigest()
    )
