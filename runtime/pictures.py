"""Pictures: finding, reading and comparing them, and writing a grid of them."""

import io
import os
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from runtime.errors import UserError, first_line
from runtime.files import atomic_write

# Not what this Pillow can read: the same files must be pictures on every machine.
ENDINGS = frozenset(
    ".apng .avif .bmp .dds .dib .gif .ico .j2k .jfif .jp2 .jpe .jpeg .jpf .jpg .jpx .pbm .pcx .pfm .pgm .png .pnm .ppm "
    ".psd .qoi .sgi .tga .tif .tiff .webp".split()
)

# Pillow warns of odd metadata and of many pixels, in two lines. A picture is loaded, or refused with its reason.
warnings.filterwarnings("ignore", module=r"PIL\.")


def find_pictures(folder: str | Path) -> tuple[list[str], str]:
    """Find the pictures below a folder, also behind links: their paths, unsorted, and a text about what is left out.

    A picture has one of `ENDINGS`, in capitals or not. Left out are hidden entries (their names begin with a dot),
    files of other endings, and links to a folder that contains them. The text counts them and names the first of each
    kind; it is "" if there are none, or only hidden files that are no pictures. Raises UserError if a folder cannot be
    read.
    """
    pictures, hidden, others, loops = [], [], [], []
    waiting = [(str(folder), (os.path.realpath(folder),))]  # with the real paths of the folders around each
    while waiting:
        place, around = waiting.pop()
        try:
            entries = list(os.scandir(place))
        except OSError as error:
            raise UserError(f"cannot read {place}: {error.strerror}; make it readable, or name another") from error
        for entry in entries:
            is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
            is_picture = not is_folder and os.path.splitext(entry.name)[1].lower() in ENDINGS
            if entry.name.startswith("."):
                hidden += [entry.path] if is_folder or is_picture else []
            elif is_folder:
                real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(around[-1], entry.name)
                if any(Path(outer).is_relative_to(real) for outer in around):
                    loops.append(entry.path)
                else:
                    waiting.append((entry.path, (*around, real)))
            else:
                (pictures if is_picture else others).append(entry.path)
    named = {"hidden entries": hidden, "other files": others, "links to a folder around them": loops}
    parts = [
        f"{name}: {len(paths)}, the first is {os.path.relpath(min(paths), folder)}"
        for name, paths in named.items()
        if paths
    ]
    return pictures, f"{folder}: left out {'; '.join(parts)}" if parts else ""


def load_image(path):
    """Load a picture of any format, mode and depth as a PIL image in RGB, the first if there are several.

    It is not turned as its Exif data asks, and transparency is dropped: the released models were trained on such.
    Raises ValueError if it cannot be decoded, is too large, or has values of an unknown range.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            if image.mode.startswith(("I", "F")):
                image = _to_8_bits(image)
            return image.convert("RGBA" if "transparency" in image.info else "RGB").convert("RGB")
    except MemoryError as error:
        bytearray(2**26)  # raises MemoryError too if memory is short for all pictures, and not only for this
        raise ValueError(f"{path}: it needs more memory than there is") from error
    except Exception as error:  # decoders raise anything for damaged bytes
        reason = error.strerror if isinstance(error, OSError) else None
        raise ValueError(f"{path}: {reason or first_line(error)}") from error


def _to_8_bits(image):
    """Scale a grey image of more than 8 bits, which Pillow would clip. Raises ValueError if its range is unknown."""
    from PIL import Image

    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        full = 1 if high < 2 else 255
    else:  # files of 32 bits hold values of any depth
        full = 255 if image.mode == "I" and image.format not in ("PNG", "PPM") and high <= 255 else 65535
    if not 0 <= low <= high <= full:  # also if they are NaN
        raise ValueError(f"its values are {low:g} to {high:g}, not 0 to {full}: save it with 8 or 16 bits")
    scaled = values // (full // 255) if image.mode != "F" else np.rint(values * 255) if full == 1 else values
    return Image.fromarray(scaled.astype(np.uint8))


def psnr(a: Tensor, b: Tensor, peak: float) -> float:
    """Peak signal-to-noise ratio in dB of two tensors of the same shape; inf if they are equal."""
    return (10 * torch.log10(peak**2 / (a.double() - b.double()).square().mean())).item()


def save_picture(groups: Sequence[Tensor], path: str | Path, columns: int) -> None:
    """Write groups of uint8 images (N, H, W, 3) as a grid; each group begins a row, small images are enlarged.

    Raises UserError if the file cannot be written or its ending names no picture format.
    """
    from PIL import Image

    # White cells fill the last row of a group.
    images = torch.cat([nn.functional.pad(g, (0,) * 7 + (-len(g) % columns,), value=255) for g in groups])
    zoom = max(1, 96 // images.shape[1])
    images = images.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    # Two white pixels on the right of and below each image, then left of and above all.
    cells = nn.functional.pad(images, (0, 0, 0, 2, 0, 2), value=255).unflatten(0, (-1, columns))
    grid = cells.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (height, width, 3)
    grid = nn.functional.pad(grid, (0, 0, 2, 0, 2, 0), value=255).numpy()
    name = picture_format(path)
    with atomic_write(path) as part:
        try:
            Image.fromarray(grid).save(part, format=name)
        except (ValueError, RuntimeError, struct.error) as error:  # a WebP has at most 16383 pixels per side
            size = f"{grid.shape[1]}x{grid.shape[0]}"
            raise UserError(f"{path}: {name} cannot hold {size} pixels ({first_line(error)}): use .png") from error


def picture_format(path: str | Path) -> str:
    """Pillow's name for the format that the ending of `path` means. Raises UserError if it cannot be written in RGB."""
    from PIL import Image

    name, size, trial = Image.registered_extensions().get(Path(path).suffix.lower()), (300, 20), io.BytesIO()
    try:
        Image.new("RGB", size, "red").save(trial, name)
        if name in Image.OPEN and Image.open(trial).size != size:
            raise ValueError("it holds icons")
    except Exception as error:
        raise UserError(f"{path} does not end in a picture format that can be written: use .png") from error
    return name
