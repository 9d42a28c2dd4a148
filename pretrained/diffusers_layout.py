"""A DiT in the layout of diffusers, both ways.

diffusers' DiT differs from the original in two constants: its timestep features have the frequencies
10000 ** -(k/127), not 10000 ** -(k/128), and the norm before its MLPs has eps 1e-5, not 1e-6. A model that is loaded
from diffusers keeps both (`frequency_shift` and `mlp_norm_eps` of `DiT`), so it computes the same here as there.

facebook/DiT-XL-2-256 holds the original's weights in this layout: they were trained with the frequencies of the
original, and diffusers runs them with its own. This line makes a pipeline run the model as it was trained; here,
"frequency_shift": 0 in the transformer's config.json does the same:

    for block in pipe.transformer.transformer_blocks: block.norm1.emb.time_proj.downscale_freq_shift = 0
"""

from typing import Any

import torch
from torch import Tensor

from models import DiT, position_table
from runtime.files import mismatch

# Linear layers, {name in `DiT`: name in diffusers}. Both order the modulation vectors alike.
MODEL = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
# A DiT has one of each, diffusers one in every block.
REPEATED = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}

# Settings that diffusers can vary and a DiT cannot, with the value that a DiT has, which is also diffusers' default.
FIXED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "cross_attention_dim": None,
    "num_vector_embeds": None,
}
# Sizes, {argument of `DiT`: (name in diffusers, its default there)}: a config.json may leave out defaults.
SIZES = {
    "input_size": ("sample_size", 32),
    "patch_size": ("patch_size", 2),
    "in_channels": ("in_channels", 4),
    "depth": ("num_layers", 28),
    "num_heads": ("num_attention_heads", 16),
    "hidden_size": ("attention_head_dim", 72),  # per head
    "num_classes": ("num_embeds_ada_norm", 1000),
}
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second is the older name
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# Settings of a pipeline's scheduler that our diffusion has, which are also diffusers' defaults.
SCHEDULER = {
    "prediction_type": "epsilon",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}


def _names(depth: int) -> dict[str, list[str]]:
    """The tensors of a DiT of `depth` blocks as {name in `DiT`: names in diffusers}.

    An "attn.qkv" has three names, of its parts from top to bottom. Other tensors with several names are copies.
    """
    blocks = [f"transformer_blocks.{l}." for l in range(depth)]
    names: dict[str, list[str]] = {}
    for kind in (".weight", ".bias"):
        names |= {ours + kind: [theirs + kind] for ours, theirs in MODEL.items()}
        names |= {ours + kind: [block + theirs + kind for block in blocks] for ours, theirs in REPEATED.items()}
        for l, block in enumerate(blocks):
            names |= {f"blocks.{l}.{ours}{kind}": [block + theirs + kind] for ours, theirs in BLOCK.items()}
            names[f"blocks.{l}.attn.qkv{kind}"] = [f"{block}attn1.to_{part}{kind}" for part in "qkv"]
    del names["y_embedder.embedding_table.bias"]
    return names


def from_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a DiT, without the fixed positions, from the state dict of a DiTTransformer2DModel.

    Raises ValueError if tensors are missing or unknown, or if the embedders of the blocks differ.
    """
    names = _names(len({name.split(".")[1] for name in state if name.startswith("transformer_blocks.")}))
    known = [name for theirs in names.values() for name in theirs]
    # Old versions of diffusers saved the positions. They equal ours, and new versions drop them too.
    found = [name for name in state if name != "pos_embed.pos_embed"]
    if wrong := mismatch(dict.fromkeys(found), dict.fromkeys(known)):
        raise ValueError(wrong)
    mapped = {}
    for ours, theirs in names.items():
        tensors = [state[name] for name in theirs]
        parts = ".qkv." in ours
        for name, tensor in zip(theirs, tensors):
            if not parts and not torch.equal(tensor, tensors[0]):
                raise ValueError(f"{name} differs from {theirs[0]}, and a DiT has one embedder for all blocks")
        mapped[ours] = torch.cat(tensors) if parts else tensors[0]
    return mapped


def _check_settings(config: dict[str, Any], fixed: dict[str, Any], who: str) -> None:
    for name, only in fixed.items():
        if config.get(name, only) != only:
            raise ValueError(f"{name} is {config[name]!r} and {who} {only!r}")


def check_scheduler(config: dict[str, Any]) -> None:
    """Raise ValueError if the configuration of a pipeline's scheduler belongs to another diffusion than ours."""
    kind = config.get("_class_name")
    if "Flow" in str(kind):
        raise ValueError(f"a {kind} runs flow matching, and a DiT runs here with diffusion")
    _check_settings(config, SCHEDULER, "our diffusion has")


