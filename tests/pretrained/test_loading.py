"""DiTs and VAEs from specs; weights from the files of others and from the Hugging Face Hub."""

import argparse
import fnmatch
import shutil
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import random_dit
from safetensors.torch import load_file
from small_models import (
    FILE,
    SAVED,
    edit_json,
    fixed_dit,
    load,
    random_transformer,
    refusal,
    same,
    save_again,
    save_pipeline,
)

from models import DiT, DiT_models
from pretrained.diffusers_layout import WEIGHTS, to_diffusers
from pretrained.loading import load_dit, load_vae
from pretrained.spec import model_spec
from pretrained.weights import find_model_folder, load_state_dict_of

SAFE = WEIGHTS[0]
STATE = {"x_embedder.weight": torch.arange(6.0).reshape(2, 3), "y": torch.ones(2, dtype=torch.float16)}
OTHER = {"y": torch.zeros(1)}
KEYS = "transformer_blocks.1.attn1.to_k.weight"


def test_a_model_folder_loads_and_random_weights_follow_the_seed_and_do_not_output_zero(model_folder):
    spec = model_spec(ckpt=str(model_folder))
    a, b, c = (load_dit(spec, "cpu", random_seed=seed) for seed in (1, 1, 2))
    assert same(a.state_dict(), b.state_dict()) and not same(a.state_dict(), c.state_dict())
    assert same(load(model_folder).state_dict(), random_dit().state_dict())
    assert a(torch.randn(1, 4, 4, 4), torch.tensor([5]), torch.tensor([0])).any()


def test_a_registered_model_loads_any_file_of_its_weights(tmp_path, monkeypatch):
    """With positions, without the fixed positions, and in the layout of diffusers."""
    monkeypatch.setitem(DiT_models, "DiT-S/8", partial(DiT, patch_size=8, hidden_size=24, depth=3, num_heads=2))
    dit = fixed_dit(input_size=32, patch_size=8)
    state = dit.state_dict()
    torch.save(state, tmp_path / "released.pt")
    torch.save({name: state[name] for name in state if name != "pos_embed"}, tmp_path / "short.pt")
    to_diffusers(dit).save_pretrained(tmp_path)
    for name in ("released.pt", "short.pt", SAFE):
        loaded = load_dit(model_spec("DiT-S/8", 256, num_classes=5, ckpt=str(tmp_path / name)), "cpu")
        assert same(loaded.state_dict(), state) and loaded.t_embedder.frequency_shift == 0


@pytest.mark.parametrize("damaged", ["latent_channels", "block_out_channels", "weights"])
def test_a_damaged_vae_is_refused(model_folder, tmp_path, damaged):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    if damaged == "weights":
        (folder / "vae" / SAFE).write_bytes((folder / "vae" / SAFE).read_bytes()[:-50])
    else:
        edit_json(folder / "vae" / "config.json", **{damaged: 3})
    assert "cannot be read" in refusal(load_vae, model_spec(ckpt=str(folder)), "cpu")


@pytest.mark.parametrize(
    "checkpoint",
    [
        STATE,
        {"model": OTHER, "ema": STATE, "opt": {"lr": 1e-4}, "args": argparse.Namespace(model="DiT-XL/2")},
        {"ema": {f"module.{name}": STATE[name] for name in STATE}, "model": OTHER},
        {"ema": None, "model": {f"_orig_mod.module.{name}": STATE[name] for name in STATE}},
        {f"module._orig_mod.{name}": STATE[name] for name in STATE},  # compiled before it was distributed
    ],
    ids=lambda checkpoint: " ".join(checkpoint),
)
def test_a_checkpoint_gives_its_averaged_weights_without_prefixes(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / "x.pt")
    assert same(load_state_dict_of(str(tmp_path / "x.pt")), STATE)


@pytest.mark.parametrize("content", [{}, torch.ones(2), {"ema": {}}, {1: OTHER["y"]}, {"model": {"y": "z"}}], ids=str)
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    message = refusal(load_state_dict_of, tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in message and "state_dict()" in message


def test_tensors_of_diffusers_that_no_dit_has_are_refused(tmp_path):
    state = random_transformer().state_dict()
    classes = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    wrong = {"more": torch.ones(1), classes: state[classes] + 1, KEYS: torch.ones(24, 23)}
    for name, words in zip(wrong, ("unknown tensors: 1 (more)", f"{classes} differs", "Sizes of tensors")):
        torch.save(state | {name: wrong[name]}, tmp_path / "x.pt")
        assert words in refusal(load_state_dict_of, tmp_path / "x.pt")


@pytest.mark.parametrize("how", ["plain", *SAVED])
def test_only_the_needed_files_of_a_hub_model_are_fetched(tmp_path, monkeypatch, how):
    """Variants are fetched and read only if there are no plain weights, and pickles if there are no safetensors."""
    hub, cache = save_pipeline(tmp_path / "hub"), tmp_path / "cache"
    expected, expected_vae = load(hub).state_dict(), load_file(hub / "vae" / SAFE)
    for part in ("transformer", "vae"):
        save_again(hub, part, **SAVED.get(how, {}))
        for more in ("fp32.safetensors", "bin") if how in ("plain", "shards") else ():
            (hub / part / f"{FILE}.{more}").write_bytes(b"not needed")
    needed = {path.name for path in hub.rglob("*.*")} - {f"{FILE}.fp32.safetensors", f"{FILE}.bin"}
    needed |= {f"{FILE}.bin"} if how == "pickles" else set()

    def snapshot_download(name, allow_patterns):
        for file in (str(path.relative_to(hub)) for path in hub.rglob("*") if path.is_file()):
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (cache / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(hub / file, cache / file)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    spec = model_spec(ckpt="someone/theirs")
    assert spec.name == "theirs" and same(load_dit(spec, "cpu").state_dict(), expected)
    assert same(load_vae(spec, "cpu").state_dict(), expected_vae)
    assert {path.name for path in cache.rglob("*.*")} == needed


def test_a_hub_model_that_cannot_be_fetched_is_refused(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refusal(find_model_folder, "someone/missing")
    assert "someone/missing" in message and "download it elsewhere" in message


@pytest.mark.parametrize(
    "name", ["no/such/folder", "gone.pt", "ckpt/gone.safetensors", "../gone", "ckpt/gone.th", "ckpt/x.index.json"]
)
def test_a_path_that_is_no_hub_name_is_not_looked_up_on_the_hub(name):
    assert find_model_folder(name) == Path(name)
