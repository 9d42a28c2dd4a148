"""Other people's checkpoints: weights as DiT, fast-DiT and torch.compile save them, and the layout of diffusers.

diffusers' DiT is not exactly the original: its timestep features have the frequencies 10000 ** -(k/127), not
10000 ** -(k/128), and the norm before its MLPs has eps 1e-5, not 1e-6. What is loaded from there keeps that
(`frequency_shift` and `mlp_norm_eps` of `DiT`), so that it computes here what it computes there.

facebook/DiT-XL-2-256 is the original's weights in that layout: trained with one set of frequencies, run by diffusers
with the other. With this line the model of a pipeline runs as it was trained, and "frequency_shift": 0 in the
transformer's config.json does so here:

    for block in pipe.transformer.transformer_blocks: block.norm1.emb.time_proj.downscale_freq_shift = 0
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import DiT, position_table
from runtime.errors import UserError

# Names of linear layers, ours: diffusers'. Both split modulations in the same order.
MODEL = {"x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1"}
MODEL |= {"final_layer.linear": "proj_out_2"}
BLOCK = {"attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
BLOCK |= {"adaLN_modulation.1": "norm1.linear"}
# A DiT has these once, diffusers in every block.
REPEATED = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}

# What diffusers can vary and a DiT cannot; all of them are its defaults for a DiT.
FIXED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "cross_attention_dim": None,
    "num_vector_embeds": None,
}
# With diffusers' defaults: a config.json may leave them out.
SIZES = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "num_embeds_ada_norm": 1000}
SIZES |= {"sample_size": 32, "patch_size": 2, "in_channels": 4}
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second one is its older name
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def _names(depth: int) -> dict[str, list[str]]:
    """What the tensors of a DiT of `depth` blocks are in diffusers, {name: [names there]}.

    Of several, those of an "attn.qkv" are its parts from top to bottom, the others are copies of one another.
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
    """The state dict of a DiT, without its fixed positions, from that of diffusers' DiTTransformer2DModel.

    Raises ValueError where tensors are missing or unknown, or the embedders of the blocks differ: a DiT has only one.
    """
    names = _names(len({name.split(".")[1] for name in state if name.startswith("transformer_blocks.")}))
    known = {name for theirs in names.values() for name in theirs}
    # Old versions saved the positions, which are the same as ours; new ones drop them when they load.
    wrong = sorted(known ^ (state.keys() - {"pos_embed.pos_embed"}))
    if wrong:
        raise ValueError(f"{len(wrong)} tensors are missing or unknown, {wrong[0]} first")
    mapped = {}
    for ours, theirs in names.items():
        tensors = [state[name] for name in theirs]
        if ".qkv." in ours:
            mapped[ours] = torch.cat(tensors)
            continue
        mapped[ours] = tensors[0]
        for name, tensor in zip(theirs, tensors):
            if not torch.equal(tensor, tensors[0]):
                raise ValueError(f"{name} differs from {theirs[0]}, and a DiT has one embedder for all blocks")
    return mapped


