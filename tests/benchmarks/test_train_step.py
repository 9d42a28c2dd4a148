"""The benchmark of router training: its original variant computes what ours does, and its record holds all variants."""

import json

import pytest
import torch
from conftest import call, random_dit

from benchmarks import train_step
from benchmarks.original import original_loss
from diffusion import create_diffusion
from pretrained import loading
from router import Router, router_loss


def loss_and_gradients(loss, dit):
    """Losses (N,) of a seeded draw, and the gradients of a router's row (2*depth,) and of the DiT by name."""
    diffusion = create_diffusion(10)
    torch.manual_seed(1)
    router = Router(10, dit.depth)
    x_start, noise, y = torch.randn(4, 4, 4, 4), torch.randn(4, 4, 4, 4), torch.tensor([0, 1, 4, 5])
    scores = router(4)
    losses = loss(dit, diffusion, scores, 5, x_start, y, noise)
    (losses.mean() + 1e-3 * scores.sum()).backward()
    return losses.detach(), router.routers[4].prob.grad, {n: p.grad for n, p in dit.named_parameters()}


def test_the_original_has_our_loss_and_router_gradient_and_leaves_gradients_in_the_model():
    ours, theirs = random_dit(), random_dit().requires_grad_(True)
    theirs.pos_embed.requires_grad_(False)
    losses, gradient, none = loss_and_gradients(router_loss, ours)
    losses_again, gradient_again, left = loss_and_gradients(original_loss, theirs)
    assert (losses > 0).all() and gradient.abs().min() > 0
    torch.testing.assert_close(losses_again, losses, rtol=1e-5, atol=0)
    assert (gradient_again - gradient).norm() < 1e-5 * gradient.norm()
    assert all(value is None for value in none.values())
    assert {name for name, value in left.items() if value is None} == {"pos_embed"}


def test_an_update_moves_the_drawn_row_alone_and_the_variants_move_it_alike(monkeypatch):
    monkeypatch.setattr(loading, "load_dit", lambda spec, device, random_seed: random_dit(random_seed))
    names = ["original", "ours", "bf16", "checkpointing"]
    updates = train_step.Updates(None, 2, torch.device("cpu"), names)
    before = {key: value.clone() for key, value in updates.routers["ours"].state().items()}
    for name in 2 * names:
        updates.run(name)
    shared = {id(p) for p in updates.models["ours"].parameters()}
    for name, router in updates.routers.items():
        own = name == "bf16"
        for key, row in router.state().items():
            assert torch.equal(row, before[key]) == (key != f"{updates.row}.prob")
            torch.testing.assert_close(row, updates.routers["ours"].state()[key], rtol=0, atol=2e-3 if own else 1e-5)
        assert {id(p) for p in updates.models[name].parameters()}.isdisjoint(shared) == own


@pytest.mark.slow
def test_a_record_holds_what_was_measured(tmp_path, monkeypatch, capfd):
    for name in ("bf16", "checkpointing"):  # the memory of each variant takes a process of seconds
        monkeypatch.delitem(train_step.VARIANTS, name)
    record = tmp_path / "r.json"
    flags = ["--model", "DiT-S/8", "--batch-size", 2, "--repeats", 2, "--device", "cpu", "--record", record]
    result = call("benchmarks/train_step.py", *flags, capfd=capfd)
    assert result.returncode == 0, result.stderr
    saved = json.loads(record.read_text())
    assert [len(saved["seconds"][name]) for name in ("original", "ours")] == [2, 2]
    assert {saved[ratio]["original"] for ratio in ("time_ratio", "peak_ratio", "above_base_ratio")} == {1.0}
    assert all(0 < memory["base"] < memory["peak"] for memory in saved["memory_bytes"].values())
    # The gradients of 33 million parameters alone are more than the rest at this batch.
    assert saved["above_base_ratio"]["ours"] < 0.9
