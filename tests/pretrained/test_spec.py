"""Specs of names, of model folders and of diffusers' folders, and the programs that take such a folder."""

import json
import shutil

import pytest
from conftest import assert_refused, call
from small_models import edit_json, load, refusal, save_pipeline

from pretrained.loading import load_dit, load_vae
from pretrained.spec import model_spec
from router import Router
from runtime import released


@pytest.fixture
def pipeline(tmp_path):
    return save_pipeline(tmp_path / "theirs")


def test_a_registered_name_has_released_weights_or_asks_for_a_checkpoint():
    spec = model_spec()
    assert spec.default_labels == [207, 992, 387, 974, 142, 979, 417, 279]
    assert (spec.weights, spec.registered) == ("DiT-XL-2-256x256.pt", True)
    assert model_spec(image_size=512).config["input_size"] == 64
    for spec in (model_spec("DiT-S/2"), model_spec(num_classes=7)):
        assert "--ckpt" in refusal(load_dit, spec, "cpu")
    assert "unknown model" in refusal(model_spec, "DiT-XXL/2")


def test_a_model_folder_needs_no_other_flag(model_folder):
    spec, name = model_spec(ckpt=str(model_folder)), model_spec("DiT-S/8")
    assert (spec.name, spec.image_size, spec.num_classes, spec.registered) == ("tiny", 8, 5, False)
    assert (spec.class_names, spec.default_labels) == (tuple("abcde"), [0, 1, 2, 3, 4])
    # Guidance: the requested scale, else the recommended, else the published.
    assert (spec.guidance(0.0, 1.5), spec.guidance(None, 1.5), name.guidance(None, 1.5)) == (0.0, 2.0, 1.5)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_guidance_leaves_the_variances_of_any_model_alone(model_folder, tmp_path, channels):
    """A model of C channels has C variances behind them; by default at most three channels are guided."""
    shutil.copytree(model_folder, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    edit_json(config, model=json.loads(config.read_text())["model"] | {"in_channels": channels})
    spec = model_spec(ckpt=str(tmp_path / "model"))
    assert spec.guidance(None, 1.5).channels == min(channels, 3)
    assert spec.guidance(None, 1.5, "all").channels == spec.guidance(None, 1.5, channels).channels == channels
    words = f"--cfg-channels {channels + 1} is more than the {channels} of model: pass at most {channels}, or all"
    assert words in refusal(spec.guidance, None, 1.5, channels + 1)


@pytest.mark.parametrize("name", ["sample.py", "sample_ddp.py"])
def test_more_guided_channels_than_the_model_has_are_refused(model_folder, tmp_path, monkeypatch, capfd, name):
    monkeypatch.chdir(tmp_path)
    flags = ["--ckpt", model_folder, "--device", "cpu", "--num-sampling-steps", 4, "--cfg-channels", 8]
    assert_refused(call(name, *flags, capfd=capfd), "--cfg-channels 8 is more than the 4 of tiny")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "cannot be read"),
        ('{"model": {}, "image_size": 8}', "'vae'"),
        ('{"model": {}, "cfg_scale": NaN}', "cfg_scale nan is not finite"),
        ('{"model": {"num_classes": "10"}}', "num_classes '10' is not a positive"),
        ('{"model": {"in_channels": "4"}}', "in_channels '4' is not a positive"),
        ('{"model": {"num_classes": 3}, "class_names": ["a"]}', "class_names"),
    ],
)
def test_a_model_folder_with_a_wrong_configuration_is_refused(tmp_path, config, words):
    (tmp_path / "dit.safetensors").touch()
    (tmp_path / "config.json").write_text(config)
    message = refusal(model_spec, ckpt=tmp_path)
    assert "config.json" in message and words in message


def test_a_pipeline_folder_describes_its_model(pipeline, monkeypatch):
    spec = model_spec(ckpt=str(pipeline))
    assert (spec.name, spec.image_size, spec.num_classes, spec.registered) == ("theirs", 8, 5, False)
    assert (spec.vae, spec.class_names) == (str(pipeline / "vae"), ("tench", "hen", "ox", "cat", "fly"))
    assert (spec.config["frequency_shift"], spec.config["mlp_norm_eps"]) == (1, 1e-5)
    alone = model_spec(ckpt=str(pipeline / "transformer"), vae="ema")
    assert (alone.name, alone.image_size, alone.vae, alone.class_names) == ("transformer", 32, "ema", None)
    # This VAE has two pixels per latent cell, the released ones eight.
    monkeypatch.setattr(released, "fetch_vae", lambda kind: pipeline / "vae")
    assert "2 pixels to a cell" in refusal(load_vae, alone, "cpu")


def test_sample_takes_a_pipeline_folder(pipeline, tmp_path, capfd):
    Router(4, 3).save(tmp_path / "router.pt")
    flags = ["--ckpt", pipeline, "--device", "cpu", "--num-sampling-steps", 4, "--repeats", 1]
    flags += ["--accelerate-method", "dynamiclayer", "--path", tmp_path / "router.pt"]
    result = call("sample.py", *flags, "--out", tmp_path / "x.png", capfd=capfd)
    assert result.returncode == 0, result.stderr
    assert "Classes: tench, hen, ox, cat, fly\n" in result.stdout and (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_type": "ada_norm_single"}, "norm_type is 'ada_norm_single'"),
        ({"out_channels": 5}, "out_channels is 5"),
        ({"num_attention_heads": "two"}, "num_attention_heads is 'two'"),
        ({"attention_head_dim": 7}, "hidden_size 14"),
        ({"frequency_shift": 256}, "frequency_shift 256"),
        ({"num_embeds_ada_norm": 10**12}, "does not fit"),
        ({"_class_name": "UNet2DModel"}, "holds a UNet2DModel"),
    ],
    ids=str,
)
def test_a_model_of_diffusers_that_no_dit_can_be_is_refused(pipeline, changes, words):
    edit_json(pipeline / "transformer" / "config.json", **changes)
    message = refusal(load, pipeline)
    assert pipeline.name in message and words in message


@pytest.mark.parametrize("content", ["{", "[]", None])
@pytest.mark.parametrize("file", ["transformer/config.json", "vae/config.json", "model_index.json"])
def test_a_damaged_or_missing_file_of_diffusers_is_refused(pipeline, file, content):
    (pipeline / file).unlink() if content is None else (pipeline / file).write_text(content)
    place = pipeline if (file, content) == ("model_index.json", None) else pipeline / file
    assert str(place) in refusal(load, pipeline)


def test_a_configuration_is_utf_8_with_or_without_a_mark(model_folder, tmp_path):
    """Editors of Windows begin a file with a mark, and its characters are UTF-8 in any locale."""
    config = json.loads((model_folder / "config.json").read_text()) | {"class_names": ["café", *"bcde"]}
    shutil.copytree(model_folder, tmp_path, dirs_exist_ok=True)
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "config.json").write_text(json.dumps(config, ensure_ascii=False), encoding=encoding)
        assert model_spec(ckpt=str(tmp_path)).class_names[0] == "café"
