"""Pictures: reading, comparing, and writing a grid of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from runtime.errors import UserError, first_line
from runtime.files import atomic_write


def load_image(path):
    """Load a picture of any mode as a PIL image in RGB. Raises ValueError if it cannot be decoded."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip at 255
                image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
            return image.convert("RGBA" if "transparency" in image.info else "RGB").convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow raises all of these
        raise ValueError(f"{path}: {first_line(error)}") from error


def psnr(a: Tensor, b: Tensor, peak: float) -> float:
    """Peak signal-to-noise ratio in dB of two tensors of the same shape; inf if they are equal."""
    return (10 * torch.log10(peak**2 / (a.double() - b.double()).square().mean())).item()


def save_picture(groups: Sequence[Tensor], path: str | Path, columns: int) -> None:
    """Write groups of uint8 images (N, H, W, 3) as a grid; each group begins a row, small images are enlarged.

    Raises UserError if the file cannot be written or its ending names no picture format.
    """
    from PIL import Image
    from torchvision.utils import make_grid

    # White cells fill the last row of a group.
    images = torch.cat([nn.functional.pad(g, (0,) * 7 + (-len(g) % columns,), value=255) for g in groups])
    zoom = max(1, 96 // images.shape[1])
    images = images.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2).permute(0, 3, 1, 2)
    grid = make_grid(images, nrow=columns, padding=2, pad_value=255).permute(1, 2, 0).numpy()
    with atomic_write(path) as part:
        Image.fromarray(grid).save(part, format=picture_format(path))


def picture_format(path: str | Path) -> str:
    """Pillow's name for the format that the ending of `path` means. Raises UserError if there is none."""
    from PIL import Image

    name = Image.registered_extensions().get(Path(path).suffix.lower())
    if name not in Image.SAVE:
        raise UserError(f"{path} does not end in a picture format that can be written: use .png")
    return name
