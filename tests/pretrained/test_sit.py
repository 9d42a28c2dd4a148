"""Files of SiT and REPA: what they compute here is what their models compute, in the time and sign of this project."""

import argparse
from functools import partial

import pytest
import torch
from conftest import SIZES, assert_refused, call, random_dit
from small_models import refusal, same

from models import DiT, DiT_models
from pretrained.loading import load_dit
from pretrained.sit import first_channels
from pretrained.spec import model_spec

SMALL = dict(patch_size=8, hidden_size=24, depth=3, num_heads=2)
T = torch.tensor([0.0, 0.2, 0.9, 1.0])
X, Y = torch.randn(4, 4, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 4, 5])
SIT = argparse.Namespace(model="SiT-S/8", path_type="Linear", prediction="velocity", train_eps=None, sample_eps=None)
REPA = argparse.Namespace(model="SiT-S/8", path_type="linear", prediction="v", enc_type="dinov2", encoder_depth=8)


def original(**config):
    """A DiT with random weights, small enough that its output is of the order of 1."""
    return random_dit(**(SIZES | SMALL | {"input_size": 32} | config))


STATE = original(learn_sigma=False).state_dict()


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Save a checkpoint and load it as --model SiT-S/8, made small."""
    monkeypatch.setitem(DiT_models, "DiT-S/8", partial(DiT, **SMALL))

    def load(checkpoint, model="SiT-S/8", name="x.pt"):
        torch.save(checkpoint, tmp_path / name)
        return load_dit(model_spec(model, num_classes=5, ckpt=str(tmp_path / name)), "cpu")

    return load


@pytest.mark.parametrize("more", [{}, {"args": SIT}, {"args": vars(SIT)}])
def test_a_file_of_sit_has_its_time_and_velocity_turned_and_no_variance(load, more):
    dit = original()
    expected = -dit(X, 1 - T, Y)[:, :4]
    loaded = load({"ema": dit.state_dict(), "model": {}} | more)
    actual = loaded(X, T, Y)
    assert actual.shape == X.shape and loaded.out_channels == 4
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_sit_trained_without_variance_is_known_by_its_arguments(load):
    dit = original(learn_sigma=False)
    expected = -dit(X, 1 - T, Y)
    torch.testing.assert_close(load({"ema": dit.state_dict(), "args": SIT})(X, T, Y), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("more", [{}, {"args": REPA}])
def test_a_file_of_repa_is_used_as_it_is_without_its_projectors(load, more):
    dit = original(learn_sigma=False)
    projectors = {f"projectors.0.{n}.{part}": torch.ones(3) for n in (0, 2, 4) for part in ("weight", "bias")}
    checkpoint = {"ema": dit.state_dict() | projectors, "model": {}, "opt": {}, "steps": 400000} | more
    loaded = load(checkpoint)
    assert same(loaded.state_dict(), dit.state_dict())
    assert torch.equal(loaded(X, T, Y), dit(X, T, Y))


def test_a_file_of_repa_with_a_variance_only_loses_it(load):
    dit = original()
    torch.testing.assert_close(load({"ema": dit.state_dict(), "args": REPA})(X, T, Y), dit(X, T, Y)[:, :4])


def test_early_files_of_repa_name_the_later_blocks_otherwise(load):
    dit = original(learn_sigma=False)
    renamed = {"blocks.1.": "decoder_blocks.0.", "blocks.2.": "decoder_blocks.1."}
    state = {renamed.get(name[:9], name[:9]) + name[9:]: value for name, value in dit.state_dict().items()}
    assert sum(name.startswith("decoder_blocks.1.") for name in state) == 10
    assert same(load(state).state_dict(), dit.state_dict())


def test_the_kept_channels_are_the_first_of_each_cell():
    dit = original(input_size=16, patch_size=2)
    kept = original(input_size=16, patch_size=2, learn_sigma=False)
    kept.load_state_dict(first_channels(dit.state_dict(), 4))
    x = X[:, :, :16, :16]
    torch.testing.assert_close(kept(x, T, Y), dit(x, T, Y)[:, :4])


def test_other_paths_and_predictions_and_a_dit_are_refused_as_sit(load, tmp_path):
    state = original().state_dict()
    for arguments, words in (
        (vars(SIT) | {"path_type": "GVP"}, "path_type GVP: only Linear"),
        (vars(REPA) | {"path_type": "cosine"}, "path_type cosine"),
        (vars(SIT) | {"prediction": "score"}, "prediction score: only velocity"),
        ({"model": "DiT-S/8", "global_seed": 0}, "is a DiT by its arguments (model DiT-S/8): pass --model DiT-S/8"),
    ):
        message = refusal(load, {"ema": state, "args": arguments})
        assert str(tmp_path / "x.pt") in message and words in message


def test_a_file_named_like_a_dit_is_used_as_sit_with_a_warning(load, capsys):
    state = original().state_dict()
    for name in ("DiT-S-8-256x256.pt", "mine.pt"):
        load(state, name=name)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "DiT-S-8-256x256.pt" in line


def test_files_of_sit_and_repa_are_refused_as_a_dit_with_the_way_out(load):
    for checkpoint in ({"ema": original().state_dict(), "args": SIT}, {"projectors.0.0.weight": X} | STATE):
        assert "pass --model SiT-XL/2" in refusal(load, checkpoint, "DiT-S/8")


def test_files_that_do_not_fit_name_the_way_out(load, capfd):
    assert refusal(load, {"ema": original(num_classes=7).state_dict()}).endswith("7: pass --num-classes 7")
    assert "t_embedder.mlp.0.weight" in refusal(load, {n: STATE[n] for n in STATE if n != "t_embedder.mlp.0.weight"})
    refused = call("sample.py", "--model", "SiT-XL/2", "--num-sampling-steps", 4, "--device", "cpu", capfd=capfd)
    assert_refused(refused, "SiT-XL-2-256x256.pt", "pretrained_models", "--ckpt")
    refused = call("sample.py", "--model", "SiT-XL/3", "--num-sampling-steps", 4, "--device", "cpu", capfd=capfd)
    assert_refused(refused, "unknown model 'SiT-XL/3'")


def test_the_flags_for_another_size_name_a_sit(load, monkeypatch):
    monkeypatch.setitem(DiT_models, "DiT-S/4", partial(DiT, **SMALL | {"patch_size": 4}))
    message = refusal(load, {"ema": original(patch_size=4).state_dict()})
    assert message.endswith("pass --model SiT-S/4"), message


def test_the_models_of_flows_are_the_twelve_of_diffusion():
    for name in DiT_models:
        spec = model_spec(name.replace("DiT", "SiT"))
        assert (spec.process, spec.depth, spec.size) == ("flow", model_spec(name).depth, name)
        assert model_spec(name).process == "diffusion"
