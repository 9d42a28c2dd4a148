"""Evaluation sets: an .npz of images or statistics, or a folder of pictures; images are read in batches.

An .npz may hold images (`arr_0`, (N, H, W, 3)), statistics of their features as the ADM evaluator stores them (`mu,
sigma, mu_s, sigma_s`), and what `save_statistics` adds: pool features (`pool`) and `about`, JSON about the images and
the graph. Instead of images, `arr_0` may be features of any network, floats (N, D).
"""

import contextlib
import hashlib
import json
import os
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from evaluation.metrics import statistics
from evaluation.npz import read_arrays, read_header, read_parts, write_npz
from runtime.errors import UserError, first_line
from runtime.files import atomic_write
from runtime.hashes import CHUNK
from runtime.pictures import find_pictures, load_image

STATISTICS = "mu", "sigma", "mu_s", "sigma_s"
MOMENTS = STATISTICS[:2]  # of pool features
LOSSY = {"AVIF", "GIF", "JPEG", "JPEG2000", "WEBP"}  # formats that change pixels


class EvaluationSet:
    """The images and statistics at `path`.

    count, size, dtype: number of images, their (height, width) and NumPy type; None without images.
    stored: those of `STATISTICS` and "pool" that the file holds, {name: array}.
    features: whether the file holds features of any network: they are stored as "pool", `MOMENTS` follow from them.
    about: what `save_statistics` wrote beside them, or {}.
    doubts: a line of text for each thing that looks like a mistake before images are read.
    """

    def __init__(self, path):
        self.path, self.stored, self.about, self.doubts = Path(path), {}, {}, []
        self.count = self.size = self.dtype = None
        self.features = False
        self._files = [self.path]

    def __str__(self):
        return str(self.path)

    def missing(self, names):
        """Those of `names`, as in `stored`, that are neither stored nor follow from what is."""
        return {*names} - self.stored.keys() - ({*MOMENTS} if self.features else set())

    def take(self, names):
        """Those of `names` that are not `missing`, as {name: array}. Raises UserError if a value is not finite."""
        arrays = {name: self.stored[name] for name in {*names} & self.stored.keys()}
        if self.features and {*names} & {*MOMENTS}:
            try:
                arrays |= zip(MOMENTS, statistics(self.stored["pool"]))
            except ValueError as error:
                raise UserError(f"{self}: {error}") from error
        return arrays

    def batches(self, count):
        """Yield arrays (n, H, W, 3) of `dtype`, n = `count` except for the last; a thread reads the next one.

        Raises UserError if an image cannot be read.
        """
        with ThreadPoolExecutor(1) as reader:
            parts = self._read(count)
            following = reader.submit(next, parts, None)
            while (part := following.result()) is not None:
                following = reader.submit(next, parts, None)
                yield part

    def sha256(self):
        """SHA-256 of the file, or of the bytes of all images of a folder in their order."""
        digest = hashlib.sha256()
        for path in self._files:
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
        return digest.hexdigest()

    def is_same(self, other):
        """Whether both are the same file or folder, or copies."""
        if os.path.samefile(self.path, other.path):
            return True
        mine, theirs = ([file.stat().st_size for file in images._files] for images in (self, other))
        return mine == theirs and self.sha256() == other.sha256()


# What `save_statistics` is given as `about`: a rule for each name. None stands for what is not known.
ABOUT = {
    "images": lambda value: type(value) is int,
    "image_size": lambda value: isinstance(value, list) and [*map(type, value)] == [int, int],
    "graph": lambda value: isinstance(value, str),
}


def _native(name, array):
    """An array of numbers that torch has, in the byte order of this machine. Raises ValueError if it holds others."""
    if array.dtype.kind not in "fiu" or array.dtype.itemsize > 8:
        raise ValueError(f"its {name} is {array.dtype}, not numbers of up to 64 bits")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


