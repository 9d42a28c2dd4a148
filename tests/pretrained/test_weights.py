"""Files of weights that others saved: prefixes, shards, variants, look-alikes, and what lies in the place of a file."""

import argparse
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_refused, call
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from small_models import FILE, SAVED, edit_json, fixed_dit, load, refusal, same, save_again, save_pipeline

from models import DiT, DiT_models
from pretrained.diffusers_layout import to_diffusers
from pretrained.loading import load_dit, load_vae
from pretrained.spec import model_spec
from pretrained.weights import load_state_dict_of

DIT = fixed_dit()
STATE = DIT.state_dict()
RAW = {name: value + 1 for name, value in STATE.items()}
ONE = torch.ones(1)


def below(prefix, state=STATE):
    return {prefix + name: value for name, value in state.items()}


def inside(module):
    """The names of a state dict if a block is wrapped."""
    return {name.replace("blocks.1.", f"blocks.1.{module}."): value for name, value in STATE.items()}


CHECKPOINTS = {
    "Lightning": {"state_dict": below("net.") | {"vae.encoder.conv_in.weight": ONE}, "epoch": 3},
    "Lightning with averages": {"state_dict": below("model.net.", RAW) | below("net_ema.")},
    "nested wrappers": {"state_dict": below("dit._orig_mod.module.module.")},
    "ema_model": {"model": RAW, "ema_model": below("module.")},
    "ema_pytorch": {"initted": ONE, "step": ONE} | below("online_model.", RAW) | below("ema_model."),
    "ema_pytorch in ema": {"ema": below("online_model.", RAW) | below("ema_model.") | {"step": ONE}, "model": RAW},
    "AveragedModel": below("module.") | {"n_averaged": torch.tensor(4)},
    "model_state_dict": {"model_state_dict": STATE, "optimizer": {"state": {0: {"exp_avg": ONE}}}},
    "params_ema": {"params": RAW, "params_ema": STATE},
    "DeepSpeed": {"module": STATE, "ds_version": "0.14"},
    "FSDP": {"model": below("_fsdp_wrapped_module.", inside("_fsdp_wrapped_module._checkpoint_wrapped_module"))},
    "layout of diffusers": {"state_dict": below("module.transformer.", to_diffusers(DIT).state_dict())},
    "no averages": {"ema": {}, "model": STATE},
    "one model by two names": {"state_dict": below("net.") | below("sampler.net.")},
    "NumPy's values and paths": {
        "ema": STATE,
        "args": argparse.Namespace(lr=np.float64(1e-3), amp=np.bool_(True), name=np.str_("é"), out=Path("a/b")),
        "random": np.random.default_rng(0).integers(9, size=3),
        "version": torch.__version__,
    },
}


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("zipped", [True, False])
def test_the_dit_of_a_checkpoint_is_found_by_its_names(tmp_path, name, zipped):
    torch.save(CHECKPOINTS[name], tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    state = load_state_dict_of(tmp_path / "x.ckpt")
    assert same(state | {"pos_embed": STATE["pos_embed"]}, STATE)  # diffusers saves no positions


def test_safetensors_are_known_by_their_content(tmp_path):
    save_file(STATE, tmp_path / "x.pt", metadata={"format": "pt"})
    assert same(load_state_dict_of(tmp_path / "x.pt"), STATE)


@pytest.mark.parametrize(
    ("checkpoint", "words"),
    [
        ({"student": below("net."), "teacher": below("net.", RAW)}, "student.net. and teacher.net."),
        ({"encoder.conv_in.weight": ONE, "x": ONE}, "no state dict of one (it has encoder.conv_in.weight and 1 other"),
        ({"model": DIT}, "models.DiT, which could run code"),
        ({"ema": STATE, "args": argparse.Namespace(model="SiT-XL/2")}, "model SiT-XL/2"),
        ({"ema": STATE, "args": argparse.Namespace(path_type="Linear", loss_weight=None)}, "SiT"),
        ({"ema": STATE, "args": {"model": "DiT-XL/2", "prediction": "velocity"}}, "prediction velocity"),
        (STATE | {"projectors.0.0.weight": ONE}, "projectors of REPA"),
    ],
)
def test_a_checkpoint_without_one_dit_is_refused_with_the_reason(tmp_path, checkpoint, words):
    torch.save(checkpoint, tmp_path / "x.pt")
    message = refusal(load_state_dict_of, tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in message and words in message


@pytest.mark.parametrize("path", ["SiT-XL-2-256x256.pt", "REPA/last.pt", "sit_b.pt"])
def test_a_file_that_is_named_like_a_sit_is_used_with_a_warning(tmp_path, capsys, path):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    for name in (path, "transit-l.pt"):
        torch.save(STATE, tmp_path / name)
        assert same(load_state_dict_of(tmp_path / name), STATE)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and path in line and "flow matching" in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 2\n", "Git LFS pointer"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><html>", "web page"),
        (b'{"error": "Repository not found"}', "JSON"),
        (b"\x1f\x8b" + bytes(100), "gzip"),
    ],
)
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_what_lies_in_the_place_of_a_file_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert words in refusal(load_state_dict_of, tmp_path / name)


