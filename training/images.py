"""Training data from a folder of images."""

import hashlib
import os

import numpy as np
import torch

from runtime.errors import UserError, first_line
from runtime.pictures import load_image


def center_crop(image, size):
    """Crop the middle square of a PIL image and scale it to size x size pixels, as for the released models.

    Halves with a box filter while the image is at least twice too large, then scales bicubically (Dhariwal and Nichol
    2021).
    """
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class ImageSource:
    """The images of a folder with one subfolder per class, as float32 (3, S, S) in [-1, 1].

    spec: the model's `ModelSpec`; S is its image size. files: [(path, label)], sorted by class.
    Raises UserError if there is no such folder, it has no images, or not as many classes as the model.
    """

    kind = "images"

    def __init__(self, path, spec):
        from torchvision.datasets import ImageFolder

        try:
            folder = ImageFolder(path)
        except OSError as error:
            raise UserError(
                f"--data-path {path} has no images in a subfolder per class: {first_line(error)}"
            ) from error
        if len(folder.classes) != spec.num_classes:
            # Labels are the alphabetical order of the subfolders: if some are missing, the others get wrong labels.
            raise UserError(
                f"{path} has {len(folder.classes)} classes, the model {spec.num_classes}: pass the model's own data"
            )
        self.path, self.files, self.size = str(path), folder.samples, spec.image_size
        # Class c is files[starts[c]:starts[c + 1]].
        self.starts = np.searchsorted([label for _, label in self.files], range(len(folder.classes) + 1)).tolist()

    def __len__(self):
        return len(self.files)

    def load(self, index, flip=False):
        """Return image `index`, mirrored if `flip`, its label, and the names of skipped files, one per line.

        A file that cannot be decoded is replaced by the next one of its class. Raises UserError if such files are more
        than 1 % of all, or all of the class.
        """
        skipped, label = [], self.files[index][1]
        start, end = self.starts[label : label + 2]
        for k in range(end - start):
            path, _ = self.files[start + (index - start + k) % (end - start)]
            try:
                image = center_crop(load_image(path), self.size)
            except ValueError as error:
                skipped.append(str(error))
                check_skipped(skipped, len(self))
                continue
            x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1)
            return (x.flip(-1) if flip else x), label, "\n".join(skipped)
        raise UserError(f"no image of class {label} can be read, the last was {skipped[-1]}: replace or remove them")

    __getitem__ = load

    def fingerprint(self):
        """Return a SHA-256 of the file names and labels."""
        root = len(self.path.rstrip(os.sep))
        names = "\n".join(f"{path[root + 1 :].replace(os.sep, '/')} {label}" for path, label in self.files)
        return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()


def check_skipped(skipped, total):
    """Raise UserError if the images of `skipped`, which cannot be read, are more than 1 % of `total` images."""
    if len(skipped) > 0.01 * total:
        raise UserError(
            f"{len(skipped)} of {total} images cannot be read, more than 1 %; the first is {sorted(skipped)[0]}: "
            "replace or remove them"
        )
