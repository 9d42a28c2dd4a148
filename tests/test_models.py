from collections import deque

import pytest
import torch
from conftest import random_dit
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import models
from models import DiT, DiT_models, apply_layer, remember


def inputs(n=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, 4, 4, generator=generator), torch.full((n,), 500), torch.arange(n)


def test_there_are_twelve_models_of_the_published_sizes():
    assert len(DiT_models) == 12
    with torch.device("meta"):
        sizes = {name: DiT_models[name]() for name in DiT_models}
    # Peebles and Xie 2023, table 4 (M parameters of the /2 models).
    for name, millions in {"DiT-S/2": 33, "DiT-B/2": 130, "DiT-L/2": 458, "DiT-XL/2": 675}.items():
        assert sum(p.numel() for p in sizes[name].parameters()) / 1e6 == pytest.approx(millions, abs=0.6)
    assert sizes["DiT-XL/8"].x_embedder.proj.weight.shape == (1152, 4, 8, 8)


def test_a_fresh_model_outputs_exactly_zero():
    dit = DiT(input_size=4, hidden_size=24, depth=2, num_heads=2)
    assert not dit(*inputs()).any()


def test_the_output_depends_on_image_time_and_label(dit):
    x, t, y = inputs()
    out = dit(x, t, y)
    assert out.shape == (2, 8, 4, 4)
    for other in ((x + 1, t, y), (x, t + 1, y), (x, t, y + 1)):
        assert not torch.allclose(out, dit(*other), rtol=1e-3, atol=1e-4)


def test_multiply_adds_equal_what_torch_counts():
    dit = random_dit(input_size=8, depth=2)
    x = torch.randn(1, 4, 8, 8)
    # Fused attention is one operation that some versions do not count; its products apart they all do.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        dit(x, torch.tensor([3]), torch.tensor([0]))
    costs = dit.multiply_adds()
    assert dit.depth * sum(costs["layer"]) + costs["fixed"] == counter.get_total_flops() // 2


def test_multiply_adds_of_the_largest_model_equal_the_published_figure():
    with torch.device("meta"):
        dit = DiT_models["DiT-XL/2"]()
    costs = dit.multiply_adds()
    attention_products = 2 * 256 * 256 * 1152
    linear = dit.depth * (sum(costs["layer"]) - attention_products) + costs["fixed"]
    assert round(linear / 1e9, 2) == 114.39


def test_running_layers_fill_the_cache_and_reused_layers_do_not_run(dit, monkeypatch):
    x, t, y = inputs()
    cache = dit.empty_cache()
    full = dit(x, t, y, cache=cache)
    assert all(slot[0].shape == (2, 4, 24) and len(slot) == 1 for block in cache for slot in block)
    for block in dit.blocks:
        monkeypatch.setattr(block.attn, "forward", None)
        monkeypatch.setattr(block.mlp, "forward", None)
    assert torch.equal(dit(x, t, y, [(False, False)] * 3, cache), full)


def test_reused_outputs_are_scaled_by_the_gates_of_the_current_step(dit):
    x, t, y = inputs()
    cache = dit.empty_cache()
    dit(x, t, y, cache=cache)
    reuse = [(False, False)] * 3
    assert not torch.allclose(dit(x, t, y, reuse, cache), dit(x, t - 400, y, reuse, cache), atol=1e-3)


def test_reading_an_empty_slot_is_an_error(dit):
    x, t, y = inputs()
    for cache in (None, dit.empty_cache()):
        for compute in (False, torch.tensor(0.5)):
            with pytest.raises(ValueError, match="before it ran"):
                dit(x, t, y, [(True, compute)] * 3, cache)


def mixed_rows():
    return [(True, False), (False, True), (False, False)]


def test_scores_of_zero_and_one_equal_the_hard_schedule_bit_for_bit(dit):
    x, t, y = inputs()
    cache = dit.empty_cache()
    dit(x, t, y, cache=cache)
    copy = [list(block) for block in cache]
    hard = dit(x * 0.9, t - 50, y, mixed_rows(), copy)
    as_tensors = [[torch.tensor(float(run)) for run in row] for row in mixed_rows()]
    assert torch.equal(dit(x * 0.9, t - 50, y, as_tensors, cache), hard)


def test_a_score_in_between_blends_linearly_and_empties_the_slot():
    fresh, cached, x, gate = torch.randn(4, 2, 4, 24)
    gate, slot = gate[:, :1], deque([cached], maxlen=1)
    added, output = apply_layer(x, gate, lambda: fresh, torch.tensor(0.25), slot)
    torch.testing.assert_close(added, x + gate * (0.25 * fresh + 0.75 * cached))
    remember(slot, torch.tensor(0.25), output)
    assert not slot


