import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, random_dit

from diffusion import create_diffusion
from models import DiT_models
from router import Router, router_loss
from runtime.errors import UserError
from schedule import forecast_weights

RELEASED = Path(__file__).resolve().parent.parent.parent / "shared" / "reference"


def test_odd_steps_and_an_odd_first_step_run_in_full():
    router = Router(7, 2)
    with torch.no_grad():
        for row in router.routers:
            row.prob.fill_(-5)
    full = router.schedule(0.1).compute.flatten(1).all(1).tolist()
    assert full == [False, True, False, True, False, True, True]  # i = 6 runs first, without a partner
    assert list(Router.trained_steps(7)) == [0, 2, 4]
    assert list(Router.trained_steps(6)) == [0, 2, 4]


def test_a_layer_runs_where_its_score_exceeds_the_threshold():
    router = Router(2, 2)
    with torch.no_grad():
        router.routers[0].prob.copy_(torch.tensor([-3.0, 0.0, 0.0, 3.0]))
    assert router.schedule(0.5).rows()[0] == [[False, False], [False, True]]
    assert router.schedule(0.49).rows()[0] == [[False, True], [True, True]]


def test_threshold_outside_0_to_1_is_refused():
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="outside"):
            Router(2, 2).schedule(threshold)


def test_a_written_router_reads_back_and_holds_plain_types_only(tmp_path):
    router = Router(4, 3)
    router.save(tmp_path / "router.pt", args={"lr": 0.1})
    again = Router.load(tmp_path / "router.pt")
    assert (again.steps, again.depth) == (4, 3)
    assert all(torch.equal(a.prob, b.prob) for a, b in zip(router.routers, again.routers))
    assert set(torch.load(tmp_path / "router.pt", weights_only=True)) == {"routers", "args"}
    assert [p.name for p in tmp_path.iterdir()] == ["router.pt"]


def test_the_layout_of_the_original_is_read():
    saved = torch.load(DATA / "synthetic_router_ddim20.pt", weights_only=False)
    assert list(saved["routers"])[:2] == ["0.prob", "1.prob"] and isinstance(saved["args"], argparse.Namespace)
    router = Router.load(DATA / "synthetic_router_ddim20.pt")
    assert (router.steps, router.depth) == (20, 28)
    assert torch.equal(router.routers[3].prob, saved["routers"]["3.prob"])


@pytest.mark.parametrize(
    "steps, running, even, distinct, bound",
    [(20, 312, 560, 7, 1.285), (50, 736, 1400, 14, 1.311)],
)
def test_the_released_routers(steps, running, even, distinct, bound):
    path = RELEASED / f"DDIM{steps}_router.pt"
    if not path.is_file():
        pytest.skip(f"the released routers are not part of the repository; none at {path}")
    schedule = Router.load(path).schedule(0.1)
    assert schedule.compute[::2].numel() == even
    assert schedule.compute[::2].sum() == running
    assert schedule.compute[1::2].all()
    assert schedule.distinct_rows() == distinct
    with torch.device("meta"):
        costs = DiT_models["DiT-XL/2"]().multiply_adds()
    assert round(schedule.speedup_bound(costs), 3) == bound


STATE = Router(4, 3, torch.Generator().manual_seed(0)).state()


def below(prefix):
    return {prefix + name: row for name, row in STATE.items()}


