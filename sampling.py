"""What the programs share: a model and its VAE, the guidance batch, sampling latents, pixels."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import checkpoints
import download
from data import stream
from diffusion import GaussianDiffusion
from files import UserError, written_whole
from graphs import Recorded
from models import DiT, DiT_models, guided, position_table
from router import Router
from schedule import Schedule

# Golden retriever, balloon, panda and other classes that the published pictures show.
IMAGENET_LABELS = (207, 992, 387, 974, 142, 979, 417, 279)


@dataclass(frozen=True)
class ModelSpec:
    """Where a model comes from and how it is meant to be used; nothing of it is loaded yet.

    name: of `DiT_models`, or of a model folder; config: arguments of `DiT` (beyond those of the name).
    image_size: pixels a side; class_names: one a class, or None; cfg_scale: recommended guidance, or None.
    vae: "ema" or "mse" for a released one, or a folder.
    weights: a file, or a name that `checkpoints.find_model` knows; None where there are no released ones.
    horizontal_flip: whether mirrored training images are images too.
    """

    name: str
    config: dict
    image_size: int
    vae: str
    class_names: tuple | None = None
    cfg_scale: float | None = None
    horizontal_flip: bool = True
    weights: str | None = None

    @property
    def num_classes(self) -> int:
        return self.config["num_classes"]

    @property
    def registered(self) -> bool:
        """Whether the name is one of `DiT_models`, so that other flags belong to it; else a folder says it all."""
        return self.name in DiT_models

    def guidance(self, asked: float | None, published: float) -> float:
        """The guidance scale: the one that was asked for, else what the model folder recommends, else the published."""
        return next(scale for scale in (asked, self.cfg_scale, published) if scale is not None)

    @property
    def default_labels(self) -> list[int]:
        """What a picture shows where no labels are asked for: eight of ImageNet's classes, all of a small set's."""
        fit = max(IMAGENET_LABELS) < self.num_classes
        return list(IMAGENET_LABELS) if fit else list(range(min(self.num_classes, 10)))


def model_spec(
    model: str = "DiT-XL/2",
    image_size: int = 256,
    num_classes: int = 1000,
    vae: str = "mse",
    ckpt: str | None = None,
) -> ModelSpec:
    """The `ModelSpec` of a folder, where ckpt is one, else of the registered name.

    ckpt: a model folder, a folder or Hub name of a DiT of diffusers (fetched where needed), a .pt or .safetensors file,
    or None for the released weights. vae: also that of a folder of diffusers without one.
    Raises UserError where the folder is incomplete or cannot be fetched, or the name unknown.
    """
    if ckpt is not None:
        folder, name = checkpoints.find_folder(ckpt), Path(ckpt).resolve().name
        if folder.is_dir() and checkpoints.is_diffusers(folder):
            return ModelSpec(name, **({"vae": vae} | checkpoints.read_diffusers(folder)))
        if folder.is_dir():
            return _folder_spec(folder)
    if model not in DiT_models:
        raise UserError(
            f"unknown model {model!r}: choose one of {', '.join(DiT_models)}, or a model folder with --ckpt"
        )
    if ckpt is None and (model, num_classes) == ("DiT-XL/2", 1000):
        ckpt = f"DiT-XL-2-{image_size}x{image_size}.pt"
    # The VAEs of the released models have eight pixels to a latent cell.
    config = {"input_size": image_size // 8, "num_classes": num_classes}
    return ModelSpec(model, config, image_size, vae, weights=ckpt and str(ckpt))


def _folder_spec(folder: Path) -> ModelSpec:
    missing = [name for name in ("config.json", "dit.safetensors") if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} is not a model folder: it has no {' and no '.join(missing)}")
    try:
        config = json.loads((folder / "config.json").read_text())
        model, names = {"num_classes": 1000, **config["model"]}, config.get("class_names")
        if not isinstance(model["num_classes"], int) or model["num_classes"] < 1:
            raise ValueError(f"num_classes {model['num_classes']!r} is not a positive whole number")
        if names and (len(names) != model["num_classes"] or not all(isinstance(name, str) for name in names)):
            raise ValueError(f"class_names are not {model['num_classes']} texts")
        if not math.isfinite(config.get("cfg_scale", 1)):
            raise ValueError(f"cfg_scale {config['cfg_scale']} is not finite")
        return ModelSpec(
            name=folder.resolve().name,
            config=model,
            image_size=int(config["image_size"]),
            vae=str(folder / config["vae"]),
            class_names=tuple(names) if names else None,
            cfg_scale=float(config["cfg_scale"]) if "cfg_scale" in config else None,
            horizontal_flip=bool(config.get("horizontal_flip", True)),
            weights=str(folder / "dit.safetensors"),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(
            f'{folder / "config.json"} cannot be used ({type(error).__name__}: {error}): it needs "model" (arguments '
            'of DiT), "image_size" and "vae"; ckpt/fashion_mnist/config.json is an example'
        ) from error


def load_dit(spec: ModelSpec, device: torch.device | str, random_seed: int | None = None) -> DiT:
    """The frozen DiT of a spec in eval mode, float32, on `device`.

    random_seed: an int draws all weights from it instead of reading any (a fresh DiT would output exactly 0).
    Raises UserError where the weights are missing, damaged, or of another model.
    """
    build = DiT_models[spec.name] if spec.registered else DiT
    try:
        with torch.device("meta"):
            dit = build(**spec.config)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:  # torch's, of sizes beyond all numbers
        reason = str(error).partition("\n")[0]
        raise UserError(f"model {spec.name}: {reason}") from error
    if random_seed is not None:
        dit = dit.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(random_seed)
        with torch.no_grad():
            for parameter in dit.parameters():
                parameter.normal_(std=0.02, generator=generator)
    elif spec.weights is None:
        raise UserError(
            f"there are no released weights for {spec.name} at {spec.image_size} with {spec.num_classes} classes, only "
            "for DiT-XL/2 at 256 and 512 with 1000: pass --ckpt with weights of your own"
        )
    else:
        state = {name: value.float() for name, value in checkpoints.find_model(spec.weights).items()}
        if "pos_embed" not in state:  # they are fixed, and not everyone saves them
            state["pos_embed"] = position_table(dit.pos_embed.shape[-1], dit.input_size // dit.patch_size)
        expected = {name: value.shape for name, value in dit.state_dict().items()}
        wrong = sorted(
            name
            for name in expected.keys() | state.keys()
            if name not in state or name not in expected or state[name].shape != expected[name]
        )
        if wrong:
            raise UserError(
                f"{spec.weights} does not fit model {spec.name} with {spec.config}: {len(wrong)} of {len(expected)} "
                f"tensors are missing, unknown or of another shape, {wrong[0]} first; check --model, --image-size "
                "and --num-classes"
            )
        dit.load_state_dict(state, assign=True)
    return dit.requires_grad_(False).eval().to(device)


def load_vae(spec: ModelSpec, device: torch.device | str) -> Any:
    """The frozen AutoencoderKL of a spec, float32, on `device`; "ema" and "mse" are the released ones.

    Raises UserError where its folder is missing or damaged.
    """
    from diffusers import AutoencoderKL

    folder = download.fetch_vae(spec.vae) if spec.vae in ("ema", "mse") else Path(spec.vae)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: a VAE folder is what diffusers' save_pretrained writes")
    try:
        # An older .bin is read only where there is nothing else, and as weights only: nothing in it is run.
        pickled = not (folder / checkpoints.WEIGHTS[0]).is_file() and (folder / checkpoints.WEIGHTS[1]).is_file()
        vae = AutoencoderKL.from_pretrained(folder, local_files_only=True, use_safetensors=not pickled)
        for parameter in vae.parameters():  # a map of the file, until now: cut off later, it would kill the process
            parameter.data = parameter.data.clone()
        vae = vae.requires_grad_(False).eval().to(device)
    except Exception as error:  # diffusers raises whatever a damaged configuration or file leads it to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"the VAE in {folder} cannot be read ({reason}): save it again with save_pretrained") from error
    pixels = 2 ** (len(vae.config.block_out_channels) - 1)  # a side of a latent cell
    channels, size = spec.config.get("in_channels", 4), spec.config.get("input_size", 32)
    if (vae.config.latent_channels, spec.image_size) != (channels, size * pixels):
        raise UserError(
            f"the VAE in {folder} has {vae.config.latent_channels} channels and {pixels} pixels to a cell, model "
            f"{spec.name} {channels} channels and {size} cells for {spec.image_size} pixels: use its own VAE"
        )
    return vae


def fingerprint(module: nn.Module, config: dict[str, Any]) -> str:
    """The SHA-256 of a model, VAE or router: of its `config` (a dict) and of every value of its tensors as float32."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in module.state_dict().items():
        digest.update(f"{name} {list(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def load_schedule(method: str | None, path: str | None, threshold: float) -> tuple[Schedule | None, dict[str, Any]]:
    """The `Schedule` of the file at `path`, or None, and what a manifest says of it: JSON types, None what is not used.

    method: "dynamiclayer" for a router file, used at `threshold`, "schedule" for a schedule file, None for neither.
    Raises UserError where the file is missing, damaged, or another one.
    """
    described = dict.fromkeys(("router", "threshold", "schedule"))
    if method is None:
        return None, described
    path = download.find(path)
    if method == "schedule":
        schedule = Schedule.load(path)
        return schedule, described | {"schedule": schedule.sha256()}
    router = Router.load(path)
    return router.schedule(threshold), described | {"router": fingerprint(router, {}), "threshold": threshold}


def check_labels(labels: Iterable[int], num_classes: int) -> None:
    """Raises UserError where a label is outside 0 ... num_classes-1."""
    for label in labels:
        if not 0 <= label < num_classes:
            raise UserError(f"class label {label} is out of range: the model has classes 0 to {num_classes - 1}")


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


class RecordedSampler:
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

        self._recorded = Recorded(sample)
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
        return RecordedSampler(dit, diffusion, cfg_scale, schedule, ancestral)
    return partial(
        sample_latents, dit, diffusion, cfg_scale=cfg_scale, schedule=schedule, ancestral=ancestral, progress=progress
    )


class ImageDraws:
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
        self._streams, self._shape, self._device = [stream("images", seed, k) for k in indices], shape, device
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


def psnr(a: Tensor, b: Tensor, peak: float) -> float:
    """Peak signal-to-noise ratio of two tensors of one shape in dB; inf where they are equal."""
    return (10 * torch.log10(peak**2 / (a.double() - b.double()).square().mean())).item()


def save_picture(groups: Sequence[Tensor], path: str | Path, columns: int) -> None:
    """Writes groups of uint8 images (N, H, W, 3) as a grid, each group from a new row; small ones enlarged.

    Raises UserError where the place cannot be written or the file's ending names no picture format.
    """
    from PIL import Image
    from torchvision.utils import make_grid

    # White cells fill up the last row of a group.
    images = torch.cat([nn.functional.pad(g, (0,) * 7 + (-len(g) % columns,), value=255) for g in groups])
    zoom = max(1, 96 // images.shape[1])
    images = images.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2).permute(0, 3, 1, 2)
    grid = make_grid(images, nrow=columns, padding=2, pad_value=255).permute(1, 2, 0).numpy()
    with written_whole(path) as part:
        Image.fromarray(grid).save(part, format=picture_format(path))


def picture_format(path: str | Path) -> str:
    """Pillow's name of the format of `path`, by its ending. Raises UserError where there is none."""
    from PIL import Image

    name = Image.registered_extensions().get(Path(path).suffix.lower())
    if name not in Image.SAVE:
        raise UserError(f"{path} does not end in a picture format that can be written: use .png")
    return name
