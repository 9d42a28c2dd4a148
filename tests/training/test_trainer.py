from types import SimpleNamespace

import pytest
import torch
from conftest import random_dit

from diffusion import create_diffusion
from router import router_loss
from runtime.errors import UserError
from runtime.processes import Processes
from training.batches import draw_steps
from training.trainer import TargetShare, Trainer, pieces, response_time


class NoVae:
    """Stands where moments need no encoding."""

    config = SimpleNamespace(scaling_factor=1.0)


def make_training(dit=None, steps=6, batch=4, draws=2, **flags):
    given = dict(
        global_batch_size=batch, draws_per_step=draws, global_seed=0, l1=1e-3, lr=0.05, thres=0.1, ste_threshold=None
    )
    args = SimpleNamespace(**(given | dict(target_cached=None, max_steps=1000) | flags))
    return Trainer(dit or random_dit(), NoVae, create_diffusion(steps), args, 1000, Processes(), range(batch))


def make_batch(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, posterior_noise, noise = (torch.randn(size, c, 4, 4, generator=generator) for c in (8, 4, 4))
    return {"moments": x, "y": torch.arange(size) % 6, "posterior_noise": posterior_noise, "noise": noise}


@pytest.mark.parametrize("world, draw_size", [(1, 3), (2, 3), (4, 3), (4, 12), (3, 2), (6, 4), (12, 12)])
def test_the_pieces_of_all_processes_are_the_batch_and_no_piece_has_two_draws(world, draw_size):
    seen = []
    for rank in range(world):
        part = range(12)[rank * 12 // world : (rank + 1) * 12 // world]
        for d, piece in pieces(part, draw_size):
            seen += [(k, d) for k in part[piece]]
    assert seen == [(k, k // draw_size) for k in range(12)]


def test_an_update_has_the_gradient_of_the_mean_over_its_draws():
    training = make_training(batch=6, draws=3)
    batch, dit, diffusion = make_batch(6), training.dit, training.diffusion
    rows = [training.trained[k] for k in draw_steps(0, 0, 3, 3)]
    x_start = batch["moments"][:, :4] + torch.exp(0.5 * batch["moments"][:, 4:]) * batch["posterior_noise"]
    loss = 0
    for d, row in enumerate(rows):
        part = slice(2 * d, 2 * d + 2)
        scores = training.router(row)
        mse = router_loss(dit, diffusion, scores, row + 1, x_start[part], batch["y"][part], batch["noise"][part])
        loss = loss + (mse.mean() + 1e-3 * scores.sum()) / 3
    parameters = list(training.router.parameters())
    expected = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert not training.update(batch)
    assert {i for i, g in enumerate(expected) if g is not None} == set(rows)
    for parameter, gradient in zip(parameters, expected):
        assert (parameter.grad is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient)
    report = training.report()
    assert report["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert sum(report["draws_per_step"].values()) == 3 and set(report["mse_per_step"]) == set(rows)


def test_adams_count_of_a_row_is_the_number_of_updates_that_drew_it():
    training = make_training(random_dit(depth=1, hidden_size=8, num_heads=1), steps=20, batch=8, draws=8)
    expected = dict.fromkeys(training.trained, 0)
    for update in range(400):
        drawn = {training.trained[k] for k in draw_steps(0, update, 8, 10)}
        expected = {i: count + (i in drawn) for i, count in expected.items()}
        training.update(make_batch(8, update))
    counts = training.report()["updates_per_row"]
    assert counts == expected
    # Eight draws of ten steps, as eight GPUs make: 227.8 updates a row, standard deviation 9.9.
    for count in counts.values():
        assert abs(count - 400 * (1 - 0.9**8)) < 40
    assert abs(sum(counts.values()) / 10 - 400 * (1 - 0.9**8)) < 10


def test_a_restored_training_goes_on_bit_for_bit(tmp_path):
    whole, part = make_training(target_cached=0.3), make_training(target_cached=0.3)
    for update in range(7):
        whole.update(make_batch(4, update))
    for update in range(4):
        part.update(make_batch(4, update))
    part.router.save(tmp_path / "r.pt", **part.state_dict())
    again = make_training(target_cached=0.3)
    again.load_state_dict(torch.load(tmp_path / "r.pt", weights_only=True))
    for update in range(4, 7):
        again.update(make_batch(4, update))
    assert again.report() == whole.report() and again.l1_weight == whole.l1_weight != 1e-3
    for a, b in zip(again.router.parameters(), whole.router.parameters()):
        assert torch.equal(a, b)


def test_checkpointing_gives_the_same_update_and_bfloat16_nearly(monkeypatch):
    plain, checkpointed, half = make_training(), make_training(), make_training(random_dit().bfloat16())
    checkpointed.dit.grad_checkpointing = True
    calls = []
    block = type(checkpointed.dit.blocks[0])
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda self, *a: calls.append(self) or forward(self, *a))
    for training in (plain, checkpointed, half):
        training.update(make_batch(4))
    mine = [sum(c in list(t.dit.blocks) for c in calls) for t in (plain, checkpointed)]
    assert mine == [2 * 3 * 3, 2 * 4 * 3]  # the student's blocks run once more
    row = next(i for i, p in enumerate(plain.router.parameters()) if p.grad is not None)
    exact, same, near = (t.router.routers[row].prob for t in (plain, checkpointed, half))
    assert torch.equal(exact.grad, same.grad) and torch.equal(exact, same)
    assert near.grad.dtype == torch.float32 and not torch.equal(exact.grad, near.grad)
    assert (exact.grad - near.grad).norm() < 0.1 * exact.grad.norm()


def test_a_loss_that_is_not_finite_changes_nothing_and_is_named():
    training = make_training()
    training.update(make_batch(4))
    before = [p.detach().clone() for p in training.router.parameters()]
    batch = make_batch(4)
    batch["noise"][2] = torch.nan  # of the second draw
    step = training.trained[draw_steps(0, 1, 2, 3)[1]] + 1
    with pytest.raises(UserError, match=f"the loss of draw 1, step {step}, in update 2 is not finite .nan."):
        training.update(batch)
    assert training.step == 1
    assert all(torch.equal(a, b) for a, b in zip(before, training.router.parameters()))


def test_a_gradient_that_is_not_finite_changes_nothing_either():
    training = make_training()
    training.l1_weight = float("inf")
    before = [p.detach().clone() for p in training.router.parameters()]
    with pytest.raises(UserError, match="or its gradient in update 1 is not finite"):
        training.update(make_batch(4))
    assert all(torch.equal(a, b) for a, b in zip(before, training.router.parameters()))


def test_the_blended_pass_keeps_twelve_widths_a_token_and_block():
    """The inputs of what is not linear in frozen weights: 2 norms, q k v and the attention's output, GELU, 2 blends."""
    dit = random_dit(depth=6, hidden_size=64, num_heads=2, input_size=16)
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter) and tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.data_ptr() for p in dit.parameters()}
    x, y, noise = torch.randn(4, 4, 16, 16), torch.arange(4), torch.randn(4, 4, 16, 16)
    scores = torch.rand(6, 2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        router_loss(dit, create_diffusion(6), scores, 3, x, y, noise)
    tokens = 4 * 64 * 64 * 4  # bytes of one (N, T, D)
    # 12 a block, less what the first block need not keep; small vectors and statistics come on top.
    assert sum(kept.values()) < 6 * 12.5 * tokens


@pytest.mark.parametrize("start", [1e-7, 5e-6, 1e-3])
@pytest.mark.parametrize("target", [0.1, 0.22, 0.39])
def test_the_controller_reaches_its_target_where_layers_matter_by_decades(start, target):
    """A simulated training: a layer's error is importance * (1 - score)**2, with noise; Adam moves the logits."""
    generator = torch.Generator().manual_seed(0)
    importance = 10 ** (torch.rand(10, 24, generator=generator) * 3 - 6)
    training = make_training(random_dit(depth=12, hidden_size=4, num_heads=1), steps=20, lr=0.1, target_cached=target)
    control = TargetShare(target, response_time(0.1, 8, 10))
    l1_weight = start
    for step in range(1, 301):
        training.optimizer.zero_grad(set_to_none=True)
        for row in set(draw_steps(0, step, 8, 10)):
            scores = training.router(2 * row).flatten()
            noisy = importance[row] * torch.exp(torch.randn((), generator=generator))
            (noisy * (1 - scores) ** 2 + l1_weight * scores).sum().backward()
        training.optimizer.step()
        training.router.clamp_()
        share = (training.heading(min(2, (300 - step) / control.response)) <= 0.1).sum().item() / 480
        l1_weight = control.adjust(l1_weight, share)
    assert abs(training.router.schedule(0.1).cached_share() - target) < 0.01


def test_the_response_time_counts_how_often_a_row_is_drawn():
    assert response_time(0.1, 1, 10) == pytest.approx(200)
    assert response_time(1e-3, 8, 10) == pytest.approx(2000 / (1 - 0.9**8))
