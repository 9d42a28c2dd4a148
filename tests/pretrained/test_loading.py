"""DiTs and VAEs from specs."""

import json
import math
import shutil
from functools import partial

import pytest
import torch
from conftest import random_dit
from safetensors.torch import load_file
from small_models import edit_json, fixed_dit, load, refusal, same, save_pipeline

import sampling
from models import DiT, DiT_models
from pretrained.diffusers_layout import WEIGHTS, to_diffusers
from pretrained.loading import load_dit, load_vae
from pretrained.spec import model_spec

SAFE, PICKLED = WEIGHTS


def test_a_model_folder_loads_with_its_vae(model_folder):
    spec = model_spec(ckpt=str(model_folder))
    assert same(load_dit(spec, "cpu").state_dict(), random_dit().state_dict())
    images = sampling.decode(load_vae(spec, "cpu"), torch.randn(3, 4, 4, 4))
    assert images.shape == (3, 8, 8, 3)


def test_random_weights_follow_the_seed_and_do_not_output_zero(model_folder):
    spec = model_spec(ckpt=str(model_folder))
    a, b, c = (load_dit(spec, "cpu", random_seed=seed) for seed in (1, 1, 2))
    x, t, y = torch.randn(1, 4, 4, 4), torch.tensor([5]), torch.tensor([0])
    assert a(x, t, y).any()
    assert torch.equal(a(x, t, y), b(x, t, y))
    assert not torch.allclose(a(x, t, y), c(x, t, y))


def test_a_registered_model_loads_any_file_of_its_weights(tmp_path, monkeypatch):
    """Weights with positions, without the fixed positions, and in the layout of diffusers."""
    monkeypatch.setitem(DiT_models, "DiT-S/8", partial(DiT, patch_size=8, hidden_size=24, depth=3, num_heads=2))
    dit = fixed_dit(input_size=32, patch_size=8)
    state = dit.state_dict()
    torch.save(state, tmp_path / "released.pt")
    torch.save({name: state[name] for name in state if name != "pos_embed"}, tmp_path / "short.pt")
    to_diffusers(dit).save_pretrained(tmp_path)
    for name in ("released.pt", "short.pt", SAFE):
        loaded = load_dit(model_spec("DiT-S/8", 256, num_classes=5, ckpt=str(tmp_path / name)), "cpu")
        assert same(loaded.state_dict(), state) and loaded.t_embedder.frequency_shift == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depht": 3}, "depht"),
        ({"depth": 4}, "does not fit"),
        ({"patch_size": 3}, "multiple"),
        ({"num_heads": 0}, "num_heads 0 is not a positive"),
        ({"frequency_shift": 128}, "frequency_shift 128 is neither 0 nor 1"),
        ({"mlp_norm_eps": math.inf}, "mlp_norm_eps inf is not a positive number"),
    ],
    ids=str,
)
def test_arguments_that_no_dit_or_not_these_weights_have_are_refused(model_folder, tmp_path, change, words):
    config = json.loads((model_folder / "config.json").read_text())
    shutil.copy(model_folder / "dit.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model": config["model"] | change}))
    assert words in refusal(load, tmp_path)


@pytest.mark.parametrize("damage", ["channels", "blocks", "cut off", "of another model"])
def test_a_damaged_vae_or_the_vae_of_another_model_is_refused(model_folder, tmp_path, damage):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    weights, words = folder / "vae" / SAFE, "cannot be read"
    if damage == "channels":
        edit_json(folder / "vae" / "config.json", latent_channels=3)
    elif damage == "blocks":
        edit_json(folder / "vae" / "config.json", block_out_channels=3)
    elif damage == "cut off":
        weights.write_bytes(weights.read_bytes()[:-50])
    else:
        edit_json(folder / "config.json", image_size=16)
        words = "2 pixels to a cell"
    assert words in refusal(load_vae, model_spec(ckpt=str(folder)), "cpu")


def test_pickled_weights_of_diffusers_load_if_there_are_no_safetensors(tmp_path):
    folder = save_pipeline(tmp_path)
    expected, vae = load(folder).state_dict(), load_vae(model_spec(ckpt=str(folder)), "cpu").state_dict()
    for part in ("transformer", "vae"):
        torch.save(load_file(folder / part / SAFE), folder / part / PICKLED)
        (folder / part / SAFE).unlink()
    assert same(load(folder).state_dict(), expected)
    assert same(load_vae(model_spec(ckpt=str(folder)), "cpu").state_dict(), vae)
