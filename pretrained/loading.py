"""Load the DiT and the VAE of a `ModelSpec`."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from models import DiT, DiT_models, position_table
from pretrained import autoencoder
from pretrained.sit import to_flow
from pretrained.spec import CELL_PIXELS, SIT_FOLDER, ModelSpec
from pretrained.weights import load_checkpoint, load_shards, read_json, weights_file
from runtime import released
from runtime.errors import UserError, first_line
from runtime.files import load_tensors, mismatch, named_tensors

# Names in a VAE's attention that old versions of diffusers wrote, as in the released VAEs.
OLD_ATTENTION = re.compile(r"(.*\.attentions\.\d+\.)(query|key|value|proj_attn)(?=\.)")
NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class WithoutWeights(TorchFunctionMode):
    """In this block, modules get no initial weights; on the device "meta" these would import torch._dynamo."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def load_dit(spec: ModelSpec, device: torch.device | str, random_seed: int | None = None) -> DiT:
    """The frozen DiT of a spec in eval mode, float32, on `device`.

    random_seed: draws all weights instead of reading them (a fresh DiT would output exactly 0); None reads them.
    Raises UserError if the weights are missing, damaged, or of another model.
    """
    build = DiT_models[spec.size] if spec.registered else DiT
    try:
        with torch.device("meta"), WithoutWeights():
            dit = build(**spec.config)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:  # RuntimeError: torch refuses the sizes
        raise UserError(f"model {spec.name}: {first_line(error)}") from error
    if random_seed is None:
        dit.load_state_dict(_fitting_weights(spec, dit), assign=True)
    else:
        dit = dit.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(random_seed)
        with torch.no_grad():
            for parameter in dit.parameters():
                parameter.normal_(std=0.02, generator=generator)
    return dit.requires_grad_(False).eval().to(device)


