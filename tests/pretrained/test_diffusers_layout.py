"""Models in the layout of diffusers, against diffusers' own model."""

import pytest
import torch
from conftest import ROOT, random_dit
from diffusers import DiTTransformer2DModel
from small_models import fixed_dit, load, random_transformer, same

from pretrained.diffusers_layout import dit_from_transformer, to_diffusers


def difference(dit, transformer):
    """The largest difference of the outputs of both models, as a part of the largest value."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, dit.in_channels, dit.input_size, dit.input_size, generator=generator)
    t = torch.tensor([0, 1, 333, 750, 999])
    y = torch.tensor([0, 1, 2, dit.num_classes - 1, dit.num_classes])
    with torch.no_grad():
        ours, theirs = dit(x, t, y), transformer(x, timestep=t, class_labels=y).sample
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"out_channels": None},
        {"patch_size": 4, "sample_size": 8, "norm_eps": 1e-2},
        dict(in_channels=3, out_channels=6),
    ],
    ids=str,
)
def test_a_dit_computes_the_same_as_the_model_of_diffusers_it_was_loaded_from(tmp_path, config):
    transformer = random_transformer(**config)
    assert difference(dit_from_transformer(transformer), transformer) < 1e-5
    transformer.save_pretrained(tmp_path)
    dit = load(tmp_path)
    assert difference(dit, transformer) < 1e-5
    assert dit.y_embedder.embedding_table.num_embeddings == 6


@pytest.mark.parametrize(
    "config",
    [{}, {"learn_sigma": False}, {"input_size": 8, "patch_size": 4}, {"frequency_shift": 1, "mlp_norm_eps": 1e-5}],
    ids=str,
)
def test_the_model_of_diffusers_computes_the_same_as_the_dit_it_was_made_from(tmp_path, config):
    dit = fixed_dit(**config)
    transformer = to_diffusers(dit)
    assert difference(dit, transformer) < 1e-5
    assert same(dit_from_transformer(transformer).state_dict(), dit.state_dict())
    transformer.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert same(loaded.state_dict(), dit.state_dict())
    assert difference(loaded, transformer) < 1e-5


def test_diffusers_needs_one_line_to_run_a_dit_as_it_was_trained(tmp_path):
    dit = fixed_dit()
    to_diffusers(dit).save_pretrained(tmp_path)
    transformer = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert difference(dit, transformer) > 0.1
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    assert difference(dit, transformer) < 1e-5
    assert difference(dit_from_transformer(transformer), transformer) < 1e-5


def test_the_frequencies_of_diffusers_change_the_noise_that_a_trained_model_predicts():
    dit = load(ROOT / "ckpt" / "fashion_mnist")
    x, y = torch.randn(40, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 10
    t, noise = torch.full((40,), 500), []
    for shift in (0, 1):
        dit.t_embedder.frequency_shift = shift
        with torch.no_grad():
            noise.append(dit(x, t, y)[:, :4])
    own, other = noise
    assert ((own - other).square().mean() / own.square().mean()).sqrt().item() == pytest.approx(0.028, abs=5e-4)


def test_half_precision_stays_half_precision():
    assert to_diffusers(fixed_dit().to(torch.bfloat16)).dtype == torch.bfloat16
    dit = dit_from_transformer(random_transformer().to(torch.float16))
    assert {parameter.dtype for parameter in dit.parameters()} == {torch.float16}


@pytest.mark.parametrize(
    ("dit", "words"),
    [
        (random_dit, "positions"),
        (lambda: fixed_dit(mlp_ratio=2.0), "wide"),
        (lambda: fixed_dit(class_dropout_prob=0.0), "null class"),
    ],
    ids=["positions", "wide", "null class"],
)
def test_a_dit_that_diffusers_does_not_have_is_refused(dit, words):
    with pytest.raises(ValueError, match=words):
        to_diffusers(dit())
