"""Small models of diffusers with random weights, their folders, and comparisons that several tests share."""

import json

import pytest
import torch
from conftest import random_dit, random_vae
from diffusers import DiTTransformer2DModel

from models import position_table
from pretrained.loading import load_dit
from pretrained.spec import model_spec
from runtime.errors import UserError

FILE = "diffusion_pytorch_model"
# Ways to save a model with diffusers.
SAVED = {
    "shards": dict(max_shard_size="20KB"),
    "a variant": dict(variant="fp16"),
    "shards of a variant": dict(variant="ema", max_shard_size="20KB"),
    "pickles": dict(safe_serialization=False),
    "shards of pickles": dict(safe_serialization=False, max_shard_size="20KB"),
}


def random_transformer(**config):
    """A small DiTTransformer2DModel with random parameters and the same embedders in every block."""
    torch.manual_seed(0)
    sizes = dict(num_attention_heads=2, attention_head_dim=12, out_channels=8, num_layers=3, sample_size=4)
    transformer = DiTTransformer2DModel(**(sizes | {"num_embeds_ada_norm": 5} | config)).eval().requires_grad_(False)
    for parameter in transformer.parameters():
        parameter.normal_(std=0.2)
    for block in transformer.transformer_blocks:
        block.norm1.emb.load_state_dict(transformer.transformer_blocks[0].norm1.emb.state_dict())
    return transformer


def fixed_dit(**config):
    """`random_dit` with the fixed positions, the only ones that diffusers has."""
    dit = random_dit(**config)
    dit.pos_embed.copy_(position_table(24, dit.input_size // dit.patch_size))
    return dit


def save_pipeline(folder):
    """Save a DiTPipeline of 8x8 pixels and five classes as facebook/DiT-XL-2-256 is saved; return its folder."""
    random_transformer().save_pretrained(folder / "transformer")
    edit_json(folder / "transformer" / "config.json", _class_name="Transformer2DModel", use_linear_projection=False)
    random_vae().save_pretrained(folder / "vae")
    names = {str(k): f"{name}, another word" for k, name in enumerate(["tench", "hen", "ox", "cat", "fly"])}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", "id2label": names}))
    return folder


def save_again(pipeline, part, **how):
    """Save a part of a pipeline in another way; its configuration stays."""
    model = {"transformer": random_transformer, "vae": random_vae}[part]()
    config = (pipeline / part / "config.json").read_text()
    (pipeline / part / f"{FILE}.safetensors").unlink(missing_ok=True)
    model.save_pretrained(pipeline / part, **how)
    (pipeline / part / "config.json").write_text(config)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(folder):
    return load_dit(model_spec(ckpt=str(folder)), "cpu")


def refusal(call, *args, **kwargs):
    """The message, one line, of the UserError that the call raises."""
    with pytest.raises(UserError, match=r"^[^\n]+$") as caught:
        call(*args, **kwargs)
    return str(caught.value)


def difference(actual, expected):
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)
