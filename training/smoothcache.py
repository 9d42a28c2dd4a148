"""The measurement that SmoothCache decides by: how much the outputs of a model's layers change from step to step.

Source: Liu et al. 2024, arXiv:2411.10510. `Schedule.by_change` makes the schedule.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion import Process, create_diffusion
from models import DiT
from sampling import sample_latents

MOST = 3  # steps in a row that a layer is reused, as published
SAMPLES = 8  # to measure on
AT_ONCE = 2  # samples in memory: their last MOST + 1 outputs of DiT-XL/2 at 256 pixels take 1.1 GB in float32


class Recorder:
    """Stands in for a DiT in `sample_latents`: runs every layer, and measures how much its output changes.

    changes: [steps, MOST, 2]: [i, a-1, k] is |new - old|_1 / |new|_1 of the outputs of layer k at step i and step
    i + a, the mean over samples and blocks; infinite if there is no step i + a.
    """

    def __init__(self, dit: DiT, steps: int) -> None:
        self._dit, self._cache, self._i = dit, dit.empty_cache(order=MOST), steps
        self.changes = torch.full((steps, MOST, 2), torch.inf)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dit, name)

    def denoise(self, x: Tensor, modulations: Sequence[Tensor], *_: Any) -> Tensor:
        """`DiT.denoise` of the next step, with every layer."""
        output = self._dit.denoise(x, modulations, None, self._cache)
        self._i -= 1
        there = len(self.changes) - 1 - self._i  # steps before this one
        for k in (0, 1):
            by_block = [_changes(*[old.float() for old in block[k]][: there + 1]) for block in self._cache]
            if there:
                self.changes[self._i, : min(there, MOST), k] = torch.stack(by_block).mean(0).cpu()
        return output


def _changes(new: Tensor, *older: Tensor) -> Tensor:
    """The relative change from each of `older` (N, T, D) to `new`, the mean over N, as a tensor of len(older).

    An output outside the interval of guidance has only the rows with labels, the first half: the others are left out.
    """
    size = new.abs().sum((1, 2)).clamp(min=torch.finfo(new.dtype).tiny)  # an output of 0 that stays 0 has not changed
    both = [min(len(new), len(old)) for old in older]
    changes = [((new[:n] - old[:n]).abs().sum((1, 2)) / size[:n]).mean() for n, old in zip(both, older)]
    return torch.stack(changes) if changes else size[:0]


def layer_changes(dit: DiT, steps: int, cfg_scale: float = 1.0, diffusion: Process | None = None) -> Tensor:
    """The changes of a `Recorder`, the mean over SAMPLES samples: float32 [steps, MOST, 2] on the CPU.

    The noise is always the same, and the labels are spread over all classes. cfg_scale: guidance, as for sampling.
    diffusion: of `steps` steps; None is DDIM.
    Raises UserError if the model cannot do the guidance.
    """
    device, noise = dit.pos_embed.device, torch.Generator().manual_seed(1)

    def randn_like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=noise).to(x.device)

    z = torch.randn(
        SAMPLES, dit.in_channels, dit.input_size, dit.input_size, generator=torch.Generator().manual_seed(0)
    )
    y = torch.arange(SAMPLES) * dit.num_classes // SAMPLES
    batches = list(zip(z.to(device).split(AT_ONCE), y.to(device).split(AT_ONCE)))
    changes = torch.zeros(steps, MOST, 2)
    progress = partial(tqdm, desc="measuring changes", leave=False, disable=None)
    for z_part, y_part in progress(batches):
        recorder = Recorder(dit, steps)
        process = diffusion or create_diffusion(steps)
        sample_latents(cast(DiT, recorder), process, z_part, y_part, cfg_scale, randn_like=randn_like)
        changes += recorder.changes / len(batches)
    return changes