class Claim:
    """Pickled, it is a scalar of NumPy that claims a gigabyte."""

    def __reduce__(self):
        return np.float64(1).__reduce__()[0], (np.dtype("V1000000000"),)


def test_a_scalar_of_numpy_cannot_claim_memory(tmp_path):
    torch.save({"ema": STATE, "args": {"lr": Claim()}}, tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in refusal(load_state_dict_of, tmp_path / "x.pt")


@pytest.fixture
def registered(monkeypatch):
    for patch in (4, 8):
        monkeypatch.setitem(
            DiT_models, f"DiT-S/{patch}", partial(DiT, patch_size=patch, hidden_size=24, depth=3, num_heads=2)
        )
    return fixed_dit(input_size=32, patch_size=8).state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_floats_of_any_size_become_float32(tmp_path, registered, dtype):
    state = {name: value.to(dtype) for name, value in registered.items()}
    torch.save(state, tmp_path / "x.pt")
    dit = load_dit(model_spec("DiT-S/8", 256, num_classes=5, ckpt=str(tmp_path / "x.pt")), "cpu")
    assert same(dit.state_dict(), {name: value.float() for name, value in state.items()})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_embedder.proj.bias": torch.full((24,), torch.nan)}, "not finite, in x_embedder.proj.bias"),
        ({"x_embedder.proj.bias": torch.full((24,), torch.inf)}, "not finite, in x_embedder.proj.bias"),
        ({"x_embedder.proj.bias": torch.ones(24, dtype=torch.int8)}, "x_embedder.proj.bias as torch.int8"),
        ({"x_embedder.proj.bias": torch.ones(24, dtype=torch.complex64)}, "torch.complex64"),
        ({"x_embedder.proj.bias": torch.ones(23)}, "another shape: 1 (x_embedder.proj.bias (23,) and not (24,))"),
        ({"more": ONE, "than": ONE}, "unknown tensors: 2 (more first)"),
        ({"blocks.1.attn.qkv.bias": None}, "missing tensors: 1 (blocks.1.attn.qkv.bias)"),
        (fixed_dit(input_size=64, patch_size=4).state_dict(), "DiT-S/4, 512: pass --model DiT-S/4 --image-size 512"),
        (fixed_dit(input_size=32, patch_size=8, num_classes=7).state_dict(), "pass --num-classes 7"),
        (fixed_dit(input_size=32, patch_size=8, learn_sigma=False).state_dict(), '"learn_sigma": false'),
        ({"y_embedder.embedding_table.weight": torch.ones(5, 24)}, '"class_dropout_prob": 0'),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_difference_and_the_way_out(tmp_path, registered, change, words):
    state = {name: value for name, value in (registered | change).items() if value is not None}
    torch.save(state, tmp_path / "x.pt")
    assert words in refusal(load_dit, model_spec("DiT-S/8", 256, num_classes=5, ckpt=str(tmp_path / "x.pt")), "cpu")


def test_the_arguments_of_a_training_name_the_model(tmp_path, capfd):
    args = argparse.Namespace(model="DiT-B/4", image_size=256, num_classes=1000)
    torch.save({"ema": STATE, "args": args}, tmp_path / "x.pt")
    result = call("sample.py", "--device", "cpu", "--ckpt", tmp_path / "x.pt", "--out", tmp_path / "x.png", capfd=capfd)
    assert_refused(result, "its arguments say DiT-B/4: pass --model DiT-B/4", "missing tensors: ")


# Folders of diffusers


@pytest.fixture
def pipeline(tmp_path):
    return save_pipeline(tmp_path / "theirs")


@pytest.mark.parametrize("how", SAVED)
def test_whatever_diffusers_saves_loads(pipeline, how):
    expected, expected_vae = load(pipeline).state_dict(), load_file(pipeline / "vae" / f"{FILE}.safetensors")
    for part in ("transformer", "vae"):
        save_again(pipeline, part, **SAVED[how])
    files = [path.name for path in pipeline.glob("*/*")]
    assert f"{FILE}.safetensors" not in files and any("-of-" in name for name in files) == ("shards" in how)
    spec = model_spec(ckpt=str(pipeline))
    assert same(load_dit(spec, "cpu").state_dict(), expected) and same(load_vae(spec, "cpu").state_dict(), expected_vae)


def test_plain_weights_win_over_a_variant_and_several_variants_are_refused(pipeline):
    spec, expected = model_spec(ckpt=str(pipeline)), load_file(pipeline / "vae" / f"{FILE}.safetensors")
    for variant in ("fp16", "ema"):
        save_file(
            {name: value + 1 for name, value in expected.items()}, pipeline / "vae" / f"{FILE}.{variant}.safetensors"
        )
    assert same(load_vae(spec, "cpu").state_dict(), expected)
    (pipeline / "vae" / f"{FILE}.safetensors").unlink()
    assert "the variants ema and fp16" in refusal(load_vae, spec, "cpu")


@pytest.mark.parametrize("left", ["model.safetensors", "config.json", None])
def test_a_vae_of_a_folder_is_never_replaced_by_a_released_one(pipeline, left):
    (pipeline / "vae" / f"{FILE}.safetensors").rename(pipeline / "vae" / "model.safetensors")
    if left != "model.safetensors":
        (pipeline / "vae" / "model.safetensors").unlink()
    if left is None:
        (pipeline / "vae" / "config.json").unlink()
    message = refusal(lambda: load_vae(model_spec(ckpt=str(pipeline)), "cpu"))
    assert str(pipeline / "vae") in message


def test_a_transformer_alone_with_a_vae_in_its_folder_uses_that_vae(pipeline):
    shutil.move(pipeline / "vae", pipeline / "transformer" / "vae")
    spec = model_spec(ckpt=str(pipeline / "transformer"))
    assert (spec.vae, spec.image_size) == (str(pipeline / "transformer" / "vae"), 8)


KEY = "transformer_blocks.0.norm1.linear.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda files: files.update({KEY: "../x.safetensors"}), "must name files beside it"),
        (lambda files: files.update({KEY: "/x.safetensors"}), "must name files beside it"),
        (lambda files: files.update({KEY: 5}), "must name files beside it"),
        (lambda files: files.clear(), "must name files beside it"),
        (lambda files: files.update({KEY: "gone.safetensors"}), "lists gone.safetensors, and there is no such file"),
        (lambda files: files.pop(KEY), f"unknown tensors: 1 ({KEY})"),
        (lambda files: files.update(more=files[KEY]), "missing tensors: 1 (more)"),
    ],
)
def test_an_index_that_differs_from_its_shards_is_refused(pipeline, change, words):
    save_again(pipeline, "transformer", **SAVED["shards"])
    index = pipeline / "transformer" / f"{FILE}.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    change(files)
    edit_json(index, weight_map=files)
    message = refusal(load, pipeline)
    assert index.name in message and words in message


