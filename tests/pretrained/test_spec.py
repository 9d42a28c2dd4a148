"""Specs of names, of model folders and of diffusers' folders, and the programs that take such a folder."""

import os

import pytest
import torch
from conftest import call
from safetensors.torch import load_file, save_file
from small_models import Hostile, edit_json, load, refusal, save_pipeline

from pretrained.diffusers_layout import WEIGHTS
from pretrained.loading import load_dit, load_vae
from pretrained.spec import model_spec
from router import Router
from runtime import released

SAFE, PICKLED = WEIGHTS


@pytest.fixture
def pipeline(tmp_path):
    return save_pipeline(tmp_path / "theirs")


def test_the_released_model_shows_the_eight_published_classes():
    spec = model_spec()
    assert spec.default_labels == [207, 992, 387, 974, 142, 979, 417, 279]
    assert (spec.weights, spec.registered) == ("DiT-XL-2-256x256.pt", True)
    assert model_spec(image_size=512).config["input_size"] == 64


def test_models_without_released_weights_ask_for_a_checkpoint():
    for spec in (model_spec("DiT-S/2"), model_spec(num_classes=7)):
        assert "--ckpt" in refusal(load_dit, spec, "cpu")
    assert "unknown model" in refusal(model_spec, "DiT-XXL/2")


def test_a_model_folder_needs_no_other_flag(model_folder):
    spec = model_spec(ckpt=str(model_folder))
    assert (spec.name, spec.image_size, spec.num_classes, spec.registered) == ("tiny", 8, 5, False)
    assert (spec.class_names, spec.default_labels) == (tuple("abcde"), [0, 1, 2, 3, 4])


def test_guidance_is_requested_else_recommended_by_the_folder_else_published(model_folder):
    folder, name = model_spec(ckpt=str(model_folder)), model_spec("DiT-S/8")
    assert folder.guidance(None, 1.5) == 2.0 and folder.guidance(0.0, 1.5) == 0.0
    assert name.guidance(None, 1.5) == 1.5 and name.guidance(3.0, 1.5) == 3.0


REST = '"image_size": 8, "vae": "vae"'


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "model"),
        ('{"model": 3, ' + REST + "}", "TypeError"),
        ('{"model": {}, "image_size": 8}', "vae"),
        ('{"model": {}, "cfg_scale": NaN, ' + REST + "}", "cfg_scale nan is not finite"),
        ('{"model": {"num_classes": "10"}, ' + REST + "}", "num_classes '10' is not a positive"),
        ('{"model": {"num_classes": 3}, "class_names": ["a"], ' + REST + "}", "class_names"),
    ],
)
def test_a_model_folder_with_a_wrong_configuration_is_refused(tmp_path, config, words):
    assert "no config.json and no dit.safetensors" in refusal(model_spec, "", 0, 0, "", tmp_path)
    (tmp_path / "dit.safetensors").touch()
    (tmp_path / "config.json").write_text(config)
    message = refusal(model_spec, "", 0, 0, "", tmp_path)
    assert "config.json" in message and words in message


def test_a_pipeline_folder_describes_its_model(pipeline):
    spec = model_spec(ckpt=str(pipeline))
    assert (spec.name, spec.image_size, spec.num_classes, spec.registered) == ("theirs", 8, 5, False)
    assert (spec.vae, spec.class_names) == (str(pipeline / "vae"), ("tench", "hen", "ox", "cat", "fly"))
    assert (spec.config["frequency_shift"], spec.config["mlp_norm_eps"]) == (1, 1e-5)


def test_a_transformer_folder_uses_the_released_vae(pipeline, monkeypatch):
    spec = model_spec(ckpt=str(pipeline / "transformer"), vae="ema")
    assert (spec.name, spec.image_size, spec.vae, spec.class_names) == ("transformer", 32, "ema", None)
    # This VAE has two pixels per latent cell, the released ones eight.
    monkeypatch.setattr(released, "fetch_vae", lambda kind: pipeline / "vae")
    message = refusal(load_vae, spec, "cpu")
    assert "2 pixels to a cell" in message and "4 cells for 32 pixels" in message


