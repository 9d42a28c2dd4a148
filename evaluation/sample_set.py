"""A set of sampled images on disk: finished parts, whatever process made them, until they become one .npz.

SAMPLE_DIR/NAME.npz                        the set: arr_0 uint8 (N, H, W, 3), labels int64 (N,), manifest (JSON)
SAMPLE_DIR/NAME/NNNNNN.png                 its images one by one, where they are wanted
SAMPLE_DIR/NAME/shards/START-STOP.npz      images START to STOP-1, finished; gone when the set is complete
SAMPLE_DIR/NAME/shards/manifest.json       everything that determines the images
SAMPLE_DIR/NAME/shards/process-R.lock      held by process R while it lives

Knows no model, and no torch.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from evaluation.npz import read_arrays, read_parts, write_npz
from runtime.errors import UserError
from runtime.files import atomic_write, lock_file

ROWS = 64  # images read at a time: 12.6 MB at 256 pixels


class Damaged(ValueError):
    """A shard that is not what was written."""


class SampleSet:
    """The set of `manifest["images"]` square images of `manifest["image_size"]` pixels that `manifest` determines.

    name: of the set, unique in the folder sample_dir. manifest: JSON types; the images follow from it alone.
    pngs: whether each image is written as NNNNNN.png too; keep_shards: whether the shards stay beside the .npz.
    """

    PATIENCE = 10.0  # seconds: until the processes of a start that was just killed are gone

    def __init__(self, sample_dir, name, manifest, pngs=False, keep_shards=False):
        self.folder, self.npz = Path(sample_dir) / name, Path(sample_dir) / f"{name}.npz"
        self.shards = self.folder / "shards"
        self.manifest, self.pngs, self.keep_shards = manifest, pngs, keep_shards
        self.count, self.size = manifest["images"], manifest["image_size"]
        self._lock = None

    def open(self):
        """Finds or begins the set, for the first process of a start. Returns whether it is complete.

        Raises UserError where another start is at work on it, what is there was made otherwise, or nothing can be
        written there.
        """
        if self._is_complete() and not self.shards.exists():
            return True
        try:
            self.hold(0)
        except UserError:
            if self._is_complete():  # by the start that we waited for, which removed the folder
                return True
            raise
        for path in self.shards.glob("process-*.lock"):
            if path != self._lock_path(0) and not self._is_free(path, self.PATIENCE):
                raise self._in_use()
        if self._is_complete():  # by the start that we waited for, or by one that was killed right after
            if not self.keep_shards:
                self._clear()
            return True
        manifest = self.shards / "manifest.json"
        if manifest.exists():
            self._compare_shards()
        else:
            with atomic_write(manifest) as part:
                part.write_text(json.dumps(self.manifest, indent=2) + "\n")
        # What a killed process was writing.
        for folder, pattern in (
            (self.shards, ".*.part"),
            (self.folder, ".*.part"),
            (self.npz.parent, f".{self.npz.name}.*.part"),
        ):
            for part in folder.glob(pattern):
                part.unlink(missing_ok=True)
        return False

    def _is_complete(self):
        if not self.npz.exists():
            return False
        try:
            arrays, _ = read_arrays(self.npz, ["manifest"])
            there = dict(json.loads(str(arrays["manifest"])))
        except OSError as error:
            raise UserError(f"cannot read {self.npz}: {error.strerror}") from error
        except Exception as error:  # as in _unreadable
            raise UserError(
                f"{self.npz} is there and was not made by this program, or is damaged: move it away, or name another "
                "--sample-dir"
            ) from error
        self._compare(self.npz, there)
        return True

    def _compare_shards(self):
        """Raises UserError where the shards were made otherwise, or their manifest cannot be read."""
        manifest = self.shards / "manifest.json"
        try:
            there = dict(json.loads(manifest.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{manifest} is damaged: remove {self.shards}, or name another --sample-dir") from error
        self._compare(manifest, there)

    def _compare(self, path, there):
        """Raises UserError where the manifest `there`, found in `path`, is not this one."""
        told = [
            f"{name} was {_short(there.get(name))}, now it is {_short(self.manifest.get(name))}"
            for name in sorted(there.keys() | self.manifest.keys())
            if there.get(name) != self.manifest.get(name)
        ]
        if told:
            raise UserError(
                f"{path} was made otherwise: {'; '.join(told)}; use the same again, or name another --sample-dir"
            )

    def _in_use(self):
        return UserError(f"{self.folder} is in use: wait for the start that is at work on it, or stop that one")

    def _lock_path(self, rank):
        return self.shards / f"process-{rank}.lock"

    def hold(self, rank):
        """Marks process `rank` as alive until it ends, however it ends. Raises UserError where another one is it."""
        if self._lock:
            return
        if rank and not (self.shards / "manifest.json").exists():
            raise UserError(
                f"process {rank} finds nothing of what process 0 began in {self.shards.resolve()}: --sample-dir must "
                "be one folder that all machines share"
            )
        try:
            self.shards.mkdir(parents=True, exist_ok=True)
            self._lock = lock_file(self._lock_path(rank), self.PATIENCE)
        except OSError as error:
            raise UserError(f"cannot write into {self.folder}: {error.strerror}; name another --sample-dir") from error
        if not self._lock:
            raise self._in_use()

    def _is_free(self, path, patience):
        """Whether nobody holds the lock at `path`, or gives it back within `patience` seconds."""
        try:
            lock = lock_file(path, patience)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; name another --sample-dir") from error
        if lock:
            lock.release()
        return lock is not None

    def refresh(self):
        """Makes a network file system show what other machines wrote: a client that changes a folder reads it anew."""
        with contextlib.suppress(OSError):
            probe = self.shards / ".refresh"
            probe.touch()
            probe.unlink()

    def others_live(self, size):
        """Whether any process but the first of a start with `size` of them is still at work."""
        return not all(self._is_free(self._lock_path(rank), 0) for rank in range(1, size))

    def finished(self):
        """The ranges (start, stop) of the shards, sorted, none overlapping. Raises UserError if unreadable."""
        ranges, covered = [], 0
        try:
            names = [re.fullmatch(r"(\d{7,})-(\d{7,})\.npz", name) for name in os.listdir(self.shards)]
        except OSError as error:
            raise UserError(f"cannot read {self.shards}: {error.strerror}") from error
        for start, stop in sorted(tuple(map(int, name.groups())) for name in names if name):
            if start >= covered:
                ranges.append((start, stop))
                covered = stop
        return ranges

    def count_finished(self):
        """How many images are finished."""
        if self.npz.exists():
            return self.count
        return sum(stop - start for start, stop in self.finished())

    def missing(self, batch_size):
        """The ranges (start, stop) without a shard, cut at the multiples of `batch_size`."""
        ranges, covered = [], 0
        for start, stop in [*self.finished(), (self.count, self.count)]:
            while covered < start:
                end = min(start, (covered // batch_size + 1) * batch_size)
                ranges.append((covered, end))
                covered = end
            covered = stop
        return ranges

    def _images(self, start, stop):
        """The images of a shard, uint8 (n, H, W, 3) at a time. Raises as `_unreadable` says."""
        path, count = self._shard(start, stop), 0
        try:
            for images in read_parts(path, "images", ROWS):
                if images.shape[1:] != (self.size, self.size, 3) or images.dtype != np.uint8:
                    raise ValueError(f"images {images.dtype} {images.shape}")
                count += len(images)
                yield images
            if count != stop - start:
                raise ValueError(f"{count} images")
        except Exception as error:
            raise _unreadable(path, error) from error

    def _labels(self, start, stop):
        """The labels of a shard, int64 (N,). Raises as `_unreadable` says."""
        path = self._shard(start, stop)
        try:
            (labels,) = read_parts(path, "labels", stop - start)
            if labels.shape != (stop - start,) or labels.dtype != np.int64:
                raise ValueError(f"labels {labels.dtype} {labels.shape}")
        except Exception as error:
            raise _unreadable(path, error) from error
        return labels

    def check_space(self):
        """Says so where the disk seems too small for what is left to write: shards, and the .npz made from them."""
        needed = (2 * self.count - self.count_finished()) * 3 * self.size**2
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            print(f"note: {self.folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB will be written")

    def damaged(self, ranges):
        """Those of the finished `ranges` whose shards are not what was written."""
        bad = []
        for start, stop in ranges:
            try:
                for _ in self._images(start, stop):
                    pass
                self._labels(start, stop)
            except Damaged:
                bad.append((start, stop))
        return bad

    def remove(self, ranges):
        """Removes the shards of `ranges`."""
        for start, stop in ranges:
            self._shard(start, stop).unlink(missing_ok=True)

    def write(self, start, images, labels):
        """Writes images uint8 (N, H, W, 3) and labels int64 (N,) from number `start` on: PNGs first, then the shard.

        Raises UserError where they cannot be written.
        """
        if self.pngs:
            self._write_pngs(start, images, anew=True)
        with atomic_write(self._shard(start, start + len(images))) as part, part.open("wb") as file:
            write_npz(file, images=images, labels=labels)

    def _shard(self, start, stop):
        return self.shards / f"{start:07d}-{stop:07d}.npz"

    def _png(self, number):
        return self.folder / f"{number:06d}.png"

    def _write_pngs(self, start, images, anew=False):
        """Writes `images`, from number `start` on, as PNGs: all of them `anew`, or those that do not show them yet."""
        from PIL import Image

        def save(image, path):
            if anew or not _shows(path, image):
                with atomic_write(path) as part:
                    Image.fromarray(image).save(part, format="png")

        paths = map(self._png, range(start, start + len(images)))
        # Pillow lets other threads run while it compresses.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(save, images, paths))

    def assemble(self, progress=None):
        """Writes the .npz of a set that was opened here from its shards, whole or not at all, then removes them.

        Holds `ROWS` images at a time. progress: wraps the iterable of ranges (tqdm, say).
        Returns the SHA-256 of the bytes of arr_0. Raises UserError where images are missing, a shard is damaged
        (which is removed), or the file cannot be written.
        """
        ranges = self.finished()
        missing = self.count - sum(stop - start for start, stop in ranges)
        if missing:
            raise UserError(f"{missing} images are missing in {self.shards}: start again")
        digest, labels = hashlib.sha256(), []

        def parts():
            for start, stop in progress(ranges) if progress else ranges:
                try:
                    labels.append(self._labels(start, stop))
                    at = start
                    for images in self._images(start, stop):
                        if self.pngs:
                            self._write_pngs(at, images)
                        digest.update(images)
                        yield images
                        at += len(images)
                except Damaged as error:
                    self.remove([(start, stop)])
                    raise UserError(f"{error} and was removed: the same command samples it again") from error

        arr_0 = (self.count, self.size, self.size, 3), np.uint8, parts()
        # They are known when the images are written.
        all_labels = (self.count,), np.int64, (np.concatenate(labels) for _ in range(1))
        with atomic_write(self.npz) as part, part.open("wb") as file:
            write_npz(file, arr_0=arr_0, labels=all_labels, manifest=np.array(json.dumps(self.manifest)))
        if not self.keep_shards:
            self._clear()
        return digest.hexdigest()

    def _clear(self):
        """Removes the shards' folder, and the one above where no PNGs are in it."""
        self._lock.release()  # an open file could not be removed for good from a network file system
        for pattern in ("*-*.npz", ".*.part", ".refresh", "manifest.json", "process-*.lock"):
            for path in self.shards.glob(pattern):
                path.unlink(missing_ok=True)
        for folder in (self.shards, self.folder):
            try:
                folder.rmdir()
            except OSError:  # it holds PNGs, or something of the user's
                break

    def complete_pngs(self):
        """Writes those PNGs of a complete set that are wanted and not there. Raises UserError where it is damaged."""
        if not self.pngs:
            return
        try:
            for number, images in enumerate(read_parts(self.npz, "arr_0", ROWS)):
                self._write_pngs(number * ROWS, images)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{self.npz} cannot be read ({error}): move it away, it is made again") from error


def _short(value):
    """A value of a manifest for a message: hashes cut."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}...{text[-3:]}"


def _shows(path, image):
    """Whether the picture at `path` is the uint8 image (H, W, 3)."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return np.array_equal(np.asarray(picture), image)
    except (OSError, SyntaxError, ValueError):  # there is none, or a damaged one
        return False


def _unreadable(path, error):
    """What to raise for an `error` in reading `path`: `Damaged`, or a UserError where the file may be whole."""
    if isinstance(error, OSError | MemoryError):
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        return UserError(f"cannot read {path}: {reason}; if that does not pass, remove the file")
    # NumPy and zipfile raise whatever the bytes of a damaged file lead them to.
    return Damaged(f"{path} is damaged ({error})")