def test_a_damaged_shard_is_named(pipeline):
    save_again(pipeline, "transformer", **SAVED["shards"])
    shard = sorted(pipeline.glob("transformer/*-of-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    assert str(shard) in refusal(load, pipeline)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (DDIMScheduler(), None),
        (DDIMScheduler(prediction_type="v_prediction"), "prediction_type is 'v_prediction'"),
        (DDIMScheduler(beta_schedule="scaled_linear"), "beta_schedule is 'scaled_linear'"),
        (FlowMatchEulerDiscreteScheduler(), "FlowMatch"),
    ],
)
def test_a_pipeline_with_another_diffusion_is_refused(pipeline, scheduler, words):
    scheduler.save_pretrained(pipeline / "scheduler")
    if words:
        assert words in refusal(load, pipeline)
    else:
        load(pipeline)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("scaling_factor", value)
        for value in (0, -0.18, float("nan"), float("inf"), "0.18215", None, [0.2], True, 10**400)
    ]
    + [("shift_factor", value) for value in ("0.5", float("nan"), [0.5], False)]
    + [("latents_mean", [0.1]), ("latents_std", [2.0]), ("quantization_config", {}), ("out_channels", 4)]
    + [("_class_name", "AutoencoderTiny")],
    ids=str,
)
def test_settings_of_a_vae_that_cannot_be_used_are_refused(pipeline, setting, value):
    edit_json(pipeline / "vae" / "config.json", **{setting: value})
    message = refusal(load_vae, model_spec(ckpt=str(pipeline)), "cpu")
    assert str(pipeline / "vae") in message and (setting in message or setting in ("out_channels", "_class_name"))


