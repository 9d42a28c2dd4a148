"""Random numbers that depend only on a seed and a number, not on the process or batch that draws them."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

PURPOSES = ("order", "draws", "samples", "images")


def random_stream(purpose, seed, number):
    """Make an independent NumPy generator for each (purpose, seed, number); purpose: one of `PURPOSES`."""
    # Always three values with the purpose first, because trailing zeros do not change a SeedSequence.
    return np.random.default_rng([PURPOSES.index(purpose), seed, number])


class ImageNoise:
    """Labels and noise of the images with numbers `indices`: image k depends on (seed, k) alone, in any batch.

    shape: of a latent, (C, h, w). balanced: label k is k modulo num_classes; otherwise labels are uniform.
    labels: int64 (N,) on the CPU.
    y, z: on the device, the labels and the initial noise, float32 (N, C, h, w). `balanced` does not change the noise.
    """

    def __init__(
        self,
        seed: int,
        indices: Iterable[int],
        shape: tuple[int, ...],
        num_classes: int,
        device: torch.device,
        balanced: bool = False,
    ) -> None:
        self._streams, self._shape, self._device = [random_stream("images", seed, k) for k in indices], shape, device
        drawn = [stream.integers(num_classes) for stream in self._streams]
        self.labels = torch.tensor([k % num_classes for k in indices] if balanced else drawn)
        self.y, self.z = self._to_device(self.labels), self._draw()

    def _to_device(self, values: Tensor) -> Tensor:
        # A copy from memory that is not pinned would wait for all work queued on the GPU.
        values = values.pin_memory() if self._device.type == "cuda" else values
        return values.to(self._device, non_blocking=True)

    def _draw(self) -> Tensor:
        noise = [stream.standard_normal(self._shape, dtype=np.float32) for stream in self._streams]
        return self._to_device(torch.from_numpy(np.stack(noise)))

    def randn_like(self, x: Tensor) -> Tensor:
        """Draw the next noise of every image, like x (N, C, h, w), or (2N, C, h, w) with two equal halves."""
        noise = self._draw()
        return noise.repeat(len(x) // len(noise), 1, 1, 1)
