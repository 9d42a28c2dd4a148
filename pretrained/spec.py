"""`ModelSpec`: where a model comes from and how to use it. `model_spec` reads it from a name or a folder."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion import FlowMatching, Process, create_diffusion
from models import DiT_models, Guidance
from pretrained.diffusers_layout import CLASSES, check_scheduler, dit_config
from pretrained.weights import find_model_folder, read_json, weights_file
from runtime import released
from runtime.errors import UserError

# Golden retriever, balloon, panda and other classes of the published pictures.
IMAGENET_LABELS = (207, 992, 387, 974, 142, 979, 417, 279)
CELL_PIXELS = 8  # pixels per side of a latent cell, with the VAEs of the released models
SIT_FOLDER = "pretrained_models"  # where a user puts SiT-XL-2-256x256.pt: no hash of it is published
# The samplers of each process, the default first, and the names of these for messages and files.
SAMPLERS = {"diffusion": ("ddim", "ddpm"), "flow": ("euler", "heun", "sde")}
SAMPLER_NAMES = {"ddim": "DDIM", "euler": "Euler"}


@dataclass(frozen=True)
class ModelSpec:
    """Where a model comes from and how to use it; nothing is loaded yet.

    name: of `DiT_models`, the same as SiT-XL/2 of a flow model, or of a folder.
    config: arguments of `DiT` beyond those that a registered name implies.
    image_size: pixels per side; class_names: one per class, or None.
    cfg_scale, cfg_channels, cfg_interval: recommended guidance, as for `Guidance`; without a scale it is None.
    vae: "ema" or "mse" for a released VAE, or a folder.
    weights: a file or a released name, as for `load_state_dict_of`; None if nothing is released.
    horizontal_flip: whether training may mirror images.
    process: "diffusion", or "flow" for flow matching. time_scale: of a flow, as for `FlowMatching`.
    """

    name: str
    config: dict
    image_size: int
    vae: str
    class_names: tuple | None = None
    cfg_scale: float | None = None
    horizontal_flip: bool = True
    weights: str | None = None
    process: str = "diffusion"
    time_scale: float = 1.0
    cfg_channels: int = 3
    cfg_interval: tuple[float, float] = (0.0, 1.0)

    @property
    def num_classes(self) -> int:
        return self.config["num_classes"]

    @property
    def depth(self) -> int:
        """Number of blocks."""
        default = DiT_models[self.size].keywords["depth"] if self.registered else 28  # that of `DiT`
        return self.config.get("depth", default)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent; the defaults are those of `DiT`."""
        size = self.config.get("input_size", 32)
        return self.config.get("in_channels", 4), size, size

    @property
    def registered(self) -> bool:
        """Whether the model has a name with a size; it needs more flags, a model folder needs none."""
        return self.size in DiT_models

    @property
    def size(self) -> str:
        """The name in `DiT_models` of a model with a name: that of SiT-XL/2 is DiT-XL/2."""
        return _size(self.name)

    @property
    def settings(self) -> dict[str, Any]:
        """What determines outputs beside the weights, as JSON types: the config, and the process if it is a flow."""
        flow = {"process": self.process, "time_scale": self.time_scale}
        return self.config | (flow if self.process == "flow" else {})

    def guidance(
        self,
        requested: float | None,
        published: float,
        channels: int | str | None = None,
        interval: Sequence[float] | None = None,
    ) -> Guidance:
        """The guidance to use: what is requested, else recommended, else (the scale) published.

        channels: a number, or "all" of the latent. A default is at most all of them: the other channels of the output
        are variances. Raises UserError if the model does not have as many as requested.
        """
        scale = next(scale for scale in (requested, self.cfg_scale, published) if scale is not None)
        most = self.latent_shape[0]
        channels = int(most if channels == "all" else channels or min(self.cfg_channels, most))
        if channels > most:
            raise UserError(
                f"--cfg-channels {channels} is more than the {most} of {self.name}: pass at most {most}, or all"
            )
        return Guidance(scale, channels, interval or self.cfg_interval)

    def sampler(self, requested: str | None = None) -> str:
        """The sampler to use; None is the default. Raises UserError if the process of the model has no such one."""
        names = SAMPLERS[self.process]
        if requested not in (None, *names):
            kind = "a flow model" if self.process == "flow" else "a DiT of diffusion"
            raise UserError(
                f"{self.name} is {kind} and cannot be sampled with {requested}: pass --sampler {' or '.join(names)}"
            )
        return requested or names[0]

    def make_process(
        self, steps: int, sampler: str | None = None, noise_scale: tuple[float, float] = (1.0, 1.0)
    ) -> Process:
        """The process of this model with `steps` calls of it. Raises UserError if it has no such sampler.

        noise_scale: as for `GaussianDiffusion`.
        """
        sampler = self.sampler(sampler)
        if self.process == "diffusion":
            return create_diffusion(steps, noise_scale=noise_scale)
        if noise_scale[0] != 1:
            raise UserError(f"{self.name} is a flow model, which predicts no noise: leave out --noise-scale")
        try:
            return FlowMatching(steps, sampler, self.time_scale)
        except ValueError as error:
            raise UserError(f"--num-sampling-steps {steps}: {error}") from error

    @property
    def default_labels(self) -> list[int]:
        """Labels for a picture without --class-labels: eight classes of ImageNet, or the first ten of a small set."""
        if max(IMAGENET_LABELS) < self.num_classes:
            return list(IMAGENET_LABELS)
        return list(range(min(self.num_classes, 10)))


