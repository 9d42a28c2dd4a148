"""A DiT in the layout of diffusers, both ways.

diffusers' DiT differs from the original in two constants: its timestep features have the frequencies
10000 ** -(k/127), not 10000 ** -(k/128), and the norm before its MLPs has eps 1e-5, not 1e-6. A model that is loaded
from diffusers keeps both (`frequency_shift` and `mlp_norm_eps` of `DiT`), so it computes the same here as there.
diffusers' DiTPipeline has two more: its null class is 1000, and it guides all channels. `as_trained` makes a model of
another number of classes, or with other guided channels, run in it.

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
ROUNDING = 2**-8  # of positions that were saved in bfloat16; those in float16 are off by 2**-12
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second is the older name
NULL_CLASS = 1000  # that DiTPipeline gives to guidance, whatever the model
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
    positions = transformer.pos_embed.pos_embed.to(transformer.device, transformer.dtype)
    dit.load_state_dict(from_diffusers(transformer.state_dict()) | {"pos_embed": positions}, assign=True)
    return dit.requires_grad_(False).eval()


def to_diffusers(dit: DiT, cfg_channels: int | None = None) -> Any:
    """A frozen DiTTransformer2DModel that computes the same as a DiT, with its dtype and on its device.

    It runs in a DiTPipeline as it is. cfg_channels: how many channels the pipeline guides; None is all.
    save_pretrained keeps `frequency_shift` and `cfg_channels` in its config.json, so the model loads here unchanged.
    diffusers ignores both: call `as_trained` with the model that it loads.
    Raises ValueError if diffusers has no such model.
    """
    from diffusers import DiTTransformer2DModel

    block, hidden = dit.blocks[0], dit.pos_embed.shape[-1]
    positions = position_table(hidden, dit.input_size // dit.patch_size).to(dit.pos_embed)
    if not torch.allclose(dit.pos_embed, positions, rtol=0, atol=ROUNDING):
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
    transformer.pos_embed.pos_embed = dit.pos_embed.detach().clone()  # to the last digit
    if (shift := dit.t_embedder.frequency_shift) != 1:
        transformer.register_to_config(frequency_shift=shift)
    transformer = transformer.to(dit.pos_embed).requires_grad_(False).eval()
    return as_trained(transformer, cfg_channels)


def as_trained(transformer: Any, cfg_channels: int | None = None) -> Any:
    """Make a DiTTransformer2DModel of `to_diffusers`, loaded by diffusers, run in a DiTPipeline as our DiT; return it.

    It gets the timestep features that its config.json names, its own null class instead of 1000, and guidance on
    `cfg_channels` channels (None: those of the config, else all). The last two are hooks of the module, if
    they are needed.
    Raises ValueError as `check_channels`.
    """
    config = transformer.config
    cfg_channels = check_channels(config.in_channels, cfg_channels, config.get("cfg_channels"))
    if (shift := config.get("frequency_shift")) is not None:
        for block in transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = shift
    if cfg_channels != config.get("cfg_channels", config.in_channels):
        transformer.register_to_config(cfg_channels=cfg_channels)
    if config.num_embeds_ada_norm != NULL_CLASS:
        transformer.register_forward_pre_hook(_own_null_class, with_kwargs=True)
    if cfg_channels < config.in_channels:
        transformer.register_forward_hook(_own_channels, with_kwargs=True)
    return transformer


def check_channels(channels: int, cfg_channels: int | None, default: int | None = None) -> int:
    """How many of a model's channels to guide: `cfg_channels`, else `default`, else all.

    Raises ValueError if that is no whole number, or if the model has fewer.
    """
    if cfg_channels is None:
        return min(default or channels, channels)
    if cfg_channels not in range(1, channels + 1):
        raise ValueError(
            f"cfg_channels {cfg_channels!r} is no whole number from 1 to {channels}, the channels of the model"
        )
    return int(cfg_channels)


def _own_null_class(transformer: Any, args: tuple, inputs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The hook before a call: the labels get the null class of the model."""
    own = transformer.config.num_embeds_ada_norm
    x = args[0] if args else inputs["hidden_states"]
    labels = inputs["class_labels"]
    return args, inputs | {"class_labels": with_null_class(labels, own, is_guided(x, labels))}


def _own_channels(transformer: Any, args: tuple, inputs: dict[str, Any], output: Any) -> Any:
    """The hook after a call: only the first `cfg_channels` of the configuration are guided."""
    config = transformer.config
    x = args[0] if args else inputs["hidden_states"]
    guided = is_guided(x, inputs["class_labels"], config.num_embeds_ada_norm)
    channels = slice(config.get("cfg_channels", config.in_channels), config.in_channels)
    leave_unguided(output.sample if hasattr(output, "sample") else output[0], channels, guided)
    return output


def is_guided(x: Tensor, labels: Tensor, null_class: int = NULL_CLASS) -> Tensor:
    """Whether x (N, C, H, W) and labels (N,) are a batch of guidance, [x, x] and [y, null], as a bool tensor ().

    It stays on the device, so that no step waits for it.
    """
    half = len(x) // 2
    if not half or len(x) % 2:
        return torch.zeros((), dtype=torch.bool, device=x.device)
    return (labels[half:] == null_class).all() & (x[:half] == x[half:]).all()


def with_null_class(labels: Tensor, null_class: int, guided: Tensor) -> Tensor:
    """The labels (N,), their second half replaced by `null_class` if `guided`."""
    half = len(labels) // 2
    return torch.cat([labels[:half], torch.where(guided, null_class, labels[half:])])


def leave_unguided(output: Tensor, channels: slice, guided: Tensor) -> None:
    """Let guidance pass these channels of the output (N, C', H, W) of a batch by, if it is `guided`; in place.

    Both halves get the output for the labels, so that the difference which guidance adds is 0. An odd batch, which has
    no halves, is never guided.
    """
    half = len(output) // 2
    if channels.start < channels.stop and len(output) % 2 == 0:
        output[half:, channels] = torch.where(guided, output[:half, channels], output[half:, channels])