class NpzSet(EvaluationSet):
    """An .npz file. Raises UserError if it is damaged or holds neither images nor statistics."""

    def __init__(self, path):
        super().__init__(path)
        with self._explained():
            self.stored, names = read_arrays(path, (*STATISTICS, "pool", "about"))
            self.about = dict(json.loads(str(self.stored.pop("about", "{}"))))
            self.stored = {name: _native(name, array) for name, array in self.stored.items()}
            for name, rule in ABOUT.items():
                if self.about.get(name) is not None and not rule(self.about[name]):
                    raise ValueError(f"its {name} is {self.about[name]!r}")
            shape, dtype = read_header(path, "arr_0") if "arr_0" in names else ((), None)
            if len(shape) == 2:
                self._read_features(shape, dtype)
            elif dtype is not None:
                self.dtype = dtype
                if len(shape) != 4 or shape[3] != 3 or 0 in shape:
                    raise UserError(
                        f"{path}: arr_0 is {shape}: images (N, H, W, 3) are needed, at least one, or features (N, D)"
                    )
                if self.dtype != np.uint8 and self.dtype.kind != "f":
                    raise UserError(f"{path}: arr_0 is {self.dtype}: save images as uint8, from 0 to 255")
                self.count, self.size = shape[0], shape[1:3]
        if self.count is None and not self.stored:
            raise UserError(
                f"{path} has no arr_0, the images (N, H, W, 3), and no statistics ({', '.join(STATISTICS)}); it has "
                f"{', '.join(names) or 'nothing'}"
            )

    def _read_features(self, shape, dtype):
        """Read arr_0 as features. Raises UserError if there is no distribution of them, or statistics beside them."""
        if dtype.kind != "f" or dtype.itemsize > 8 or shape[0] < 2 or not shape[1]:
            raise UserError(
                f"{self.path}: arr_0 is {dtype} {shape}: features are floats (N, D) of up to 64 bits, at least two, "
                "images (N, H, W, 3)"
            )
        if self.stored:
            raise UserError(f"{self.path} holds features and {', '.join(sorted(self.stored))}: keep either")
        self.stored = {"pool": _native("arr_0", read_arrays(self.path, ["arr_0"])[0]["arr_0"])}
        self.about, self.features = {"images": shape[0]}, True

    @contextlib.contextmanager
    def _explained(self):
        """Turn the exceptions of NumPy and zipfile for a damaged file into a UserError."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = first_line(error)
            if isinstance(error, OSError) and error.strerror:
                reason = error.strerror
            elif not zipfile.is_zipfile(self.path):
                reason = "it is not an .npz, or is cut off"
            raise UserError(f"{self.path} cannot be read ({reason}): write or fetch it again") from error

    def _read(self, count):
        with self._explained():
            if read_header(self.path, "arr_0") != ((self.count, *self.size, 3), self.dtype):
                raise ValueError("it has changed since it was opened")
            yield from read_parts(self.path, "arr_0", count)


class PictureFolder(EvaluationSet):
    """The pictures in a folder and its subfolders, sorted by path. Raises UserError if there are none."""

    def __init__(self, path):
        super().__init__(path)
        pictures, left_out = find_pictures(path)
        self._files = sorted(map(Path, pictures))
        if not self._files:
            notes = f"; {left_out}" if left_out else ""
            raise UserError(f"{path} holds no .png or other pictures: name a folder of pictures, or an .npz{notes}")
        self.doubts = [*([left_out] if left_out else []), *self._format_doubts()]
        self.count, self.dtype = len(self._files), np.dtype(np.uint8)
        self.size = self._image(self._files[0]).shape[:2]

    def _format_doubts(self):
        from PIL import Image

        names = Counter(Image.registered_extensions().get(file.suffix.lower(), file.suffix) for file in self._files)
        text = f"{self.path} holds {' and '.join(f'{count} {name}' for name, count in sorted(names.items()))} images"
        if lossy := sorted(names.keys() & LOSSY):
            yield f"{text}: what {' and '.join(lossy)} lost changes FID"
        elif len(names) > 1:
            yield text
        stems = Counter(file.with_suffix("") for file in self._files)
        if twins := [file for file in self._files if stems[file.with_suffix("")] > 1]:
            yield f"{len(twins)} images differ only in their ending, as {twins[0]} and {twins[1].name}: all are used"

    def _image(self, path):
        try:
            pixels = np.asarray(load_image(path))
        except ValueError as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise UserError(
                f"{path} is not a picture that can be read ({reason}): write it again, or remove it"
            ) from error
        if self.size and pixels.shape[:2] != self.size:
            raise UserError(
                f"{path} is {pixels.shape[1]}x{pixels.shape[0]} pixels, {self._files[0].name} is "
                f"{self.size[1]}x{self.size[0]}: all images must have the same size"
            )
        return pixels

    def _read(self, count):
        with ThreadPoolExecutor() as decoders:
            for start in range(0, self.count, count):
                yield np.stack(list(decoders.map(self._image, self._files[start : start + count])))


def open_evaluation_set(path):
    """The `EvaluationSet` at a path. Raises UserError if there is none."""
    return PictureFolder(path) if Path(path).is_dir() else NpzSet(path)


def save_statistics(path, arrays, about, keep=None):
    """Write an .npz of statistics, which can replace the images.

    arrays: {name: array} of `STATISTICS` and "pool", features float32 (M, D); keep: write only this many of them,
    evenly spaced. about: a dict of JSON types. Raises UserError if the file cannot be written.
    """
    pool = arrays["pool"]
    if keep and keep < len(pool):
        pool = pool[np.linspace(0, len(pool) - 1, keep).round().astype(int)]
    with atomic_write(path) as part:
        write_npz(part, **{name: arrays[name] for name in STATISTICS}, pool=pool, about=np.array(json.dumps(about)))


class ImageChecks:
    """Looks through the images of an `EvaluationSet`, batch by batch, for mistakes."""

    def __init__(self, images):
        self._images, self._seen, self._plain = images, 0, []
        self._low, self._high = np.inf, -np.inf
        self._values = set() if images.dtype == np.uint8 else None  # those seen, while all are 0, 1 or 255

    def add(self, batch):
        """Check the next batch (n, H, W, 3). Raises UserError for NaN and infinite values."""
        first = self._seen
        self._seen += len(batch)
        if self._images.dtype.kind == "f":
            flat = batch.reshape(len(batch), -1)
            bad = np.flatnonzero(~np.isfinite(flat).all(1))
            if len(bad):
                raise UserError(
                    f"{self._images}: image {first + bad[0]} holds values that are NaN or infinite: make it again"
                )
        self._low, self._high = min(self._low, batch.min()), max(self._high, batch.max())
        if self._values is not None:
            self._values = self._values | set(np.unique(batch)) if (batch + np.uint8(1) <= 2).all() else None
        plain = (batch == batch[:, :1, :1]).reshape(len(batch), -1).all(1)
        self._plain += (first + np.flatnonzero(plain)).tolist()

    def doubts(self):
        """A line of text for each thing that looks like a mistake."""
        lines, values = [], f"with values from {self._low:g} to {self._high:g}"
        unscaled = self._values and 1 in self._values  # floats from -1 to 1 become 255, 0 and 1
        if unscaled:
            values = f"with the values {', '.join(map(str, sorted(self._values)))} only"
        line = f"{self._images}: the images are {self._images.dtype} {values}"
        if self._low < 0 or self._high > 255 or self._high <= 1 or self._high - self._low <= 2 or unscaled:
            line += ", but 0 to 255 is expected: the metrics mean nothing, scale the images and save them as uint8"
            lines.append(line)
        elif self._images.dtype.kind == "f":
            lines.append(f"{line}: published metrics are of uint8 images")
        if self._plain:
            lines.append(
                f"{self._images}: {len(self._plain)} of {self._seen} images have a single colour, the first is number "
                f"{self._plain[0]}"
            )
        return lines