def test_programs_take_a_pipeline_folder(pipeline, image_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    common = ["--device", "cpu", "--ckpt", pipeline, "--num-sampling-steps", 4]
    Router(4, 3).save("router.pt")
    reuse = ["--accelerate-method", "dynamiclayer", "--path", "router.pt", "--thres", 0.5]
    result = call("sample.py", *common, *reuse, "--ddim-sample", "--repeats", 1, "--out", "x.png", capfd=capfd)
    assert result.returncode == 0, result.stderr
    assert "Classes: tench, hen, ox, cat\n" in result.stdout and (tmp_path / "x.png").exists()
    training = ["--data-path", image_folder, "--global-batch-size", 4, "--draws-per-step", 2, "--num-workers", 0]
    result = call("train_router.py", *common, *training, "--max-steps", 1, capfd=capfd)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "results" / "000-theirs").is_dir() and f"sample.py --ckpt {pipeline} --num" in result.stdout
    result = call("sample_ddp.py", *common, "--num-fid-samples", 3, capfd=capfd)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "samples" / "theirs-size-8-cfg-1.5-seed-0-ddim-4-n-3.npz").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_type": "ada_norm_single"}, "norm_type is 'ada_norm_single'"),
        ({"attention_bias": False}, "attention_bias"),
        ({"out_channels": 5}, "out_channels is 5"),
        ({"num_attention_heads": "two"}, "num_attention_heads is 'two'"),
        ({"attention_head_dim": 7}, "hidden_size 14"),
        ({"sample_size": None}, "sample_size is None"),
        ({"norm_eps": "small"}, "norm_eps 'small'"),
        ({"frequency_shift": 256}, "frequency_shift 256"),
        ({"num_layers": 2}, "does not fit"),
        ({"num_embeds_ada_norm": 10**12}, "does not fit"),
        ({"_class_name": "UNet2DModel"}, "holds a UNet2DModel"),
    ],
    ids=str,
)
def test_a_model_of_diffusers_that_no_dit_can_be_is_refused(pipeline, changes, words):
    edit_json(pipeline / "transformer" / "config.json", **changes)
    message = refusal(load, pipeline)
    assert pipeline.name in message and words in message


@pytest.mark.parametrize(
    "file", ["model_index.json", "transformer/config.json", f"transformer/{SAFE}", "vae/config.json"]
)
def test_a_damaged_or_missing_file_of_diffusers_is_refused(pipeline, file):
    damaged = pipeline / file
    if file == f"transformer/{SAFE}":
        os.truncate(damaged, 1000)
        assert SAFE in refusal(load, pipeline)
        damaged.unlink()
        message = refusal(load, pipeline)
        assert SAFE in message and PICKLED in message
        torch.save({"args": Hostile(pipeline / "ran")}, pipeline / "transformer" / PICKLED)
        assert "was not loaded" in refusal(load, pipeline) and not (pipeline / "ran").exists()
        return
    for content in ("{", "[]", None):
        damaged.unlink() if content is None else damaged.write_text(content)
        if file == "model_index.json" and content is None:
            assert "not a model folder" in refusal(load, pipeline)
        else:
            assert str(damaged) in refusal(load, pipeline)


def test_tensors_that_no_dit_has_are_refused(pipeline):
    weights = pipeline / "transformer" / SAFE
    state = load_file(weights)
    classes = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    keys = "transformer_blocks.1.attn1.to_k.weight"
    for tensors, words in (
        (state | {classes: state[classes] + 1}, f"{classes} differs"),
        ({name: state[name] for name in state.keys() - {classes}}, f"missing or unknown, {classes}"),
        (state | {"more": torch.ones(1)}, "missing or unknown, more"),
        (state | {keys: torch.ones(24, 23)}, SAFE),
    ):
        save_file(tensors, weights)
        assert words in refusal(load, pipeline)
