"""Training data from a folder of images."""

import hashlib
import os
import re
import unicodedata
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from runtime.errors import UserError
from runtime.pictures import find_pictures, load_image


def center_crop(image, size):
    """Crop the middle square of a PIL image and scale it to size x size pixels, as for the released models.

    Halves with a box filter while the image is at least twice too large, then scales bicubically (Dhariwal and Nichol
    2021). Raises ValueError if the image is so narrow that this takes too much memory.
    """
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    if max(image.size) * scale * size > 2**27:  # a line of 50,000 pixels would take 13 GB
        raise ValueError(f"{image.width}x{image.height} pixels are too narrow for a square")
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class ImageSource:
    """The images of a folder with one subfolder per class, as float32 (3, S, S) in [-1, 1].

    spec: the model's `ModelSpec`; S is its image size. files: [(path, label)], sorted by label and path.
    notes: texts about entries that are left out, and about labels that may surprise.
    Raises UserError if there is no such folder, it has no images, not as many classes as the model, or subfolders whose
    names contradict each other about their labels.
    """

    kind = "images"

    def __init__(self, path, spec):
        self.path, self.size = str(path), spec.image_size
        root = os.path.expanduser(self.path)
        pictures, left_out = find_pictures(root)
        classes, outside = defaultdict(list), []
        for picture in sorted(pictures, key=os.path.split):
            folder, below, _ = picture[len(root) :].lstrip(os.sep).partition(os.sep)
            (classes[folder] if below else outside).append(picture)
        self.notes = [left_out] if left_out else []
        if outside:
            self.notes.append(f"{path}: left out images in no subfolder: {len(outside)}, the first is {outside[0]}")
        _check_classes(path, root, list(classes), spec, "".join(f"; {note}" for note in self.notes))
        order = order_classes(path, list(classes), spec.class_names)
        if order != sorted(order):
            label = next(label for label, folder in enumerate(sorted(order)) if folder != order[label])
            self.notes.append(f"{path}: the names of its folders give their labels: {order[label]} has label {label}")
        elif (spec.class_names or spec.num_classes == 1000) and not re.search(r"\d", order[0]):
            if not (spec.class_names and _order_by_name(path, order, spec.class_names)):
                self.notes.append(f"{path}: labels are the alphabetical order of its folders: {order[0]} has label 0")
        self.files = [(picture, label) for label, folder in enumerate(order) for picture in classes[folder]]
        # Class c is files[starts[c]:starts[c + 1]].
        self.starts = np.searchsorted([label for _, label in self.files], range(len(order) + 1)).tolist()

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
                skipped.append(" ".join(str(error).splitlines()))  # a name may hold line breaks
                check_skipped(skipped, len(self))
                continue
            x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1)
            return (x.flip(-1) if flip else x), label, "\n".join(skipped)
        raise UserError(f"no image of class {label} can be read, the last was {skipped[-1]}: replace or remove them")

    __getitem__ = load

    def fingerprint(self):
        """Return a SHA-256 of the file names and labels."""
        root = len(os.path.expanduser(self.path).rstrip(os.sep))
        names = "\n".join(f"{path[root + 1 :].replace(os.sep, '/')} {label}" for path, label in self.files)
        return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()


def _check_classes(path, root, folders, spec, notes):
    """Raise UserError if not each folder in `root` has images, or `folders`, which have, are not the model's number."""
    if not folders:
        raise UserError(f"--data-path {path} has no images in a subfolder per class: name a folder that has{notes}")
    for entry in os.scandir(root):
        loops = Path(os.path.realpath(root)).is_relative_to(os.path.realpath(entry.path))
        if os.path.isdir(entry.path) and entry.name not in folders and not entry.name.startswith(".") and not loops:
            raise UserError(f"{entry.path} holds no images: it is no class, so move it away, or add its images{notes}")
    if len(folders) != spec.num_classes:
        if spec.class_names:  # names the folder or the class that is too much
            order_classes(path, folders, spec.class_names)
        named = ", ".join(sorted(folders)[:10]) + ", ..." * (len(folders) > 10)
        raise UserError(
            f"{path} has {len(folders)} classes, the model {spec.num_classes}: pass the model's own data, not "
            f"{named}{notes}"
        )


def order_classes(path, folders, class_names=None):
    """Order the names of class folders by label.

    A folder with the name of a class of the model has its label. If all names begin or end with numbers, from 0 to
    N - 1, these are the labels ("7", "07_sneaker", "class7", "sneaker-7"). Else labels are in alphabetical order, as by
    torchvision's ImageFolder. path: of the data. class_names: of the model, one per label, or None.
    Raises UserError if only some names are of classes, or if other numbers contradict the alphabetical order.
    """
    if class_names and (named := _order_by_name(path, folders, class_names)):
        return named
    folders = sorted(folders)
    for pattern, begins in ((r"(\D*)(\d+)", True), (r"(\d+)(\D*)$", False)):
        found = [(re.match if begins else re.search)(pattern, folder, re.ASCII) for folder in folders]
        if not all(found) or len({match[1 if begins else 2] for match in found}) > 1:
            continue  # the text before the number, or after it, differs
        numbers = [int(match[2 if begins else 1]) for match in found]
        if sorted(numbers) == list(range(len(folders))):
            return [folder for _, folder in sorted(zip(numbers, folders))]
        if begins and len(set(numbers)) == len(numbers) and numbers != sorted(numbers):
            raise UserError(
                f"{path} has folders that are numbered, but not from 0 to {len(folders) - 1}, and whose alphabetical "
                f"order is another ({folders[0]}, {folders[1]}, ...): name each by its label, 0 to {len(folders) - 1}"
            )
    return folders


def _order_by_name(path, folders, class_names):
    """Order folders that are named as the classes of a model; None if no folder is.

    Only letters and digits count, small or capital. A name may have synonyms behind commas, and a folder a number in
    front of the name. Raises UserError if some folders fit no class, or more than one.
    """

    def plain(name):
        return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", name).casefold())

    labels = defaultdict(set)
    for label, name in enumerate(class_names):
        for key in {name, *map(plain, (name, *name.split(",")))}:
            labels[key].add(label)
    fitting = {}
    for folder in folders:
        names = [folder, re.sub(r"^\d+[\W_]+", "", folder)]
        keys = [folder, *(plain(text) for name in names for text in (name, name.partition(",")[0]))]
        fitting[folder] = next((labels[key] for key in keys if key and key in labels), set())
    if not any(fitting.values()):
        return None
    for folder, fits in fitting.items():
        if len(fits) != 1:
            raise UserError(
                f"{path}: the folder {folder} is named as {'several' if fits else 'none'} of the model's classes, but "
                f"others are named as one: name each as its class, or as its label, 0 to {len(class_names) - 1}"
            )
    order = {}
    for folder, (label,) in fitting.items():
        if label in order:
            raise UserError(
                f"{path}: the folders {order[label]} and {folder} are both named as the class {class_names[label]}: "
                "join them"
            )
        order[label] = folder
    for label, name in enumerate(class_names):
        if label not in order:
            raise UserError(
                f"{path} has {len(folders)} classes, the model {len(class_names)}: there is no folder for {name}"
            )
    return [folder for _, folder in sorted(order.items())]


def check_skipped(skipped, total):
    """Raise UserError if the images of `skipped`, which cannot be read, are more than 1 % of `total` images."""
    if len(skipped) > 0.01 * total:
        raise UserError(
            f"{len(skipped)} of {total} images cannot be read, more than 1 %; the first is {sorted(skipped)[0]}: "
            "replace or remove them"
        )
