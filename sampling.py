"""Sampling: the denoiser that a diffusion loop calls, the loop with its cache, and decoding latents into images."""

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from diffusion import GaussianDiffusion, Process
from models import DiT, Guidance
from runtime import devices
from runtime.cuda_graphs import GraphedFunction
from runtime.errors import UserError
from schedule import Schedule

# Rows of modulations to compute at once: adaLN is a third of a DiT's weights, read once per group of steps and not once
# per step. DiT-XL/2 keeps 50 MB of modulations in float32.
MODULATION_ROWS = 64

# Decode this many pixels at a time: 8 images of 256 x 256, for which the released VAEs need about 3 GB.
DECODE_PIXELS = 8 * 256**2


def check_sampler(dit: DiT, cfg_scale: float, ancestral: bool) -> None:
    """Raises UserError if guidance or ancestral sampling is asked for and the DiT was not trained for it."""
    if cfg_scale != 1.0 and dit.label_dropout == 0:
        raise UserError(f"guidance of {cfg_scale} needs a null class and this model has none: pass --cfg-scale 1")
    if ancestral and dit.out_channels != 2 * dit.in_channels:
        raise UserError("--p-sample needs a model that predicts variances and this one does not: pass --ddim-sample")


def check_interval(diffusion: Process, cfg_scale: float) -> None:
    """Raises UserError if the interval of a `Guidance` has no step, so that it would guide nothing."""
    guidance = Guidance.of(cfg_scale)
    if cfg_scale != 1.0 and not _doubled_steps(diffusion, guidance, None):
        low, high = guidance.interval
        raise UserError(
            f"no time of the {diffusion.steps} steps lies in --cfg-interval {low:g} {high:g}, so nothing would be "
            "guided: pass a wider one, or --cfg-scale 1"
        )