def dit_config(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `DiT` for the configuration of a DiTTransformer2DModel.

    Raises ValueError if diffusers' settings have no counterpart in `DiT`, which checks the sizes itself.
    """
    _check_settings(config, FIXED, "a DiT has")
    arguments = {}
    for ours, (theirs, default) in SIZES.items():
        arguments[ours] = config.get(theirs, default)
        if not isinstance(arguments[ours], int):
            raise ValueError(f"{theirs} is {arguments[ours]!r} and no whole number")
    arguments["hidden_size"] *= arguments["num_heads"]
    channels = arguments["in_channels"]
    out_channels = config.get("out_channels") or channels
    if out_channels not in (channels, 2 * channels):
        raise ValueError(f"out_channels is {out_channels} and a DiT has {channels} or {2 * channels}")
    return arguments | {
        "learn_sigma": out_channels != channels,
        "frequency_shift": config.get("frequency_shift", 1),
        "mlp_norm_eps": config.get("norm_eps", 1e-5),
    }


def dit_from_transformer(transformer: Any) -> DiT:
    """A frozen DiT that computes the same as a DiTTransformer2DModel, with its dtype and on its device.

    It shares the weights, except those of queries, keys and values. Raises ValueError if no DiT can be like that.
    """
    time_proj = transformer.transformer_blocks[0].norm1.emb.time_proj
    config = dit_config(transformer.config | {"frequency_shift": time_proj.downscale_freq_shift})
    with torch.device("meta"):
        dit = DiT(**config)
    positions = position_table(config["hidden_size"], config["input_size"] // config["patch_size"])
    positions = positions.to(transformer.device, transformer.dtype)
    dit.load_state_dict(from_diffusers(transformer.state_dict()) | {"pos_embed": positions}, assign=True)
    return dit.requires_grad_(False).eval()


def to_diffusers(dit: DiT) -> Any:
    """A frozen DiTTransformer2DModel that computes the same as a DiT, with its dtype and on its device.

    save_pretrained keeps `frequency_shift` in its config.json, so the model loads here unchanged. diffusers ignores
    `frequency_shift`: if it is 0, loading the model there needs the line at the top of this file.
    Raises ValueError if diffusers has no such model.
    """
    from diffusers import DiTTransformer2DModel

    block, hidden = dit.blocks[0], dit.pos_embed.shape[-1]
    positions = position_table(hidden, dit.input_size // dit.patch_size).to(dit.pos_embed)
    if not torch.allclose(dit.pos_embed, positions, atol=1e-6):
        raise ValueError("the positions of this DiT are not the fixed ones, and diffusers has only these")
    if block.mlp.fc1.out_features != 4 * hidden:
        raise ValueError(f"the MLPs are {block.mlp.fc1.out_features} wide and diffusers has only 4 * {hidden}")
    if dit.label_dropout == 0:
        raise ValueError("this DiT has no null class, and diffusers always has one")
    transformer: Any = DiTTransformer2DModel(
        num_attention_heads=block.attn.num_heads,
        attention_head_dim=hidden // block.attn.num_heads,
        in_channels=dit.in_channels,
        out_channels=dit.out_channels,
        num_layers=dit.depth,
        sample_size=dit.input_size,
        patch_size=dit.patch_size,
        num_embeds_ada_norm=dit.num_classes,
        norm_eps=block.norm2.eps,
    )
    state: dict[str, Tensor] = dit.state_dict()
    renamed: dict[str, Tensor] = {}
    for ours, theirs in _names(dit.depth).items():
        renamed |= zip(theirs, state[ours].chunk(3) if ".qkv." in ours else [state[ours]] * len(theirs))
    transformer.load_state_dict(renamed)
    shift = dit.t_embedder.frequency_shift
    if shift != 1:
        transformer.register_to_config(frequency_shift=shift)
        for block in transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = shift
    return transformer.to(dit.pos_embed).requires_grad_(False).eval()
