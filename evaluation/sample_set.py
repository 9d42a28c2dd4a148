"""A set of sampled images on disk: finished shards, made by any process, that become one .npz.

SAMPLE_DIR/NAME.npz                        the set: arr_0 uint8 (N, H, W, 3), labels int64 (N,), manifest (JSON)
SAMPLE_DIR/NAME/NNNNNN.png                 its images one by one, on request
SAMPLE_DIR/NAME/shards/START-STOP.npz      the finished images START to STOP-1; removed when the set is complete
SAMPLE_DIR/NAME/shards/manifest.json       everything that determines the images
SAMPLE_DIR/NAME/shards/process-R.lock      held by rank R while it lives

Knows no model, and imports no torch.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from evaluation.npz import read_arrays, read_parts, write_npz
from runtime.cli import METHODS
from runtime.errors import UserError
from runtime.files import atomic_write, lock_file

ROWS = 64  # images read at a time: 12.6 MB at 256 pixels


class Damaged(ValueError):
    """A shard that does not hold what was written."""


def set_name(spec, manifest, ckpt, path):
    """The name of a set: what the original puts into it, and what else distinguishes sets.

    spec: the `ModelSpec`; ckpt, path: the flags --ckpt and --path, or None. Paths may hold any characters.
    """
    parts = [spec.name]
    parts += [Path(ckpt).stem if ckpt else "pretrained"] if spec.registered else []
    parts += [f"size-{manifest['image_size']}"]
    parts += [f"vae-{spec.vae}"] if spec.vae in ("ema", "mse") else []
    parts += [f"cfg-{manifest['cfg_scale']}"]
    parts += [f"channels-{manifest['cfg_channels']}"] if "cfg_channels" in manifest else []
    parts += ["times-{}-{}".format(*manifest["cfg_interval"])] if "cfg_interval" in manifest else []
    parts += ["noise-{}-to-{}".format(*manifest["noise_scale"])] if "noise_scale" in manifest else []
    parts += [f"seed-{manifest['seed']}", f"{manifest['sampler']}-{manifest['steps']}"]
    if path:
        # The checkpoints of all trainings have the same names, so the hash is needed.
        router, schedule = manifest["router"], manifest["schedule"]
        parts += ["dynamiclayer" if router else "schedule", Path(path).stem, (router or schedule)[:8]]
        parts += [f"thres-{manifest['threshold']}"] if router else []
    elif method := manifest.get("method"):
        setting, _ = METHODS[method]
        parts += [method, f"{setting}-{manifest[setting]}"]
    parts += [f"forecast-{manifest['forecast']}"] if manifest.get("forecast") else []
    parts += ["balanced"] if manifest["labels"] == "balanced" else []
    parts += [manifest["dtype"]] if manifest["dtype"] else []
    parts += manifest.get("experimental", [])
    parts += ["deterministic"] if manifest["deterministic"] else []
    parts += [f"n-{manifest['images']}"]
    return "-".join(re.sub(r"[^\w.-]+", "-", part, flags=re.ASCII)[:40].strip("-") for part in parts)


class SampleSet:
    """The set of `manifest["images"]` square images of `manifest["image_size"]` pixels that `manifest` determines.

    name: of the set, unique in the folder sample_dir. manifest: everything that determines the images, as JSON types.
    pngs: whether to also write each image as NNNNNN.png; keep_shards: whether to keep the shards beside the .npz.
    """

    PATIENCE = 10.0  # seconds until the processes of a launch that was just killed are gone

    def __init__(self, sample_dir, name, manifest, pngs=False, keep_shards=False):
        self.folder, self.npz = Path(sample_dir) / name, Path(sample_dir) / f"{name}.npz"
        self.shards = self.folder / "shards"
        self.manifest, self.pngs, self.keep_shards = manifest, pngs, keep_shards
        self.count, self.size = manifest["images"], manifest["image_size"]
        self._lock = None

    def open(self):
        """Open or create the set, on rank 0; return whether it is complete.

        Raises UserError if another launch writes it, if files there have another manifest, or if it cannot be written.
        """
        if self._is_complete() and not self.shards.exists():
            return True
        try:
            self.hold(0)
        except UserError:
            if self._is_complete():  # the launch that we waited for has completed it and removed the folder
                return True
            raise
        for path in self.shards.glob("process-*.lock"):
            if path != self._lock_path(0):
                self._acquire(path).release()
        if self._is_complete():  # by the launch that we waited for, or by one that was killed right after
            if not self.keep_shards:
                self._clear()
            return True
        manifest = self.shards / "manifest.json"
        if manifest.exists():
            self._check_manifest(manifest, manifest.read_text, f"remove {self.shards}")
        else:
            with atomic_write(manifest) as part:
                part.write_text(json.dumps(self.manifest, indent=2) + "\n")
        # Remove what a killed process was writing.
        shard_parts, png_parts = self.shards.glob(".*.part"), self.folder.glob(".*.part")
        for part in (*shard_parts, *png_parts, *self.npz.parent.glob(f".{self.npz.name}.*.part")):
            part.unlink(missing_ok=True)
        return False

    def hold(self, rank):
        """Lock the set for `rank` until this process ends. Raises UserError if another process holds that rank."""
        if rank and not (self.shards / "manifest.json").exists():
            raise UserError(
                f"process {rank} does not see what process 0 wrote into {self.shards.resolve()}: --sample-dir must "
                "be one folder that all machines share"
            )
        self._lock = self._acquire(self._lock_path(rank))

    def wait_for_others(self, size, batch_size, show=lambda: None):
        """Wait on rank 0 until no image is missing, or all other ranks have ended; return the ranges still missing.

        size: number of ranks of this launch. Calls show() now and then.
        """
        while self.missing(batch_size):
            if all(self._has_ended(rank) for rank in range(1, size)):
                with contextlib.suppress(OSError):  # a network file system rereads a folder that this client changes
                    (self.shards / ".refresh").touch()
                    (self.shards / ".refresh").unlink()
                left = self.missing(batch_size)
                if left:
                    print("other processes ended early: this one samples their images")
                return left
            show()
            time.sleep(0.2)
        return []

    def _lock_path(self, rank):
        return self.shards / f"process-{rank}.lock"

    def _try_lock(self, path, patience):
        """The lock at `path`, or None if another process still holds it after `patience` seconds."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return lock_file(path, patience)
        except OSError as error:
            raise UserError(f"cannot write into {self.folder}: {error.strerror}; name another --sample-dir") from error

    def _acquire(self, path):
        """The lock at `path`. Raises UserError if another process holds it, or if it cannot be written."""
        lock = self._try_lock(path, self.PATIENCE)
        if lock is None:
            raise UserError(f"{self.folder} is in use: wait for the launch that is writing it, or stop that launch")
        return lock

    def _has_ended(self, rank):
        lock = self._try_lock(self._lock_path(rank), 0)
        if lock:
            lock.release()
        return lock is not None

    def _is_complete(self):
        if not self.npz.exists():
            return False
        self._check_manifest(self.npz, lambda: str(read_arrays(self.npz, ["manifest"])[0]["manifest"]), "move it away")
        return True

    def _check_manifest(self, path, read, way_out):
        """Raise UserError if the manifest in `path`, whose JSON read() returns, differs from this one.

        A missing key equals None: older manifests have fewer keys. way_out: advice for a damaged file.
        """
        try:
            found = dict(json.loads(read()))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        except Exception as error:  # NumPy and zipfile raise all kinds of exceptions for damaged bytes
            raise UserError(f"{path} is damaged or not ours: {way_out}, or name another --sample-dir") from error
        found.pop("timm", None)  # in older manifests; our layers compute what timm's did, bit for bit
        differences = [
            f"{name} was {_short(found.get(name))}, now it is {_short(self.manifest.get(name))}"
            for name in sorted(found.keys() | self.manifest.keys())
            if found.get(name) != self.manifest.get(name)
        ]
        if differences:
            text = "; ".join(differences)
            raise UserError(f"{path} was made with other settings: {text}; keep them, or name another --sample-dir")

    def finished(self):
        """The ranges (start, stop) of the shards, sorted, without overlaps. Raises OSError if they are unreadable."""
        ranges, covered = [], 0
        names = [re.fullmatch(r"(\d{7,})-(\d{7,})\.npz", name) for name in os.listdir(self.shards)]
        for start, stop in sorted(tuple(map(int, name.groups())) for name in names if name):
            if start >= covered:
                ranges.append((start, stop))
                covered = stop
        return ranges

    def count_finished(self):
        """The number of finished images."""
        return self.count if self.npz.exists() else sum(stop - start for start, stop in self.finished())

    def missing(self, batch_size):
        """The ranges (start, stop) without a shard, cut at multiples of `batch_size`."""
        ranges, covered = [], 0
        for start, stop in [*self.finished(), (self.count, self.count)]:
            while covered < start:
                end = min(start, (covered // batch_size + 1) * batch_size)
                ranges.append((covered, end))
                covered = end
            covered = stop
        return ranges

    def damaged(self, ranges):
        """Those of the finished `ranges` whose shards do not hold what was written."""
        damaged = []
        for start, stop in ranges:
            try:
                for _ in self._read(start, stop):
                    pass
            except Damaged:
                damaged.append((start, stop))
        return damaged

    def remove(self, start, stop):
        """Remove a shard."""
        self._shard(start, stop).unlink(missing_ok=True)

    def write(self, start, images, labels):
        """Write images uint8 (N, H, W, 3) and labels int64 (N,) from number `start` on: first PNGs, then the shard."""
        if self.pngs:
            self._write_pngs(start, images)
        with atomic_write(self._shard(start, start + len(images))) as part, part.open("wb") as file:
            write_npz(file, images=images, labels=labels)

    def check_space(self):
        """Print a note if the disk seems too small for the missing shards and the .npz made from all of them."""
        needed = (2 * self.count - self.count_finished()) * 3 * self.size**2
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            print(f"note: {self.folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB will be written")

    def _shard(self, start, stop):
        return self.shards / f"{start:07d}-{stop:07d}.npz"

    def _read(self, start, stop):
        """Yield the labels of a shard, int64 (N,), then its images, uint8 (n, H, W, 3). Raises as `_unreadable`."""
        path, missing = self._shard(start, stop), stop - start
        try:
            (labels,) = read_parts(path, "labels", missing)
            if labels.shape != (missing,) or labels.dtype != np.int64:
                raise ValueError(f"labels {labels.dtype} {labels.shape}")
            yield labels
            for images in read_parts(path, "images", ROWS):
                if images.shape[1:] != (self.size, self.size, 3) or images.dtype != np.uint8:
                    raise ValueError(f"images {images.dtype} {images.shape}")
                missing -= len(images)
                yield images
            if missing:
                raise ValueError(f"{missing} images are missing")
        except Exception as error:
            raise _unreadable(path, error) from error

    def assemble(self, progress=iter):
        """Write the .npz of an open set from its shards, whole or not at all, then remove the shards.

        Holds `ROWS` images at a time. progress: wraps the iterable of shards. Returns the SHA-256 of arr_0's bytes.
        Raises UserError if images are missing, a shard is damaged (it is removed), or the file cannot be written.
        """
        ranges = self.finished()
        missing = self.count - sum(stop - start for start, stop in ranges)
        if missing:
            raise UserError(f"{missing} images are missing in {self.shards}: run the same command again")
        digest, labels = hashlib.sha256(), []

        def parts():
            for start, stop in progress(ranges):
                try:
                    shard, number = self._read(start, stop), start
                    labels.append(next(shard))
                    for images in shard:
                        if self.pngs:
                            self._write_pngs(number, images)
                        digest.update(images)
                        yield images
                        number += len(images)
                except Damaged as error:
                    self.remove(start, stop)
                    raise UserError(f"{error} and was removed: the same command samples it again") from error

        arr_0 = (self.count, self.size, self.size, 3), np.uint8, parts()
        # A generator, because the labels are known only after the images are written.
        all_labels = (self.count,), np.int64, (np.concatenate(labels) for _ in range(1))
        with atomic_write(self.npz) as part, part.open("wb") as file:
            write_npz(file, arr_0=arr_0, labels=all_labels, manifest=np.array(json.dumps(self.manifest)))
        if not self.keep_shards:
            self._clear()
        return digest.hexdigest()

    def complete_pngs(self):
        """Write the missing PNGs of a complete set, if PNGs are requested. Raises UserError if the set is damaged."""
        if not self.pngs:
            return
        try:
            for number, images in enumerate(read_parts(self.npz, "arr_0", ROWS)):
                self._write_pngs(number * ROWS, images)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{self.npz} cannot be read ({error}): move it away and run the command again") from error

    def _write_pngs(self, start, images):
        """Write `images`, from number `start` on, as PNGs; leave files that show them already."""
        from PIL import Image

        def save(image, path):
            if not _shows(path, image):
                with atomic_write(path) as part:
                    Image.fromarray(image).save(part, format="png")

        paths = [self.folder / f"{number:06d}.png" for number in range(start, start + len(images))]
        # Pillow lets other threads run while it compresses.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(save, images, paths))

    def _clear(self):
        """Remove the folder of the shards, and the folder above it if it holds no PNGs."""
        self._lock.release()  # a network file system keeps a file that is open
        for pattern in ("*-*.npz", ".*.part", ".refresh", "manifest.json", "process-*.lock"):
            for path in self.shards.glob(pattern):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a folder is not removed if it holds PNGs, or something of the user's
            self.shards.rmdir()
            self.folder.rmdir()


def _short(value):
    """A value of a manifest as text for a message; hashes are shortened."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}...{text[-3:]}"


def _shows(path, image):
    """Whether the file at `path` is a picture of the uint8 image (H, W, 3)."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return np.array_equal(np.asarray(picture), image)
    except (OSError, SyntaxError, ValueError):  # missing or damaged
        return False


def _unreadable(path, error):
    """The exception for an `error` in reading `path`: `Damaged`, or a UserError if the file may be whole."""
    if isinstance(error, OSError | MemoryError):
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        return UserError(f"cannot read {path}: {reason}; if that does not pass, remove the file")
    # NumPy and zipfile raise all kinds of exceptions for damaged bytes.
    return Damaged(f"{path} is damaged ({error})")