def model_spec(
    model: str = "DiT-XL/2", image_size: int = 256, num_classes: int = 1000, vae: str = "mse", ckpt: str | None = None
) -> ModelSpec:
    """The `ModelSpec` of the folder `ckpt`, or of the registered name `model` if `ckpt` is a file or None.

    ckpt: a model folder; a DiT of diffusers, as a folder or a Hub name (fetched if needed); a file of weights;
          None for the released weights.
    model, image_size, num_classes: of a registered name only; a folder brings its own.
    vae: for a registered name, and for a folder of diffusers without a VAE.
    Raises UserError if the folder is incomplete or cannot be fetched, or if the name is unknown.
    """
    if ckpt is not None and (folder := find_model_folder(ckpt)).is_dir():
        name = Path(ckpt).resolve().name
        return _diffusers_spec(name, folder, vae) if _is_diffusers(folder) else _model_folder_spec(name, folder)
    if _size(model) not in DiT_models:
        raise UserError(
            f"unknown model {model!r}: choose one of {', '.join(DiT_models)}, the same with SiT for DiT, or a model "
            "folder with --ckpt"
        )
    if ckpt is None and (model, num_classes) == ("DiT-XL/2", 1000):
        ckpt = f"DiT-XL-2-{image_size}x{image_size}.pt"
    config: dict[str, Any] = {"input_size": image_size // CELL_PIXELS, "num_classes": num_classes}
    if model in DiT_models:
        return ModelSpec(model, config, image_size, vae, weights=ckpt and str(ckpt))
    if ckpt is None and (model, num_classes) == ("SiT-XL/2", 1000):
        place = released.ROOT / SIT_FOLDER / f"SiT-XL-2-{image_size}x{image_size}.pt"
        ckpt = str(place) if place.is_file() else None
    config |= {"learn_sigma": False}
    return ModelSpec(model, config, image_size, vae, weights=ckpt and str(ckpt), process="flow")


def _size(name: str) -> str:
    return name.replace("SiT-", "DiT-", 1) if name.startswith("SiT-") else name


def _model_folder_spec(name: str, folder: Path) -> ModelSpec:
    missing = [file for file in ("config.json", "dit.safetensors") if not (folder / file).is_file()]
    if missing:
        raise UserError(f"{folder} is not a model folder: it has no {' and no '.join(missing)}")
    config = read_json(folder / "config.json")
    try:
        model, class_names = {"num_classes": 1000, **config["model"]}, config.get("class_names")
        channels = model.get("in_channels", 4)  # that of `DiT`
        for number, value in (("num_classes", model["num_classes"]), ("in_channels", channels)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{number} {value!r} is not a positive whole number")
        if class_names and (len(class_names) != model["num_classes"] or set(map(type, class_names)) != {str}):
            raise ValueError(f"class_names are not {model['num_classes']} texts")
        if not math.isfinite(config.get("cfg_scale", 1)):
            raise ValueError(f"cfg_scale {config['cfg_scale']} is not finite")
        process = _process_settings(config, channels)
        if process.get("process") == "flow":
            model["learn_sigma"] = False  # the loader drops channels that predict a variance
        return ModelSpec(
            name=name,
            config=model,
            image_size=int(config["image_size"]),
            vae=str(folder / config["vae"]),
            class_names=tuple(class_names) if class_names else None,
            cfg_scale=float(config["cfg_scale"]) if "cfg_scale" in config else None,
            horizontal_flip=bool(config.get("horizontal_flip", True)),
            weights=str(folder / "dit.safetensors"),
            **process,
        )
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f'{folder / "config.json"} cannot be used ({type(error).__name__}: {error}): it needs "model" (arguments '
            'of DiT), "image_size" and "vae"; ckpt/fashion_mnist/config.json is an example'
        ) from error


def _process_settings(config: dict[str, Any], channels: int) -> dict[str, Any]:
    """The entries of a model folder's config.json about the process and guidance. Raises ValueError if one is wrong.

    channels: those of the model's latents.
    """
    rules = {
        "process": (lambda value: value in SAMPLERS, "diffusion or flow"),
        "time_scale": (lambda value: type(value) in (int, float) and 0 < float(value) < math.inf, "a number above 0"),
        "cfg_channels": (
            lambda value: type(value) is int and 1 <= value <= channels,
            f"a whole number from 1 to {channels}, the channels of the model",
        ),
        "cfg_interval": (
            lambda value: len(value) == 2 and 0 <= value[0] < value[1] <= 1,
            "two rising numbers from 0 to 1",
        ),
    }
    for name, (accepts, rule) in rules.items():
        if name in config and not accepts(config[name]):
            raise ValueError(f"{name} {config[name]!r} is not {rule}")
    if "cfg_interval" in config:
        config = config | {"cfg_interval": tuple(config["cfg_interval"])}
    return {name: config[name] for name in rules if name in config}


def _is_diffusers(folder: Path) -> bool:
    """Whether diffusers saved a pipeline or a model in the folder."""
    index, config = folder / "model_index.json", folder / "config.json"
    return index.is_file() or config.is_file() and "_class_name" in read_json(config)


def _diffusers_spec(name: str, folder: Path, vae: str) -> ModelSpec:
    """The spec of a DiTPipeline, or of a DiTTransformer2DModel alone, with `vae` if the folder has none."""
    part, cell_pixels, own_vae = folder, CELL_PIXELS, folder / "vae"
    scheduler = folder / "scheduler" / "scheduler_config.json"
    labels: dict[str, str] = {}
    if (folder / "model_index.json").is_file():
        part = folder / "transformer"
        labels = read_json(folder / "model_index.json").get("id2label") or {}
    if own_vae.exists():  # whatever it holds: a released VAE would not be that of this model
        vae = str(own_vae)
        widths = read_json(own_vae / "config.json").get("block_out_channels")
        if isinstance(widths, list):  # else `load_vae` refuses it
            cell_pixels = 2 ** (len(widths) - 1)
    config = read_json(part / "config.json")
    kind = config.get("_class_name")
    # The older class had other kinds of models, and "norm_type" tells a DiT.
    if kind not in CLASSES or kind == CLASSES[1] and "norm_type" not in config:
        raise UserError(f"{part} holds a {kind} and not a DiT of diffusers, a {CLASSES[0]}: name the folder of one")
    weights, settings = weights_file(part), read_json(scheduler) if scheduler.is_file() else {}
    place = scheduler
    try:
        check_scheduler(settings)
        place = part / "config.json"
        arguments = dit_config(config)
        classes = range(arguments["num_classes"])
        named = all(str(k) in labels for k in classes)
        return ModelSpec(
            name=name,
            config=arguments,
            image_size=arguments["input_size"] * cell_pixels,
            vae=vae,
            # The first of several synonyms: "tench, Tinca tinca".
            class_names=tuple(labels[str(k)].split(",")[0] for k in classes) if named else None,
            weights=str(weights),
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{place} is not of a model that runs here: {error}") from error


def check_labels(labels: Iterable[int], num_classes: int) -> None:
    """Raises UserError if a label is outside 0 ... num_classes-1."""
    for label in labels:
        if not 0 <= label < num_classes:
            raise UserError(f"class label {label} is out of range: the model has classes 0 to {num_classes - 1}")