@pytest.mark.parametrize(
    "content",
    [
        {"routers": below("module.")},
        {"routers": below("_orig_mod.module.")},
        {"routers": {name.replace(".prob", "._orig_mod.prob"): row for name, row in STATE.items()}},
        {"router": below("routers.")},
        {"state_dict": below("router.routers."), "epoch": 3},
        below("module.routers."),
        {"routers": {name: row.double() for name, row in STATE.items()}},
        {"routers": STATE, "args": argparse.Namespace(lr=np.float64(1e-3), thres=np.float32(0.1), out=Path("a"))},
    ],
)
def test_routers_of_others_are_read(tmp_path, content):
    torch.save(content, tmp_path / "router.pt")
    loaded = Router.load(tmp_path / "router.pt").state()
    assert loaded.keys() == STATE.keys() and all(torch.equal(loaded[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize(
    "content, words",
    [
        ({"routers": Router(4, 3)}, "router.Router, which could run code"),
        ({"routers": below("online.") | below("ema.")}, "several routers, ema. and online."),
        ({"routers": STATE | {"module.4.prob": torch.zeros(6)}}, "several routers, one without prefix and module."),
        ({"routers": STATE | {"0._orig_mod.prob": torch.zeros(6)}}, "must be 0.prob to 4.prob"),
        ({"routers": STATE | {7: torch.zeros(6)}}, "must be 0.prob to 4.prob"),
        ({"routers": STATE | {"3.prob": None}}, "must be 0.prob to 3.prob"),
    ],
)
def test_a_router_file_that_is_refused_names_the_reason(tmp_path, content, words):
    torch.save(content, tmp_path / "router.pt")
    with pytest.raises(UserError, match=words):
        Router.load(tmp_path / "router.pt")


@pytest.mark.parametrize(
    "content",
    [
        {"model": {}},
        {"routers": {}},
        {"routers": {"1.prob": torch.zeros(4)}},
        {"routers": {"0.prob": torch.zeros(3)}},
        {"routers": {"0.prob": torch.zeros(4), "1.prob": torch.zeros(6)}},
        {"routers": {"0.prob": 1}},
        {"routers": {"0.prob": torch.zeros(4, dtype=torch.int64)}},
        {"routers": {"0.prob": torch.full((4,), torch.nan)}},
        [torch.zeros(4)],
    ],
)
def test_files_that_are_no_router_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "router.pt")
    with pytest.raises(UserError, match="router.pt"):
        Router.load(tmp_path / "router.pt")


def test_truncated_garbage_and_missing_files_are_refused(tmp_path):
    Router(4, 3).save(tmp_path / "router.pt")
    whole = (tmp_path / "router.pt").read_bytes()
    for content in (whole[:100], whole[: len(whole) // 2], whole[:-30], b"", b"hello", b"<html>404</html>"):
        (tmp_path / "router.pt").write_bytes(content)
        with pytest.raises(UserError):
            Router.load(tmp_path / "router.pt")
    with pytest.raises(UserError, match="no such file"):
        Router.load(tmp_path / "none.pt")


def loss_inputs():
    torch.manual_seed(3)
    return torch.randn(2, 4, 4, 4), torch.tensor([1, 5]), torch.randn(2, 4, 4, 4)


def test_the_loss_is_zero_where_every_layer_runs_and_positive_where_none_does():
    dit, diffusion = random_dit(), create_diffusion(10)
    x, y, noise = loss_inputs()
    assert not router_loss(dit, diffusion, torch.ones(3, 2), 3, x, y, noise).any()
    assert (router_loss(dit, diffusion, torch.zeros(3, 2), 3, x, y, noise) > 0).all()


def test_the_gradient_of_the_scores_agrees_with_finite_differences():
    dit, diffusion = random_dit().double(), create_diffusion(10)
    x, y, noise = (v.double() if v.is_floating_point() else v for v in loss_inputs())
    scores = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: router_loss(dit, diffusion, s, 3, x, y, noise).mean(), scores)


def test_a_straight_through_threshold_has_the_loss_of_the_hard_scores():
    dit, diffusion = random_dit(), create_diffusion(10)
    x, y, noise = loss_inputs()
    scores = torch.tensor([[0.2, 0.8], [0.5, 0.6], [0.9, 0.1]], requires_grad=True)
    hard = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    through = router_loss(dit, diffusion, scores, 3, x, y, noise, threshold=0.5)
    assert torch.equal(through, router_loss(dit, diffusion, hard, 3, x, y, noise))
    through.mean().backward()
    assert scores.grad.abs().sum() > 0


@pytest.mark.parametrize("order, i, ages", [(1, 3, (1, 3)), (2, 3, (1, 3, 5)), (2, 7, (1, 3)), (2, 9, (1,))])
def test_with_forecasts_hard_scores_have_the_error_of_the_forecast(order, i, ages):
    """The outputs of the odd steps from i on are remembered; of ten steps there are few above 7."""
    dit, diffusion = random_dit(), create_diffusion(10)
    x, y, noise = loss_inputs()
    scores = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    row = [[True if run else forecast_weights(ages) for run in block] for block in scores.tolist()]
    t, first = diffusion.timesteps(y.device)[:, None].expand(-1, len(y)), i - 1 + ages[-1]
    cache, x = dit.empty_cache(len(ages) - 1), diffusion.q_sample(x, first, noise)
    for j in range(first, i - 1, -1):
        x = diffusion.ddim_step(dit(x, t[j], y, cache=cache if j % 2 else None), x, j)
    expected = (dit(x, t[i - 1], y, row, cache) - dit(x, t[i - 1], y)).square().flatten(1).mean(1)
    actual = router_loss(dit, diffusion, scores, i, *loss_inputs(), order=order)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("i", [0, 2, 11])
def test_training_starts_from_odd_steps_only(i):
    with pytest.raises(ValueError, match="odd steps"):
        router_loss(random_dit(), create_diffusion(10), torch.ones(3, 2), i, *loss_inputs())


def test_rows_that_were_not_drawn_do_not_move_nor_does_their_adam_state():
    dit, diffusion, router = random_dit(), create_diffusion(6), Router(6, 3)
    optimizer = torch.optim.AdamW(router.parameters(), lr=0.1, weight_decay=0)
    x, y, noise = loss_inputs()

    def update(i):
        optimizer.zero_grad(set_to_none=True)
        scores = router(i - 1)
        (router_loss(dit, diffusion, scores, i, x, y, noise).mean() + scores.sum()).backward()
        optimizer.step()

    update(3)
    rows = [row.prob.detach().clone() for row in router.routers]
    state = {k: v.clone() for k, v in optimizer.state[router.routers[2].prob].items()}
    update(5)
    for i, row in enumerate(router.routers):
        assert torch.equal(row.prob, rows[i]) == (i != 4)
    assert len(optimizer.state) == 2
    assert all(torch.equal(v, state[k]) for k, v in optimizer.state[router.routers[2].prob].items())
    assert all(p.grad is None for p in dit.parameters())


def test_logits_are_clamped():
    router = Router(2, 2)
    with torch.no_grad():
        router.routers[0].prob.copy_(torch.tensor([-9.0, 9.0, 1.0, 0.0]))
    router.clamp_()
    assert router.routers[0].prob.tolist() == [-5, 5, 1, 0]
