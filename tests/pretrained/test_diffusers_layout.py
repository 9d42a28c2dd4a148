"""Models in the layout of diffusers, against diffusers' own model."""

import pytest
import torch
from conftest import ROOT, random_dit
from diffusers import DiTTransformer2DModel
from small_models import difference, fixed_dit, load, same

from pretrained.diffusers_layout import dit_from_transformer, to_diffusers


def output_difference(dit, transformer):
    x = torch.randn(5, dit.in_channels, dit.input_size, dit.input_size, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([0, 1, 333, 750, 999]), torch.tensor([0, 1, 2, dit.num_classes - 1, dit.num_classes])
    with torch.no_grad():
        return difference(dit(x, t, y), transformer(x, timestep=t, class_labels=y).sample)


@pytest.mark.parametrize(
    "config",
    [{}, {"learn_sigma": False}, {"input_size": 8, "patch_size": 4}, dict(frequency_shift=1, mlp_norm_eps=1e-2)],
    ids=str,
)
def test_a_dit_and_the_model_of_diffusers_compute_the_same_in_both_directions(tmp_path, config):
    dit = fixed_dit(**config)
    transformer = to_diffusers(dit)
    assert output_difference(dit, transformer) < 1e-5
    assert same(dit_from_transformer(transformer).state_dict(), dit.state_dict())
    transformer.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert same(loaded.state_dict(), dit.state_dict())
    assert output_difference(loaded, transformer) < 1e-5


def test_diffusers_needs_one_line_to_run_a_dit_as_it_was_trained(tmp_path):
    dit = fixed_dit()
    to_diffusers(dit).save_pretrained(tmp_path)
    transformer = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert output_difference(dit, transformer) > 0.1
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    assert output_difference(dit, transformer) < 1e-5
    assert output_difference(dit_from_transformer(transformer), transformer) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_positions_that_were_rounded_are_kept(dtype):
    dit = fixed_dit()
    exact = dit.pos_embed.clone()
    dit.pos_embed.copy_(exact.to(dtype))
    assert not torch.equal(dit.pos_embed, exact)
    transformer = to_diffusers(dit)
    assert output_difference(dit, transformer) < 1e-5
    assert torch.equal(dit_from_transformer(transformer).pos_embed, dit.pos_embed)


def test_the_shipped_model_computes_the_same_in_diffusers():
    dit = load(ROOT / "ckpt" / "fashion_mnist")
    assert output_difference(dit, to_diffusers(dit)) < 1e-5


def test_a_dit_that_diffusers_does_not_have_is_refused():
    mlps, no_null_class = fixed_dit(mlp_ratio=2.0), fixed_dit(class_dropout_prob=0.0)
    for dit, words in ((random_dit(), "positions"), (mlps, "wide"), (no_null_class, "null class")):
        with pytest.raises(ValueError, match=words):
            to_diffusers(dit)