def make_denoiser(
    dit: DiT, diffusion: Process, y: Tensor, cfg_scale: float, schedule: Schedule | None = None
) -> Callable[[Tensor, int], Tensor]:
    """Return a function (x, i) -> model output for the loops of `diffusion`. It owns the cache of one trajectory.

    y: labels (N,). With guidance x is (2N, C, H, W), both halves alike; without (cfg_scale 1) it is (N, C, H, W).
    cfg_scale: a number, or a `Guidance` that acts on other channels or only in an interval.
    schedule: which layers run; None runs every layer and remembers nothing.
    Raises ValueError if the schedule is for another number of steps or blocks.
    """
    if schedule is not None and (schedule.steps, schedule.depth) != (diffusion.steps, dit.depth):
        raise ValueError(
            f"the schedule is for {schedule.steps} steps and {schedule.depth} blocks, "
            f"the sampler runs {diffusion.steps} steps of {dit.depth} blocks"
        )
    rows = [None] * diffusion.steps if schedule is None else schedule.rows()
    if schedule is not None and schedule.order and devices.are_compiled(getattr(dit, "blocks", ())):
        rows = _weights_as_tensors(rows, y.device)
    slots = None if schedule is None else dit.empty_cache(schedule.order)
    guidance, scale = cfg_scale != 1.0, Guidance.of(cfg_scale)
    times, doubled = diffusion.times.tolist(), _doubled_steps(diffusion, scale, schedule)
    modulations = _modulations_by_step(dit, diffusion.timesteps(y.device), *_distinct_labels(dit, y, guidance))

    def denoise(x: Tensor, i: int) -> Tensor:
        if not guidance:
            return dit.denoise(x, modulations(i), rows[i], slots)
        x = x[: len(x) // 2]
        if i in doubled:  # the model sees equal halves, but after a step they differ in the unguided channels
            return scale.apply(dit.denoise(x.repeat(2, 1, 1, 1), modulations(i), rows[i], slots), times[i])
        for slot in chain(*(slots or ())):  # of steps that had both halves
            outputs = [output[: len(x)] for output in slot]
            slot.clear()
            slot.extend(outputs)
        return dit.denoise(x, [v[: len(x)] for v in modulations(i)], rows[i], slots).repeat(2, 1, 1, 1)

    return denoise


def _doubled_steps(diffusion: Process, guidance: Guidance, schedule: Schedule | None) -> range:
    """The steps at which the model runs both with the labels and without; at the others half the batch does.

    They are the guided steps, the steps whose outputs a step in the range reuses, and all between. A step that is added
    may reuse older outputs, which adds further steps: with forecasts often all steps before the interval.
    """
    low, high = guidance.interval
    guided = [i for i, t in enumerate(diffusion.times.tolist()) if low <= t <= high]
    if not guided:
        return range(0)
    first, last = guided[-1], guided[0]
    if schedule is not None:
        oldest, done = schedule.oldest_reads(), last
        while done <= first:  # steps run from `first` down to `last`, and reuse what earlier ones computed
            first, done = max(first, oldest[done]), done + 1
    return range(last, first + 1)


def rows_per_step(diffusion: Process, cfg_scale: float, schedule: Schedule | None, samples: int) -> list[int]:
    """How many samples the model gets at each step, the unconditional ones included, for a batch of `samples`."""
    doubled = range(0) if cfg_scale == 1.0 else _doubled_steps(diffusion, Guidance.of(cfg_scale), schedule)
    return [2 * samples if i in doubled else samples for i in range(diffusion.steps)]


def _weights_as_tensors(rows: list, device: torch.device) -> list:
    """Replace the weights of forecasts by tensors (): a graph of torch.compile would keep a float as a constant.

    They are made on the device, because a CUDA graph cannot capture a copy from the CPU.
    """
    weights = {c for row in rows for block in row for c in block if isinstance(c, tuple)}
    tensors = {c: torch.stack([torch.full((), weight, device=device) for weight in c]) for c in weights}
    return [[[tensors[c].unbind() if c in tensors else c for c in block] for block in row] for row in rows]


def _distinct_labels(dit: DiT, y: Tensor, guidance: bool) -> tuple[Tensor, Tensor]:
    """Labels (R,) without most repetitions, and the row of each sample of the batch in them.

    The samples are those of y (N,), with guidance also N of the null class, whose modulations are all alike. Shapes do
    not depend on the labels, so that a CUDA graph serves all of them.
    """
    batch = torch.cat([y, torch.full_like(y, dit.num_classes)]) if guidance else y
    labels, classes = batch[: len(y) + guidance], dit.num_classes + (dit.label_dropout > 0)
    if classes <= len(labels):
        return torch.arange(classes, device=y.device), batch
    return labels, torch.arange(len(batch), device=y.device).clamp(max=len(labels) - 1)


def _modulations_by_step(dit: DiT, timesteps: Tensor, labels: Tensor, rows: Tensor) -> Callable[[int], list[Tensor]]:
    """Return a function i -> the modulations of step i, for timesteps (steps,) and labels (R,).

    rows: which of the labels each sample has, (N,). Timesteps and labels are embedded before the loop starts.
    Modulations are computed for a group of steps at once, and only the last group is kept.
    """
    steps, at_once = len(timesteps), max(1, MODULATION_ROWS // len(labels))
    conditions = dit.condition(timesteps[:, None].expand(-1, len(labels)), labels)  # (steps, R, D)

    @lru_cache(maxsize=1)
    def group(g: int) -> tuple[int, list[Tensor]]:
        """The lowest step of group g and the modulations of its steps; group 0 runs first."""
        stop = steps - g * at_once
        start = max(0, stop - at_once)
        return start, dit.modulations(conditions[start:stop])

    def modulations(i: int) -> list[Tensor]:
        start, vectors = group((steps - 1 - i) // at_once)
        return [v[i - start].index_select(0, rows) for v in vectors]

    return modulations


@torch.inference_mode()
def sample_latents(
    dit: DiT,
    diffusion: Process,
    z: Tensor,
    y: Tensor,
    cfg_scale: float,
    schedule: Schedule | None = None,
    ancestral: bool = False,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> Tensor:
    """Sample latents (N, C, H, W) from noise z (N, C, H, W) for labels y (N,), on their device.

    cfg_scale: guidance; 1 is none, and then the batch is not doubled.
    ancestral: DDPM instead of DDIM, for a `GaussianDiffusion`.
    randn_like: draws noise, if the sampler adds some; with guidance x is (2N, C, H, W).
    schedule, progress: as in `make_denoiser` and `GaussianDiffusion.ddim_loop`.
    Raises UserError as `check_sampler`.
    """
    check_sampler(dit, cfg_scale, ancestral)
    denoise = make_denoiser(dit, diffusion, y, cfg_scale, schedule)
    x = z if cfg_scale == 1.0 else torch.cat([z, z])
    loop = diffusion.ancestral_loop if ancestral and isinstance(diffusion, GaussianDiffusion) else diffusion.loop
    return loop(denoise, x, randn_like=randn_like, progress=progress)[: len(z)]


class CudaGraphSampler:
    """`sample_latents` captured as one CUDA graph of the whole trajectory. Call it with z, y and randn_like.

    The noise of a sampler that adds some is drawn before the replay, in the same order.
    """

    def __init__(
        self,
        dit: DiT,
        diffusion: Process,
        cfg_scale: float,
        schedule: Schedule | None = None,
        ancestral: bool = False,
    ) -> None:
        def sample(z: Tensor, y: Tensor, *noises: Tensor) -> Tensor:
            noise = iter(noises)
            return sample_latents(dit, diffusion, z, y, cfg_scale, schedule, ancestral, lambda x: next(noise))

        self._graphed = GraphedFunction(sample)
        self._draws = diffusion.steps if ancestral else diffusion.draws
        self._copies = 1 if cfg_scale == 1.0 else 2

    @property
    def seconds(self) -> float:
        """Seconds spent on capturing so far."""
        return self._graphed.seconds

    def __call__(self, z: Tensor, y: Tensor, randn_like: Callable[[Tensor], Tensor] = torch.randn_like) -> Tensor:
        """Sample latents (N, C, H, W) from noise z (N, C, H, W) for labels y (N,)."""
        x = z.repeat(self._copies, 1, 1, 1)
        return self._graphed(z, y, *(randn_like(x) for _ in range(self._draws)))


def make_sampler(
    dit: DiT,
    diffusion: Process,
    cfg_scale: float,
    schedule: Schedule | None = None,
    ancestral: bool = False,
    cuda_graphs: bool = False,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> Callable[..., Tensor]:
    """Return a function (z, y, randn_like=...) -> latents: `sample_latents`, or a `CudaGraphSampler` if `cuda_graphs`.

    A CUDA graph replays all steps at once, so it does not call `progress`.
    """
    if cuda_graphs:
        return CudaGraphSampler(dit, diffusion, cfg_scale, schedule, ancestral)
    return partial(
        sample_latents, dit, diffusion, cfg_scale=cfg_scale, schedule=schedule, ancestral=ancestral, progress=progress
    )


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Decode latents (N, C, h, w) into uint8 images (N, H, W, 3) on their device, `DECODE_PIXELS` at a time.

    Quantised as the published samples: clamp(127.5 x + 128, 0, 255), truncated.
    Raises UserError if latents or pixels are not finite.
    """
    images, finite = decode_unchecked(vae, latents)
    check_finite(finite)
    return images


@torch.inference_mode()
def decode_unchecked(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Return the images of `decode`, and a bool (N, 2) for `check_finite`, without waiting for the device."""
    pixels = latents[0, 0].numel() * 4 ** (len(vae.config.block_out_channels) - 1)  # per image
    scale, shift = scale_and_shift(vae)
    images, finite = [], []
    for part in latents.split(max(1, DECODE_PIXELS // pixels)):
        decoded = vae.decode((part / scale + shift).to(vae.dtype)).sample.float()
        finite.append(torch.stack([x.isfinite().flatten(1).all(1) for x in (part, decoded)], dim=1))
        images.append(decoded.mul_(127.5).add_(128).clamp_(0, 255).to(torch.uint8))
    return torch.cat(images).permute(0, 2, 3, 1).contiguous(), torch.cat(finite)


def scale_and_shift(vae: Any) -> tuple[float, float]:
    """The numbers for latents = (the VAE's latents - shift) * scale; few VAEs shift."""
    return vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0


def check_finite(finite: Tensor, first: int = 0) -> None:
    """Raises UserError if an image has latents or pixels that are not finite: they would become black.

    finite: bool (N, 1) of latents, or (N, 2) of latents and pixels. first: the number of the first image.
    """
    if finite.all():
        return
    latents, pixels = finite.cpu()[:, 0], finite.cpu()[:, -1]
    k = int((latents & pixels).int().argmin())
    if latents[k]:
        raise UserError(
            f"the VAE decodes image {first + k} to values that are not finite: check its weights and scaling_factor, "
            "or pass --dtype fp32"
        )
    raise UserError(
        f"the latents of image {first + k} are not finite: check the weights of the DiT, or pass --dtype fp32 or a "
        "lower --cfg-scale"
    )