def test_a_slot_keeps_the_last_outputs_and_a_forecast_is_their_weighted_sum():
    outputs, (x, gate) = torch.randn(4, 2, 4, 24).unbind(), torch.randn(2, 2, 4, 24)
    gate, slot = gate[:, :1], deque(maxlen=3)
    for k, output in enumerate(outputs):
        added, ran = apply_layer(x, gate, lambda output=output: output, True, slot)
        assert torch.equal(added, torch.addcmul(x, gate, output))
        remember(slot, True, ran)
        assert len(slot) == 3 and all(kept.equal(outputs[max(0, k - age)]) for age, kept in enumerate(slot))
    before, weights = x.clone(), (2.0, -1.5, 0.5)
    added, output = apply_layer(x, gate, None, weights, slot)
    expected = x + gate * (2.0 * outputs[3] - 1.5 * outputs[2] + 0.5 * outputs[1])
    torch.testing.assert_close(added, expected)
    assert output is None and torch.equal(x, before)  # what the sum is added to may be needed elsewhere


def test_a_blended_layer_empties_its_slot_and_no_other(dit):
    x, t, y = inputs()
    cache = dit.empty_cache()
    dit(x, t, y, cache=cache)
    (before,) = cache[1][1]
    dit(x + 1, t, y, [(torch.tensor(0.5), False)] * 3, cache)
    assert not cache[1][0] and cache[1][1][0] is before


def test_a_nan_in_an_unused_slot_never_reaches_the_output(dit):
    x, t, y = inputs()
    cache = [[deque([torch.full((2, 4, 24), torch.nan)], maxlen=1) for _ in range(2)] for _ in dit.blocks]
    expected = dit(x, t, y)
    assert torch.equal(dit(x, t, y, [(True, True)] * 3, cache), expected)
    assert torch.equal(dit(x, t, y, [(False, False)] * 3, cache), expected)  # the slots were replaced
    for block, run in zip(cache, mixed_rows()):
        for k in (0, 1):
            if run[k]:
                block[k].append(torch.full((2, 4, 24), torch.nan))
    assert dit(x + 1, t, y, mixed_rows(), cache).isfinite().all()


def test_guidance_guides_three_channels_and_both_halves_carry_it(dit):
    x, t, y = inputs()
    batch, labels = torch.cat([x, x]), torch.cat([y, torch.full_like(y, 5)])
    out = dit(batch, t.repeat(2), labels)
    guided = models.guided(out, 3.0)
    cond, uncond = out[:2, :3], out[2:, :3]
    torch.testing.assert_close(guided[:2, :3], uncond + 3 * (cond - uncond))
    assert torch.equal(guided[:2, :3], guided[2:, :3])
    assert torch.equal(guided[:, 3:], out[:, 3:])


def test_the_gelu_in_the_first_product_computes_the_same(dit, monkeypatch):
    """With a stand-in for the kernel of CUDA, which takes GELU by its tanh where a CPU takes the exact one."""

    def kernel(bias, x, weight, use_gelu):
        assert use_gelu and x.dim() == 2
        return functional.gelu(bias + x @ weight, approximate="tanh")

    monkeypatch.setattr(torch, "_addmm_activation", kernel)
    mlp, x = dit.blocks[0].mlp, torch.randn(2, 4, 24)
    expected = mlp.act(mlp.fc1(x))
    assert (mlp.fused_hidden(x) - expected).abs().max() < 1e-6 * expected.abs().max()
    plain, mlp.fused = mlp(x), True
    monkeypatch.setattr(mlp, "fused_hidden", None)
    with torch.no_grad():
        assert torch.equal(mlp(x), plain)  # not on a CPU


def test_labels_are_dropped_to_the_null_class_at_the_given_rate():
    embedder = DiT(input_size=4, hidden_size=24, depth=1, num_heads=2, num_classes=5).y_embedder
    dropped = embedder.drop(torch.zeros(20000, dtype=torch.long), torch.Generator().manual_seed(0))
    assert set(dropped.tolist()) == {0, 5}
    assert (dropped == 5).float().mean().item() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("wrong", [dict(input_size=5), dict(hidden_size=26), dict(hidden_size=24, num_heads=5)])
def test_sizes_that_do_not_divide_are_refused(wrong):
    with pytest.raises(ValueError, match="multiple"):
        random_dit(**wrong)