def _fitting_weights(spec: ModelSpec, dit: DiT) -> dict[str, Tensor]:
    """The float32 state dict of a spec. Raises UserError if there is none or it does not fit `dit`."""
    if spec.weights is None:
        if spec.process == "flow":
            raise UserError(
                f"{spec.name}: the weights of SiT and REPA are not fetched; put SiT's SiT-XL-2-256x256.pt into "
                f"{released.ROOT / SIT_FOLDER}, or name a file with --ckpt"
            )
        raise UserError(
            f"there are no released weights for {spec.name} at {spec.image_size} with {spec.num_classes} classes, only "
            "for DiT-XL/2 at 256 and 512 with 1000: pass --ckpt with weights of your own"
        )
    flow = spec.process == "flow"
    state, arguments = load_checkpoint(spec.weights, flow)
    if flow:
        state = to_flow(_float_tensors(spec.weights, state), arguments, spec.time_scale)
    if "pos_embed" not in state:  # the positions are fixed, so some files leave them out
        state["pos_embed"] = position_table(dit.pos_embed.shape[-1], dit.input_size // dit.patch_size)
    differs = mismatch(_shapes(state), _shapes(dit.state_dict()))
    if differs:
        raise UserError(
            f"{spec.weights} does not fit model {spec.name} with {spec.config}: {differs}; "
            + _fitting_flags(spec, state, arguments)
        )
    return state if flow else _float_tensors(spec.weights, state)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


def _float_tensors(path: str | Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict in float32. Raises UserError if a tensor is of integers or complex, or not finite."""
    for name, value in state.items():
        if not value.is_floating_point():
            raise UserError(f"{path} holds {name} as {value.dtype} and not as floats: save the weights unquantised")
    floats = {name: value.float() for name, value in state.items()}
    for name, value in floats.items():
        if not value.sum().isfinite() and not value.isfinite().all():  # the sum is fast, but can overflow
            raise UserError(f"{path} holds values that are not finite, in {name}: train or fetch it again")
    return floats


def _fitting_flags(spec: ModelSpec, state: dict[str, Tensor], arguments: dict[str, Any]) -> str:
    """The way out if a checkpoint is of another model: the flags that its arguments, or else its shapes, ask for."""
    names = "x_embedder.proj.weight", "final_layer.linear.bias", "y_embedder.embedding_table.weight"
    patches, outputs, classes = (state.get(name, torch.empty(0)) for name in names)
    settings = {
        '"learn_sigma": false': spec.config.get("learn_sigma", True) and 0 < len(outputs) == patches[:1].numel(),
        '"class_dropout_prob": 0': spec.config.get("class_dropout_prob", 0.1) and len(classes) == spec.num_classes,
    }
    for setting, needed in settings.items():
        if needed:
            return f'pass a model folder with these weights, whose config.json has {setting} in "model"'
    if not spec.registered:
        return "weights and config.json must be of one model"
    ours = {"model": spec.name, "image_size": spec.image_size, "num_classes": spec.num_classes}
    sources = {"arguments": arguments, "tensors": _flags_of_shapes(state, spec.name)}
    for source, flags in sources.items():
        others = {key: flags[key] for key in ours if isinstance(flags.get(key), str | int) and flags[key] != ours[key]}
        if others:
            pairs = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in others.items())
            return f"its {source} say {', '.join(map(str, others.values()))}: pass {pairs}"
    return "check --model, --image-size and --num-classes"


def _flags_of_shapes(state: dict[str, Tensor], name: str) -> dict[str, Any]:
    """The flags of the model with tensors of these shapes, a SiT if `name` is one's; {} if there is none."""
    try:
        width, _, patch, _ = state["x_embedder.proj.weight"].shape
        depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        sizes = {"hidden_size": width, "patch_size": patch, "depth": depth}
        model = next(model for model, build in DiT_models.items() if sizes.items() <= build.keywords.items())
        return {
            "model": name[:3] + model[3:],  # DiT or SiT
            "image_size": math.isqrt(state["pos_embed"].shape[1]) * patch * CELL_PIXELS,
            "num_classes": len(state["y_embedder.embedding_table.weight"]) - 1,
        }
    except (LookupError, ValueError, StopIteration):
        return {}


def load_vae(spec: ModelSpec, device: torch.device | str) -> Any:
    """The frozen AutoencoderKL of a spec in eval mode, float32, on `device`.

    Raises UserError if its folder is missing or damaged, or if it is not the VAE of this model.
    """
    folder = released.fetch_vae(spec.vae) if spec.vae in ("ema", "mse") else Path(spec.vae)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: a VAE folder is what diffusers' save_pretrained writes")
    config, weights = read_json(folder / "config.json"), weights_file(folder)
    tensors = load_shards(weights) if weights.suffix == ".json" else named_tensors(load_tensors(weights))
    state = {OLD_ATTENTION.sub(lambda old: old[1] + NEW_ATTENTION[old[2]], name): tensors[name] for name in tensors}
    try:
        if (kind := config.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
            raise ValueError(f"it is a {kind} and no AutoencoderKL")
        vae = _make_vae(config)
        _check_vae_config(vae.config)
        if differs := mismatch(_shapes(state), _shapes(vae.state_dict())):
            raise ValueError(differs)
    except Exception as error:  # a damaged configuration makes diffusers raise errors of any class
        raise UserError(
            f"the VAE in {folder} cannot be read ({first_line(error)}): mend its config.json, or save it again"
        ) from error
    vae.load_state_dict(_float_tensors(weights, state), assign=True)
    vae = vae.requires_grad_(False).eval().to(device)
    cell_pixels = 2 ** (len(vae.config.block_out_channels) - 1)
    channels, size, _ = spec.latent_shape
    if (vae.config.latent_channels, spec.image_size) != (channels, size * cell_pixels):
        raise UserError(
            f"the VAE in {folder} has {vae.config.latent_channels} channels and {cell_pixels} pixels to a cell, model "
            f"{spec.name} {channels} channels and {size} cells for {spec.image_size} pixels: use its own VAE"
        )
    return vae


def _make_vae(config: dict[str, Any]) -> Any:
    """The VAE of a config.json on the device "meta": ours, or for unusual settings that of diffusers."""
    with torch.device("meta"), WithoutWeights():
        if autoencoder.fits(config):
            return autoencoder.AutoencoderKL(config)
        from diffusers import AutoencoderKL

        return AutoencoderKL.from_config(config)


def _check_vae_config(config: Any) -> None:
    """Raise ValueError if settings that decoding and encoding need are wrong or not implemented."""
    scale, shift = config.scaling_factor, config.get("shift_factor")
    if type(scale) not in (int, float) or not 1e-6 < scale < 1e6:
        raise ValueError(f"scaling_factor is {scale!r} and must be a number from 1e-6 to 1e6, as 0.18215")
    if shift is not None and (type(shift) not in (int, float) or not abs(shift) < 1e6):
        raise ValueError(f"shift_factor is {shift!r} and must be null or a finite number")
    for name in ("latents_mean", "latents_std", "quantization_config"):
        if config.get(name) is not None:
            raise ValueError(f"{name} is {config[name]!r}, which is not implemented here and must be null")
    if (config.in_channels, config.out_channels) != (3, 3):
        raise ValueError(f"it has {config.in_channels} and {config.out_channels} channels of pixels and needs 3 and 3")
