"""Load the DiT and the VAE of a `ModelSpec`."""

from pathlib import Path
from typing import Any

import torch

from models import DiT, DiT_models, position_table
from pretrained.diffusers_layout import WEIGHTS
from pretrained.spec import ModelSpec
from pretrained.weights import load_state_dict_of
from runtime import released
from runtime.errors import UserError


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
        state = {name: value.float() for name, value in load_state_dict_of(spec.weights).items()}
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

    folder = released.fetch_vae(spec.vae) if spec.vae in ("ema", "mse") else Path(spec.vae)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: a VAE folder is what diffusers' save_pretrained writes")
    try:
        # An older .bin is read only where there is nothing else, and as weights only: nothing in it is run.
        pickled = not (folder / WEIGHTS[0]).is_file() and (folder / WEIGHTS[1]).is_file()
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
