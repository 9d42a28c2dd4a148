"""`ModelSpec`: where a model comes from and how it is used."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from models import DiT_models
from pretrained.diffusers_layout import is_diffusers, read_diffusers
from pretrained.weights import find_model_folder
from runtime.errors import UserError

# Golden retriever, balloon, panda and other classes that the published pictures show.
IMAGENET_LABELS = (207, 992, 387, 974, 142, 979, 417, 279)


@dataclass(frozen=True)
class ModelSpec:
    """Where a model comes from and how it is meant to be used; nothing of it is loaded yet.

    name: of `DiT_models`, or of a model folder; config: arguments of `DiT` (beyond those of the name).
    image_size: pixels a side; class_names: one a class, or None; cfg_scale: recommended guidance, or None.
    vae: "ema" or "mse" for a released one, or a folder.
    weights: a file, or a name that `checkpoints.load_state_dict_of` knows; None where there are no released ones.
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
        folder, name = find_model_folder(ckpt), Path(ckpt).resolve().name
        if folder.is_dir() and is_diffusers(folder):
            return ModelSpec(name, **({"vae": vae} | read_diffusers(folder)))
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


def check_labels(labels: Iterable[int], num_classes: int) -> None:
    """Raises UserError where a label is outside 0 ... num_classes-1."""
    for label in labels:
        if not 0 <= label < num_classes:
            raise UserError(f"class label {label} is out of range: the model has classes 0 to {num_classes - 1}")
