"""What the programs share: a model and its VAE, the guidance batch, sampling latents, pixels."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusion import GaussianDiffusion
from models import DiT, guided
from runtime.cuda_graphs import GraphedFunction
from runtime.errors import UserError
from schedule import Schedule


def check_sampler(dit: DiT, cfg_scale: float, ancestral: bool) -> None:
    """Raises UserError where a DiT was not trained for guidance or for ancestral sampling, and is to do it."""
    if cfg_scale != 1.0 and dit.y_embedder.dropout_prob == 0:
        raise UserError(f"guidance of {cfg_scale} needs a null class and this model has none: pass --cfg-scale 1")
    if ancestral and dit.out_channels != 2 * dit.in_channels:
        raise UserError("--p-sample needs a model that predicts variances and this one does not: pass --ddim-sample")


# Samples whose modulations are computed together, of several steps where a batch is small: a third of a DiT's weights
# are theirs, and are read once for all of these. DiT-XL/2 keeps 50 MB of them in float32.
MODULATED = 64


def make_denoiser(
    dit: DiT, diffusion: GaussianDiffusion, y: Tensor, cfg_scale: float, schedule: Schedule | None = None
) -> Callable[[Tensor, int], Tensor]:
    """A function (x, i) -> model output for the loops of `diffusion`, with a cache of its own.

    y: labels (N,); x is then (2N, C, H, W), both halves alike, or (N, C, H, W) where cfg_scale is 1.
    The function is called for i from the last step down to 0.
    schedule: which layers run; None runs everything and remembers nothing. Each trajectory needs a new denoiser.
    Raises ValueError where the schedule's steps or depth are not those of the sampler and the model.
    """
    if schedule is not None and (schedule.steps, schedule.depth) != (diffusion.steps, dit.depth):
        raise ValueError(
            f"the schedule is for {schedule.steps} steps and {schedule.depth} blocks, "
            f"the sampler runs {diffusion.steps} steps of {dit.depth} blocks"
        )
    rows = [None] * diffusion.steps if schedule is None else schedule.rows()
    cache = None if schedule is None else dit.empty_cache()
    if cfg_scale != 1.0:
        y = torch.cat([y, torch.full_like(y, dit.num_classes)])
    # All that the loop needs is on the device before it starts.
    timesteps = diffusion.timesteps(y.device)
    conditions = dit.condition(timesteps[:, None].expand(-1, len(y)), y)
    together = max(1, MODULATED // len(y))  # steps
    first = diffusion.steps
    modulations: list[Tensor] = []

    def denoise(x: Tensor, i: int) -> Tensor:
        nonlocal first, modulations
        if i < first:
            first = max(0, i + 1 - together)
            modulations = dit.modulations(conditions[first : i + 1])
        if cfg_scale != 1.0:
            x = x[: len(x) // 2].repeat(2, 1, 1, 1)  # the unguided channels of the second half went another way
        output = dit.denoise(x, [of_block[i - first] for of_block in modulations], rows[i], cache)
        return output if cfg_scale == 1.0 else guided(output, cfg_scale)

    return denoise


@torch.inference_mode()
def sample_latents(
    dit: DiT,
    diffusion: GaussianDiffusion,
    z: Tensor,
    y: Tensor,
    cfg_scale: float,
    schedule: Schedule | None = None,
    ancestral: bool = False,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> Tensor:
    """Latents (N, C, H, W) sampled from noise z (N, C, H, W) for labels y (N,), on their device.

    cfg_scale: guidance; 1 means none, and then the batch is not doubled.
    ancestral: DDPM instead of DDIM, its noise from `randn_like`, which gets both halves of a guidance batch.
    schedule, progress: as in `make_denoiser` and `GaussianDiffusion.ddim_loop`.
    Raises UserError as `check_sampler`.
    """
    check_sampler(dit, cfg_scale, ancestral)
    denoise = make_denoiser(dit, diffusion, y, cfg_scale, schedule)
    x = z if cfg_scale == 1.0 else torch.cat([z, z])
    loop = diffusion.ancestral_loop if ancestral else diffusion.ddim_loop
    return loop(denoise, x, randn_like=randn_like, progress=progress)[: len(z)]


class CudaGraphSampler:
    """`sample_latents` of one model and schedule as a CUDA graph of the whole trajectory; called like it, from z on.

    The noise of ancestral sampling is drawn before, in the same order. seconds: what recording took so far.
    """

    def __init__(
        self,
        dit: DiT,
        diffusion: GaussianDiffusion,
        cfg_scale: float,
        schedule: Schedule | None = None,
        ancestral: bool = False,
    ) -> None:
        def sample(z: Tensor, y: Tensor, *noises: Tensor) -> Tensor:
            noise = iter(noises)
            return sample_latents(dit, diffusion, z, y, cfg_scale, schedule, ancestral, lambda x: next(noise))

        self._recorded = GraphedFunction(sample)
        self._draws = diffusion.steps if ancestral else 0
        self._halves = 1 if cfg_scale == 1.0 else 2

    @property
    def seconds(self) -> float:
        return self._recorded.seconds

    def __call__(self, z: Tensor, y: Tensor, randn_like: Callable[[Tensor], Tensor] = torch.randn_like) -> Tensor:
        """Latents (N, C, H, W) from noise z (N, C, H, W) for labels y (N,)."""
        x = z.repeat(self._halves, 1, 1, 1)
        return self._recorded(z, y, *(randn_like(x) for _ in range(self._draws)))


def make_sampler(
    dit: DiT,
    diffusion: GaussianDiffusion,
    cfg_scale: float,
    schedule: Schedule | None = None,
    ancestral: bool = False,
    cuda_graphs: bool = False,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> Callable[..., Tensor]:
    """A function (z, y, randn_like=...) -> latents, `sample_latents` of all the rest, recorded where `cuda_graphs`.

    A replayed graph has no steps to show, so `progress` is not used there.
    """
    if cuda_graphs:
        return CudaGraphSampler(dit, diffusion, cfg_scale, schedule, ancestral)
    return partial(
        sample_latents, dit, diffusion, cfg_scale=cfg_scale, schedule=schedule, ancestral=ancestral, progress=progress
    )


# Pixels that are decoded at a time: 8 images of 256 pixels, for which the VAE of the released models takes about 3 GB.
DECODE_PIXELS = 8 * 256**2


@torch.inference_mode()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Latents (N, C, h, w) -> uint8 images (N, H, W, 3) on their device, as many at a time as `DECODE_PIXELS` allow.

    Quantised as the published samples: clamp(127.5 x + 128, 0, 255), cut to whole numbers.
    """
    pixels = latents[0, 0].numel() * 4 ** (len(vae.config.block_out_channels) - 1)  # of an image
    scale, parts = vae.config.scaling_factor, []
    for part in latents.split(max(1, DECODE_PIXELS // pixels)):
        decoded = vae.decode((part / scale).to(vae.dtype)).sample.float()
        parts.append(decoded.mul_(127.5).add_(128).clamp_(0, 255).to(torch.uint8))
    return torch.cat(parts).permute(0, 2, 3, 1).contiguous()