def dit_config(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `DiT` for a configuration (a dict) of diffusers' DiTTransformer2DModel.

    Raises ValueError where a DiT cannot be like that.
    """
    for name, only in FIXED.items():
        if config.get(name, only) != only:
            raise ValueError(f"{name} is {config[name]!r} and a DiT has {only!r}")
    sizes = {name: config.get(name, default) for name, default in SIZES.items()}
    for name, size in sizes.items():
        if not isinstance(size, int):
            raise ValueError(f"{name} is {size!r} and no whole number")
    channels = sizes["in_channels"]
    out_channels = config.get("out_channels") or channels
    if out_channels not in (channels, 2 * channels):
        raise ValueError(f"out_channels is {out_channels} and a DiT has {channels} or {2 * channels}")
    eps, shift = config.get("norm_eps", 1e-5), config.get("frequency_shift", 1)
    if not isinstance(eps, float | int) or not eps > 0:
        raise ValueError(f"norm_eps is {eps!r} and no positive number")
    if shift not in (0, 1):
        raise ValueError(f"frequency_shift is {shift!r}: 0 is the original's, 1 diffusers'")
    return {
        "input_size": sizes["sample_size"],
        "patch_size": sizes["patch_size"],
        "in_channels": channels,
        "hidden_size": sizes["num_attention_heads"] * sizes["attention_head_dim"],
        "depth": sizes["num_layers"],
        "num_heads": sizes["num_attention_heads"],
        "num_classes": sizes["num_embeds_ada_norm"],
        "learn_sigma": out_channels != channels,
        "frequency_shift": shift,
        "mlp_norm_eps": eps,
    }


def dit_from_transformer(transformer: Any) -> DiT:
    """A frozen DiT that computes what diffusers' DiTTransformer2DModel does, of the same type and device.

    Shares its weights, but for those of the queries, keys and values. Raises ValueError as `from_diffusers`.
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
    """diffusers' DiTTransformer2DModel that computes what a DiT does, of the same type and device.

    Saved with save_pretrained, it loads here as it was, since its config.json keeps `frequency_shift`. diffusers itself
    ignores that, and needs the line at the top of this file each time it loads a model that did not come from there.
    Raises ValueError where diffusers has no such model.
    """
    from diffusers import DiTTransformer2DModel

    block, (_, _, hidden) = dit.blocks[0], dit.pos_embed.shape
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
    theirs: dict[str, Tensor] = {}
    for ours, names in _names(dit.depth).items():
        theirs |= zip(names, state[ours].chunk(3) if ".qkv." in ours else [state[ours]] * len(names))
    transformer.load_state_dict(theirs)
    shift = dit.t_embedder.frequency_shift
    if shift != 1:
        transformer.register_to_config(frequency_shift=shift)
        for block in transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = shift
    return transformer.to(dit.pos_embed).requires_grad_(False).eval()


def is_diffusers(folder: Path) -> bool:
    """Whether the folder (a Path) is a pipeline or model as diffusers saves them."""
    if (folder / "model_index.json").is_file():
        return True
    return (folder / "config.json").is_file() and "_class_name" in _read_json(folder / "config.json")


def read_diffusers(folder: Path) -> dict[str, Any]:
    """What a folder (a Path) with a DiTPipeline or a DiTTransformer2DModel says of its model, as fields of a ModelSpec.

    "config" (arguments of `DiT`), "image_size", "weights"; of a pipeline also "vae", and "class_names" or None.
    Raises UserError where it is incomplete, damaged, or holds another model.
    """
    spec: dict[str, Any] = {}
    part, pixels = folder, 8  # a side of a latent cell, with the VAEs of the released models
    if (folder / "model_index.json").is_file():
        part, vae = folder / "transformer", folder / "vae"
        labels = _read_json(folder / "model_index.json").get("id2label") or {}
        if _weights(vae):
            # A configuration without them is `load_vae`'s to refuse.
            channels = _read_json(vae / "config.json").get("block_out_channels")
            spec["vae"], pixels = str(vae), 2 ** (len(channels) - 1) if isinstance(channels, list) else pixels
    config = _read_json(part / "config.json")
    kind, weights = config.get("_class_name"), _weights(part)
    if kind not in CLASSES or kind == CLASSES[1] and "norm_type" not in config:
        raise UserError(f"{part} holds a {kind} and not a DiT of diffusers, a {CLASSES[0]}: name the folder of one")
    if not weights:
        raise UserError(f"{part} has neither {' nor '.join(WEIGHTS)}: save the model whole, with save_pretrained")
    try:
        spec |= {"config": dit_config(config), "weights": str(weights)}
        spec["image_size"] = spec["config"]["input_size"] * pixels
        if part != folder:
            numbers = [str(k) for k in range(spec["config"]["num_classes"])]
            named = all(number in labels for number in numbers)
            # "tench, Tinca tinca": the first of several words for the same
            spec["class_names"] = tuple(labels[number].split(",")[0] for number in numbers) if named else None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{part / 'config.json'} is not of a model that runs here: {error}") from error
    return spec


def _weights(folder: Path) -> Path | None:
    """The file of the weights in a folder of diffusers, or None; one that cannot hold code where there is one."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def _read_json(path: Path) -> dict[str, Any]:
    """The dict in a JSON file. Raises UserError where there is none."""
    try:
        read = json.loads(path.read_text())
        if not isinstance(read, dict):
            raise ValueError("it holds no names")
        return read
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): diffusers' save_pretrained writes it") from error
