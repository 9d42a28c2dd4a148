"""Random numbers that follow a seed and a number alone, whichever process draws them."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

PURPOSES = ("order", "draws", "samples", "images")


def random_stream(purpose, seed, number):
    """A NumPy generator of its own for each (purpose, seed, number); purpose: one of `PURPOSES`, the others ints."""
    # The purpose comes first and the count is fixed, since trailing zeros do not change a SeedSequence.
    return np.random.default_rng([PURPOSES.index(purpose), seed, number])


class ImageNoise:
    """What is random about the images of numbers `indices` of a set: each has a stream of its own, drawn on the CPU.

    Image k follows (seed, k) alone, whatever batch it is in. shape: of a latent, (C, h, w).
    labels: int64 (N,) on the CPU, uniform over range(num_classes), or k modulo num_classes where `balanced`.
    y, z: on the device, the labels and the noise that sampling starts from, float32 (N, C, h, w); the noise is the same
    with either kind of labels.
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
        drawn = [random.integers(num_classes) for random in self._streams]
        self.labels = torch.tensor([k % num_classes for k in indices] if balanced else drawn)
        self.y, self.z = self._put(self.labels), self._noise()

    def _put(self, values: Tensor) -> Tensor:
        # From other memory than this the copy would wait until all that the GPU was given is done.
        values = values.pin_memory() if self._device.type == "cuda" else values
        return values.to(self._device, non_blocking=True)

    def _noise(self) -> Tensor:
        noise = [random.standard_normal(self._shape, dtype=np.float32) for random in self._streams]
        return self._put(torch.from_numpy(np.stack(noise)))

    def randn_like(self, x: Tensor) -> Tensor:
        """The next noise of every image, like x (N, C, h, w), or (2N, C, h, w) with both halves alike."""
        noise = self._noise()
        return noise.repeat(len(x) // len(noise), 1, 1, 1)
