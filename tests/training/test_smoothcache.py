"""SmoothCache's measurement, beside one with hooks and NumPy."""

import numpy as np
import pytest
import torch
from conftest import random_dit

from diffusion import FlowMatching, create_diffusion
from models import Guidance
from training import smoothcache
from training.policies import make_schedule
from training.smoothcache import layer_changes

STEPS = 6


def outputs_by_hooks(dit, steps, scale, interval=(0, 1)):
    """The outputs of attention (k 0) and MLP (k 1) of a full run, by a loop of our own: [k][step run][block].

    Outside the interval of guidance there are only the outputs for the labels.
    """
    seen = [[], []]
    hooks = [
        layer.register_forward_hook(lambda _, __, output, k=k: seen[k].append(output.double().numpy()))
        for block in dit.blocks
        for k, layer in enumerate((block.attn, block.mlp))
    ]
    x = torch.randn(8, 4, dit.input_size, dit.input_size, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([int(k * dit.num_classes / 8) for k in range(8)])
    diffusion = create_diffusion(steps)
    with torch.no_grad():
        for i in range(steps - 1, -1, -1):
            t = torch.full((8,), int(diffusion.timestep_map[i]))
            if scale == 1 or not interval[0] <= t[0] / 1000 <= interval[1]:
                noise = dit(x, t, labels)
            else:
                both = dit(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([labels, torch.full((8,), dit.num_classes)]))
                noise, plain = both.chunk(2)
                noise[:, :3] = plain[:, :3] + scale * (noise[:, :3] - plain[:, :3])
            x = diffusion.ddim_step(noise, x, i)
    for hook in hooks:
        hook.remove()
    return [[seen[k][n * dit.depth : (n + 1) * dit.depth] for n in range(steps)] for k in (0, 1)]


@pytest.mark.parametrize("scale, interval", [(1.0, (0, 1)), (2.0, (0, 1)), (2.0, (0.3, 0.7))])
def test_changes_are_those_of_the_outputs_that_hooks_see(scale, interval):
    dit = random_dit()
    outputs = outputs_by_hooks(dit, STEPS, scale, interval)
    assert len({len(output[0]) for output in outputs[0]}) == (1 if interval == (0, 1) else 2)  # 8 rows, or 16
    changes = layer_changes(dit, STEPS, Guidance(scale, interval=interval))
    assert changes.shape == (STEPS, 3, 2) and changes.dtype == torch.float32
    for i in range(STEPS):
        for age in (1, 2, 3):
            for k in (0, 1):
                n = STEPS - 1 - i
                if n < age:
                    assert changes[i, age - 1, k] == np.inf
                    continue
                rows = min(len(outputs[k][n][0]), len(outputs[k][n - age][0]))
                each = [
                    np.abs(new[:rows] - old[:rows]).sum((1, 2)) / np.abs(new[:rows]).sum((1, 2))
                    for new, old in zip(outputs[k][n], outputs[k][n - age])
                ]
                assert changes[i, age - 1, k].item() == pytest.approx(np.mean(each), rel=1e-4)


def test_the_schedule_follows_the_changes_and_is_the_same_each_time():
    dit = random_dit()
    changes = layer_changes(dit, STEPS, 2.0)
    alpha = changes[changes.isfinite()].median().item()
    schedule = make_schedule("smoothcache", STEPS, 3, alpha=alpha, dit=dit, cfg_scale=2.0)
    for k in (0, 1):
        ran = STEPS - 1
        for i in range(STEPS - 2, -1, -1):
            reuses = ran - i <= 3 and bool(changes[i, ran - i - 1, k] < alpha)
            assert schedule.compute[i, :, k].tolist() == [not reuses] * 3
            ran = ran if reuses else i
    assert 0 < schedule.cached_share() < 0.7
    again = make_schedule("smoothcache", STEPS, 3, alpha=alpha, dit=dit, cfg_scale=2.0)
    assert torch.equal(schedule.compute, again.compute)


def test_a_sampler_that_adds_noise_gets_the_same_each_time():
    dit, flow = random_dit(learn_sigma=False), FlowMatching(STEPS, "sde")
    changes, state = layer_changes(dit, STEPS, 2.0, flow), torch.get_rng_state()
    assert torch.equal(layer_changes(dit, STEPS, 2.0, flow), changes)
    assert torch.equal(torch.get_rng_state(), state)  # no other noise moves


def test_the_smallest_alpha_runs_everything_and_the_largest_every_fourth_step():
    dit = random_dit()
    assert make_schedule("smoothcache", 9, 3, alpha=1e-9, dit=dit).cached_share() == 0
    every_fourth = make_schedule("smoothcache", 9, 3, alpha=1e9, dit=dit)
    assert torch.equal(every_fourth.compute, make_schedule("fora", 9, 3, interval=4).compute)
    assert make_schedule("smoothcache", 1, 3, alpha=1e9, dit=dit).cached_share() == 0


def test_the_parts_of_the_batch_do_not_matter(monkeypatch):
    dit = random_dit()
    changes = layer_changes(dit, 4, 2.0)
    monkeypatch.setattr(smoothcache, "AT_ONCE", 8)
    assert torch.allclose(changes, layer_changes(dit, 4, 2.0), rtol=1e-4)
