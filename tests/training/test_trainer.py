import math
from types import SimpleNamespace

import pytest
import torch
from conftest import random_dit

from diffusion import create_diffusion
from models import DiTBlock
from router import router_loss
from runtime.errors import UserError
from runtime.processes import Processes
from training.batches import draw_steps
from training.trainer import L1_WEIGHTS, Trainer, TrainingConfig, response_time

VAE = SimpleNamespace(config=SimpleNamespace(scaling_factor=1.0))  # moments need no encoding


def make_trainer(dit=None, steps=6, batch=4, draws=2, updates=1000, lr=0.05, l1_weight=1e-3, **config):
    config = TrainingConfig(updates, batch, draws, 0, lr, l1_weight, threshold=0.1, **config)
    return Trainer(dit or random_dit(), VAE, create_diffusion(steps), config, Processes(), range(batch))


def make_batch(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, posterior_noise, noise = (torch.randn(size, c, 4, 4, generator=generator) for c in (8, 4, 4))
    return {"moments": x, "y": torch.arange(size) % 6, "posterior_noise": posterior_noise, "noise": noise}


@pytest.mark.parametrize("order", [0, 2])
def test_an_update_has_the_gradient_of_the_mean_over_its_draws(order):
    trainer, batch = make_trainer(batch=6, draws=3, order=order), make_batch(6)
    rows = [trainer.trained_steps[k] for k in draw_steps(0, 0, 3, 3)]
    x_start = batch["moments"][:, :4] + torch.exp(0.5 * batch["moments"][:, 4:]) * batch["posterior_noise"]
    loss = 0
    for d, row in enumerate(rows):
        scores = trainer.router(row)
        inputs = [values[2 * d : 2 * d + 2] for values in (x_start, batch["y"], batch["noise"])]
        mse = router_loss(trainer.dit, trainer.diffusion, scores, row + 1, *inputs, order=order)
        loss = loss + (mse.mean() + 1e-3 * scores.sum()) / 3
    parameters = list(trainer.router.parameters())
    expected = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert not trainer.update(batch)
    assert {i for i, gradient in enumerate(expected) if gradient is not None} == set(rows)
    for parameter, gradient in zip(parameters, expected):
        assert (parameter.grad is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient)
    report = trainer.report()
    assert report["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert sum(report["draws_per_step"].values()) == 3 and set(report["mse_per_step"]) == set(rows)


def test_a_restored_trainer_continues_bit_for_bit(tmp_path):
    whole, part, again = (make_trainer(target_cached=0.3) for _ in range(3))
    for update in range(7):
        whole.update(make_batch(4, update))
    for update in range(4):
        part.update(make_batch(4, update))
    part.router.save(tmp_path / "r.pt", **part.state_dict())
    again.load_state_dict(torch.load(tmp_path / "r.pt", weights_only=True))
    for update in range(4, 7):
        again.update(make_batch(4, update))
    assert again.report() == whole.report() and again.l1_weight == whole.l1_weight != 1e-3
    assert all(torch.equal(a, b) for a, b in zip(again.router.parameters(), whole.router.parameters()))


def test_checkpointing_gives_the_same_update_and_bfloat16_nearly(monkeypatch):
    plain, checkpointed, half = make_trainer(), make_trainer(), make_trainer(random_dit().bfloat16())
    checkpointed.dit.grad_checkpointing = True
    calls, forward = [], DiTBlock.forward
    monkeypatch.setattr(DiTBlock, "forward", lambda self, *a: calls.append(self) or forward(self, *a))
    for trainer in (plain, checkpointed, half):
        trainer.update(make_batch(4))
    counts = [sum(call in list(trainer.dit.blocks) for call in calls) for trainer in (plain, checkpointed)]
    assert counts == [2 * 3 * 3, 2 * 4 * 3]  # the student's blocks run once more
    row = next(i for i, p in enumerate(plain.router.parameters()) if p.grad is not None)
    exact, same, near = (trainer.router.routers[row].prob for trainer in (plain, checkpointed, half))
    assert torch.equal(exact.grad, same.grad) and torch.equal(exact, same)
    assert near.grad.dtype == torch.float32 and not torch.equal(exact.grad, near.grad)
    assert (exact.grad - near.grad).norm() < 0.1 * exact.grad.norm()


def test_a_gradient_that_is_not_finite_changes_nothing():
    trainer = make_trainer()
    trainer.update(make_batch(4))
    before = [p.detach().clone() for p in trainer.router.parameters()]
    trainer.l1_weight = float("inf")
    with pytest.raises(UserError, match="or its gradient in update 2 is not finite"):
        trainer.update(make_batch(4))
    assert trainer.updates_done == 1
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.router.parameters()))


@pytest.mark.parametrize("start, target", [(1e-7, 0.39), (1e-3, 0.1)])
def test_the_l1_weight_reaches_its_target_though_layers_matter_by_decades(start, target):
    """A simulated training: a layer's error is importance * (1 - score)**2, with noise; Adam moves the logits."""
    generator = torch.Generator().manual_seed(0)
    importance = 10 ** (torch.rand(10, 24, generator=generator) * 3 - 6)
    dit, config = random_dit(depth=12, hidden_size=4, num_heads=1), dict(target_cached=target, l1_weight=start)
    trainer = make_trainer(dit, steps=20, batch=8, draws=8, updates=300, lr=0.1, **config)
    while trainer.updates_done < 300:
        trainer.updates_done += 1
        trainer.optimizer.zero_grad(set_to_none=True)
        for row in set(draw_steps(0, trainer.updates_done, 8, 10)):
            scores = trainer.router(2 * row).flatten()
            noisy = importance[row] * torch.exp(torch.randn((), generator=generator))
            (noisy * (1 - scores) ** 2 + trainer.l1_weight * scores).sum().backward()
        trainer.optimizer.step()
        trainer.router.clamp_()
        trainer.adjust_l1_weight()
    assert abs(trainer.router.schedule(0.1).cached_share() - target) < 0.01
    assert response_time(0.1, 1, 10) == pytest.approx(200)  # updates
    assert response_time(1e-3, 8, 10) == pytest.approx(2000 / (1 - 0.9**8))


@pytest.mark.parametrize("lr", [1000.0, 1e308])
@pytest.mark.parametrize("target", [0.01, 0.5])
def test_an_adjusted_l1_weight_stays_finite_and_above_0(lr, target):
    trainer = make_trainer(lr=lr, target_cached=target)
    for row in trainer.router.routers:
        row.prob.data.fill_(-5.0 if target < 0.1 else 5.0)  # all layers are cached, or none
    for _ in range(200):
        before = trainer.l1_weight
        trainer.adjust_l1_weight()
        assert abs(math.log(trainer.l1_weight / before)) < 6.01
    assert trainer.l1_weight == L1_WEIGHTS[target == 0.5]


def test_an_adjustment_of_a_usual_training_is_not_bounded():
    trainer = make_trainer(lr=0.05, target_cached=0.5)
    for row in trainer.router.routers:
        row.prob.data.fill_(5.0)
    trainer.adjust_l1_weight()
    assert trainer.l1_weight == 1e-3 * math.exp(60.0 / response_time(0.05, 2, 3) * 0.1)