def test_settings_of_a_vae_have_the_defaults_of_diffusers(pipeline):
    path = pipeline / "vae" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in config.items() if name != "scaling_factor"}))
    edit_json(path, shift_factor=0.5)
    vae = load_vae(model_spec(ckpt=str(pipeline)), "cpu")
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (0.18215, 0.5)


BIAS = "decoder.conv_out.bias"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, f"missing tensors: 1 ({BIAS})"),
        (torch.ones(4), f"another shape: 1 ({BIAS} (4,) and not (3,))"),
        (torch.full((3,), torch.nan), f"not finite, in {BIAS}"),
        (torch.ones(3, dtype=torch.int8), f"{BIAS} as torch.int8"),
    ],
    ids=str,
)
def test_tensors_of_a_vae_that_do_not_fit_are_named(pipeline, value, words):
    path = pipeline / "vae" / f"{FILE}.safetensors"
    state = load_file(path) | {BIAS: value, "more": ONE}
    save_file({name: value for name, value in state.items() if value is not None}, path)
    message = refusal(load_vae, model_spec(ckpt=str(pipeline)), "cpu")
    assert "unknown tensors: 1 (more)" in message
    save_file({name: value for name, value in state.items() if value is not None and name != "more"}, path)
    message = refusal(load_vae, model_spec(ckpt=str(pipeline)), "cpu")
    assert str(pipeline / "vae") in message and words in message


def test_names_of_old_versions_of_diffusers_are_read(pipeline):
    """The released VAEs have them."""
    path, old = pipeline / "vae" / f"{FILE}.safetensors", {}
    state = load_file(path)
    for name, value in state.items():
        for new, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{new}.", f".{before}.")
        old[name] = value
    assert old.keys() != state.keys()
    save_file(old, path)
    assert same(load_vae(model_spec(ckpt=str(pipeline)), "cpu").state_dict(), state)
