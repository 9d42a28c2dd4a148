"""Sets of images to evaluate: an .npz, a folder of PNGs, or what was kept of one; read in batches, never held whole.

An .npz may hold images (`arr_0`, (N, H, W, 3)), statistics of their features as the ADM evaluator stores them (`mu,
sigma, mu_s, sigma_s`), and what `save_statistics` adds: pool features (`pool`) and `about`, JSON that says of which
images by which graph. Knows no network.
"""

import contextlib
import hashlib
import json
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from evaluation.npz import read_arrays, read_header, read_parts, write_npz
from runtime.errors import UserError
from runtime.files import atomic_write

STATISTICS = "mu", "sigma", "mu_s", "sigma_s"
BLOCK = 1 << 20  # bytes read and hashed at a time


class EvaluationSet:
    """The images and statistics at `path`.

    count, size, dtype: how many images there are, their (height, width), their NumPy type; None without images.
    stored: arrays by name, of `STATISTICS` and "pool" those that the file holds.
    about: what `save_statistics` wrote beside them, else {}.
    """

    def __init__(self, path):
        self.path, self.stored, self.about = Path(path), {}, {}
        self.count = self.size = self.dtype = None

    def __str__(self):
        return str(self.path)

    def batches(self, count):
        """Yields arrays (n, H, W, 3) of `dtype`, n = `count` but for the last; the next is read meanwhile.

        Raises UserError where an image cannot be read.
        """
        with ThreadPoolExecutor(1) as reader:
            parts = self._read(count)
            following = reader.submit(next, parts, None)
            while (part := following.result()) is not None:
                following = reader.submit(next, parts, None)
                yield part

    def sha256(self):
        """The SHA-256 of the file; of a folder that of its images' bytes in their order."""
        digest = hashlib.sha256()
        for path in self._files():
            with path.open("rb") as opened:
                while block := opened.read(BLOCK):
                    digest.update(block)
        return digest.hexdigest()

    def is_same(self, other):
        """Whether the two are one file or folder, or copies."""
        if os.path.samefile(self.path, other.path):
            return True
        sizes = ([file.stat().st_size for file in images._files()] for images in (self, other))
        return next(sizes) == next(sizes) and self.sha256() == other.sha256()


class NpzSet(EvaluationSet):
    """An .npz file. Raises UserError where it is none, is cut off, or holds nothing that can be evaluated."""

    def __init__(self, path):
        super().__init__(path)
        with self._refused():
            self.stored, names = read_arrays(path, (*STATISTICS, "pool", "about"))
            self.about = dict(json.loads(str(self.stored.pop("about", "{}"))))
            if "arr_0" in names:
                shape, self.dtype = read_header(path, "arr_0")
                self._check(shape)
                self.count, self.size = shape[0], shape[1:3]
        if self.count is None and not self.stored:
            raise UserError(
                f"{path} has no arr_0, the images (N, H, W, 3), and no statistics ({', '.join(STATISTICS)}); it has "
                f"{', '.join(names) or 'nothing'}"
            )

    def _check(self, shape):
        if len(shape) != 4 or shape[3] != 3 or 0 in shape:
            raise UserError(f"{self.path}: arr_0 is {shape}: images (N, H, W, 3) are needed, at least one")
        if self.dtype != np.uint8 and self.dtype.kind != "f":
            raise UserError(f"{self.path}: arr_0 is {self.dtype}: save images as uint8, from 0 to 255")

    @contextlib.contextmanager
    def _refused(self):
        """Turns whatever NumPy and zipfile raise of a damaged file into a UserError."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            told = str(error).splitlines()[0] if str(error) else repr(error)
            if isinstance(error, OSError) and error.strerror:
                told = error.strerror
            elif not zipfile.is_zipfile(self.path):
                told = "it is no .npz, or was cut off"
            raise UserError(f"{self.path} cannot be read ({told}): write or fetch it again") from error

    def _read(self, count):
        with self._refused():
            yield from read_parts(self.path, "arr_0", count)

    def _files(self):
        return [self.path]


class PngFolder(EvaluationSet):
    """All .png files in a folder and the folders in it, by name. Raises UserError where there are none."""

    def __init__(self, path):
        super().__init__(path)
        self._paths = sorted(self.path.rglob("*.png"))
        if not self._paths:
            raise UserError(f"{path} holds no .png files: name a folder of images, or an .npz")
        self.count, self.dtype = len(self._paths), np.dtype(np.uint8)
        self.size = self._image(self._paths[0]).shape[:2]

    def _image(self, path):
        from PIL import Image

        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:  # Pillow's ways to say that a file is damaged
            raise UserError(f"{path} is no picture that can be read: write it again, or take it away") from error
        if self.size and pixels.shape[:2] != self.size:
            raise UserError(
                f"{path} is {pixels.shape[1]}x{pixels.shape[0]} pixels, {self._paths[0].name} is "
                f"{self.size[1]}x{self.size[0]}: all images must have one size"
            )
        return pixels

    def _read(self, count):
        with ThreadPoolExecutor() as decoders:
            for start in range(0, self.count, count):
                yield np.stack(list(decoders.map(self._image, self._paths[start : start + count])))

    def _files(self):
        return self._paths


def open_evaluation_set(path):
    """The `EvaluationSet` at a path. Raises UserError where there is none."""
    return PngFolder(path) if Path(path).is_dir() else NpzSet(path)


def save_statistics(path, arrays, about, keep=None):
    """Writes an .npz that is accepted in place of the images.

    arrays: by the names of `STATISTICS` and "pool", features float32 (M, D), of which `keep`, evenly spaced, are
    written, or all. about: a dict of JSON types. Raises UserError where it cannot be written.
    """
    pool = arrays["pool"]
    if keep and keep < len(pool):
        pool = pool[np.linspace(0, len(pool) - 1, keep).round().astype(int)]
    statistics = {name: arrays[name] for name in STATISTICS}
    with atomic_write(path) as part:
        write_npz(part, **statistics, pool=pool, about=np.array(json.dumps(about)))


class ImageChecks:
    """What about images looks like a mistake, collected over batches; `texts()` says it.

    Raises UserError for NaN and infinite values, of which no metric could be computed.
    """

    def __init__(self, images):
        self._images, self._seen, self._constant = images, 0, []
        self._low, self._high = np.inf, -np.inf

    def look(self, batch):
        """Takes in the next batch (n, H, W, 3)."""
        first = self._seen
        self._seen += len(batch)
        if self._images.dtype.kind == "f":
            flat = batch.reshape(len(batch), -1)
            bad = np.flatnonzero(~np.isfinite(flat).all(1))
            if len(bad):
                raise UserError(
                    f"{self._images}: image {first + bad[0]} holds values that are NaN or infinite: make it again"
                )
            self._low, self._high = min(self._low, flat.min()), max(self._high, flat.max())
        plain = (batch == batch[:, :1, :1]).reshape(len(batch), -1).all(1)
        self._constant += (first + np.flatnonzero(plain)).tolist()

    def texts(self):
        """A line for each doubt."""
        texts = []
        if self._images.dtype.kind == "f":
            told = f"{self._images}: arr_0 is {self._images.dtype} with values from {self._low:g} to {self._high:g}"
            if self._low < 0 or self._high > 255 or self._high <= 1:
                told += ", while 0 to 255 are expected: the metrics mean nothing, save the images as uint8"
            else:
                told += ": published metrics are of uint8 images"
            texts.append(told)
        if self._constant:
            texts.append(
                f"{self._images}: {len(self._constant)} of {self._seen} images are of one colour all over, number "
                f"{self._constant[0]} first"
            )
        return texts
