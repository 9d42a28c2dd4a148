"""Load the DiT and the VAE of a `ModelSpec`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import DiT, DiT_models, position_table
from pretrained.diffusers_layout import WEIGHTS
from pretrained.spec import ModelSpec
from pretrained.weights import load_state_dict_of
from runtime import released
from runtime.errors import UserError, first_line


def load_dit(spec: ModelSpec, device: torch.device | str, random_seed: int | None = None) -> DiT:
    """The frozen DiT of a spec in eval mode, float32, on `device`.

    random_seed: draws all weights instead of reading them (a fresh DiT would output exactly 0); None reads them.
    Raises UserError if the weights are missing, damaged, or of another model.
    """
    build = DiT_models[spec.name] if spec.registered else DiT
    try:
        with torch.device("meta"):
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
        raise UserError(
            f"there are no released weights for {spec.name} at {spec.image_size} with {spec.num_classes} classes, only "
            "for DiT-XL/2 at 256 and 512 with 1000: pass --ckpt with weights of your own"
        )
    state = {name: value.float() for name, value in load_state_dict_of(spec.weights).items()}
    if "pos_embed" not in state:  # the positions are fixed, so some files leave them out
        state["pos_embed"] = position_table(dit.pos_embed.shape[-1], dit.input_size // dit.patch_size)
    shapes = {name: value.shape for name, value in state.items()}
    expected = {name: value.shape for name, value in dit.state_dict().items()}
    wrong = sorted(name for name in expected.keys() | shapes.keys() if shapes.get(name) != expected.get(name))
    if wrong:
        raise UserError(
            f"{spec.weights} does not fit model {spec.name} with {spec.config}: {len(wrong)} of {len(expected)} "
            f"tensors are missing, unknown or of another shape, {wrong[0]} first; check --model, --image-size "
            "and --num-classes"
        )
    return state


def load_vae(spec: ModelSpec, device: torch.device | str) -> Any:
    """The frozen AutoencoderKL of a spec in eval mode, float32, on `device`.

    Raises UserError if its folder is missing or damaged, or if it is not the VAE of this model.
    """
    from diffusers import AutoencoderKL

    folder = released.fetch_vae(spec.vae) if spec.vae in ("ema", "mse") else Path(spec.vae)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: a VAE folder is what diffusers' save_pretrained writes")
    try:
        # Read an older .bin only if there is nothing else; diffusers loads it as weights only and runs no code in it.
        pickled = not (folder / WEIGHTS[0]).is_file() and (folder / WEIGHTS[1]).is_file()
        vae = AutoencoderKL.from_pretrained(folder, local_files_only=True, use_safetensors=not pickled)
        for parameter in vae.parameters():  # copy the memory map: if the file is cut off later, it kills the process
            parameter.data = parameter.data.clone()
        vae = vae.requires_grad_(False).eval().to(device)
    except Exception as error:  # a damaged configuration or file makes diffusers raise errors of any class
        raise UserError(f"the VAE in {folder} cannot be read ({first_line(error)}): save it again") from error
    cell_pixels = 2 ** (len(vae.config.block_out_channels) - 1)
    channels, size = spec.config.get("in_channels", 4), spec.config.get("input_size", 32)
    if (vae.config.latent_channels, spec.image_size) != (channels, size * cell_pixels):
        raise UserError(
            f"the VAE in {folder} has {vae.config.latent_channels} channels and {cell_pixels} pixels to a cell, model "
            f"{spec.name} {channels} channels and {size} cells for {spec.image_size} pixels: use its own VAE"
        )
    return vae
