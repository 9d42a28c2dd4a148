"""Training samples: images or latents made once, in an order and with a randomness that no process can change.

Sample k of a training (k counts over all updates and processes) is the same image, mirrored or not, with the same
label dropped or not and the same noise, whichever process or data loading worker makes it: its random numbers follow
the seed and k alone.
"""

import functools
import hashlib
import json
import os
from math import prod
from pathlib import Path

import numpy as np
import torch

from runtime.errors import UserError
from runtime.pictures import load_image


def center_crop(image, size):
    """A PIL image of any size -> size x size pixels: the middle square, as the released models were trained.

    Halved with a box filter while twice as large as needed, then scaled bicubically (Dhariwal and Nichol 2021).
    """
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class ImageSource:
    """A folder of images, a folder a class, as numbers: float32 (3, S, S) in [-1, 1].

    files: [(path, label)]; S is the image size of `spec`.
    Raises UserError where there is no such folder, it has no images, or as many classes as the model has not.
    """

    kind = "images"

    def __init__(self, path, spec):
        from torchvision.datasets import ImageFolder

        if not Path(path).is_dir():
            raise UserError(f"no such folder: {path}; --data-path names a folder of images, a folder a class")
        try:
            folder = ImageFolder(path)
        except FileNotFoundError as error:
            raise UserError(f"{path} has no images, a folder a class: {str(error).splitlines()[0]}") from error
        if len(folder.classes) != spec.num_classes:
            # Labels are the alphabetical order of the folders, so a part of them would be labelled wrongly.
            raise UserError(
                f"{path} has {len(folder.classes)} classes, the model {spec.num_classes}: name the model's own data"
            )
        self.path, self.files, self.size = str(path), folder.samples, spec.image_size
        # The files are sorted by class: class c is self.starts[c] to self.starts[c + 1].
        self.starts = np.searchsorted([label for _, label in self.files], range(len(folder.classes) + 1)).tolist()

    def __len__(self):
        return len(self.files)

    def load(self, index, flip=False):
        """Image `index`, mirrored where `flip`, its label, and what could not be read in its place.

        A file that cannot be decoded gives way to the next of its class. Raises UserError where those that cannot are
        more than 1 % of all files, or all of the class.
        """
        skipped, label = [], self.files[index][1]
        start, end = self.starts[label : label + 2]
        while True:
            try:
                path = self.files[start + (index - start + len(skipped)) % (end - start)][0]
                image = center_crop(load_image(path), self.size)
                break
            except ValueError as error:
                skipped.append(str(error))
                check_skipped(skipped, self)
                if len(skipped) == end - start:
                    raise UserError(f"no image of class {label} can be read, the last was {error}") from error
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1)
        return (x.flip(-1) if flip else x), label, skipped

    def fingerprint(self):
        """A SHA-256 of the files' names and labels: tells one set of images from another."""
        root = len(self.path.rstrip(os.sep))
        names = "\n".join(f"{path[root + 1 :].replace(os.sep, '/')} {label}" for path, label in self.files)
        return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()


def check_skipped(skipped, data):
    """Raises UserError where `skipped`, images that could not be read, are more than 1 % of all of `data`."""
    if len(skipped) > 0.01 * len(data):
        raise UserError(
            f"{len(skipped)} of {len(data)} images cannot be read, more than 1 %; the first is {sorted(skipped)[0]}: "
            "replace or remove them"
        )


SHARD = 1024  # images in a file of latents: 34 MB at 256 pixels with both flips


class LatentSource:
    """What `extract_latents` wrote: the moments of the VAE's posterior, float32 (2C, h, w), image by image.

    Raises UserError where the folder is incomplete, of another VAE, image size or number of classes, or has no
    mirrored images and the model wants them.
    """

    kind = "moments"

    def __init__(self, folder, spec, vae_fingerprint):
        self.folder = Path(folder)
        try:
            self.about = json.loads((self.folder / "latents.json").read_text())
            labels = np.load(self.folder / "labels.npy", allow_pickle=False)
            about = {name: self.about[name] for name in ("vae", "image_size", "num_classes", "flips", "images")}
            if labels.ndim != 1 or labels.dtype.kind != "i" or not isinstance(about["images"], int):
                raise ValueError("its labels or their number are not whole numbers")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder} is no folder of latents ({error}): write one with --extract-latents {folder}"
            ) from error
        missing = [p.name for p in map(self.shard_path, range(-(-about["images"] // SHARD))) if not p.is_file()]
        if missing or len(labels) != about["images"] or not self.about.get("complete"):
            raise UserError(f"the latents in {folder} are not complete: start --extract-latents {folder} again")
        for name, wanted in (("image_size", spec.image_size), ("num_classes", spec.num_classes)):
            if about[name] != wanted:
                raise UserError(
                    f"the latents in {folder} have {name} {about[name]}, model {spec.name} {wanted}: "
                    "extract them for this model"
                )
        if about["vae"] != vae_fingerprint:
            raise UserError(
                f"the latents in {folder} were made by another VAE than {spec.vae}: extract them with this one"
            )
        if spec.horizontal_flip and not about["flips"]:
            raise UserError(f"the latents in {folder} have no mirrored images, which {spec.name} is trained on")
        if labels.min(initial=0) < 0 or labels.max(initial=0) >= spec.num_classes:
            raise UserError(f"{folder} has labels beyond 0 to {spec.num_classes - 1}: extract the latents again")
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def shard_path(self, shard):
        """The file of the `shard`-th part."""
        return self.folder / f"{shard:06d}.npy"

    # Opening a file anew for each sample would cost time, and of open ones a process may have 1024. They are not mapped
    # into memory: a map of a file that is cut off while it is read kills the process.
    @functools.lru_cache(maxsize=256)  # noqa: B019
    def _shard(self, shard):
        """A file of latents, open; where its values start; their shape. Raises ValueError where it is another file."""
        file = self.shard_path(shard).open("rb")
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("another version of .npy")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        if fortran_order or dtype != np.float16 or len(shape) != 5 or shape[1] != 1 + self.about["flips"]:
            raise ValueError(f"{dtype} {shape}")
        return file, file.tell(), shape

    def load(self, index, flip=False):
        """Moments (2C, h, w) of image `index`, mirrored where `flip`, its label, and no files that were skipped.

        Raises UserError where they cannot be read.
        """
        try:
            file, start, (_, flips, *shape) = self._shard(index // SHARD)
            size = 2 * prod(shape)  # bytes
            values = os.pread(file.fileno(), size, start + (index % SHARD * flips + flip) * size)
            moments = np.frombuffer(values, np.float16).reshape(shape)
        except (OSError, ValueError) as error:
            path = self.shard_path(index // SHARD)
            raise UserError(f"{path} cannot be read ({error}): remove it and extract the latents again") from error
        return torch.from_numpy(moments.astype(np.float32)), int(self.labels[index]), []

    def fingerprint(self):
        """A text that is another one for other images: `prepare_latents` keeps that of the files."""
        return self.about["files"]
