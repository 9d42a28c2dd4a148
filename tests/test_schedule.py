import math

import numpy as np
import pytest
import torch

from diffusion import create_diffusion
from router import Router
from runtime.errors import UserError
from schedule import Schedule

POLICIES = {"random": lambda *plan: Schedule.random_layers(*plan, seed=3)}
POLICIES |= {"first": Schedule.first_blocks, "last": Schedule.last_blocks}


def two_of_eight():
    compute = torch.ones(2, 2, 2, dtype=torch.bool)
    compute[0, 0, 0] = compute[0, 1, 1] = False
    return Schedule(compute)


def test_rows_are_python_values():
    assert two_of_eight().rows() == [[[False, True], [True, False]], [[True, True], [True, True]]]
    assert two_of_eight().rows()[0][0][0] is False


def test_counts_of_a_schedule():
    schedule = two_of_eight()
    assert (schedule.steps, schedule.depth, schedule.distinct_rows()) == (2, 2, 2)
    assert schedule.cached_share() == 0.25
    assert Schedule.full(7, 3).distinct_rows() == 1
    assert Schedule.full(7, 3).cached_share() == 0


def test_multiply_adds_follow_the_layers_that_run():
    costs = {"layer": (10, 100), "fixed": 7}
    assert two_of_eight().multiply_adds(costs).tolist() == [7 + 10 + 100, 7 + 220]
    assert two_of_eight().speedup_bound(costs) == pytest.approx(2 * 227 / (117 + 227))
    assert Schedule.full(4, 2).speedup_bound(costs) == 1


@pytest.mark.parametrize("compute", [torch.ones(2, 3, 2), torch.ones(2, 3, dtype=torch.bool), torch.ones(0, 3, 2) > 0])
def test_other_shapes_and_types_are_refused(compute):
    with pytest.raises(ValueError, match=r"\[steps, depth, 2\]"):
        Schedule(compute)


def test_a_first_step_that_reuses_is_refused():
    compute = torch.ones(4, 2, 2, dtype=torch.bool)
    compute[3, 1, 0] = False
    with pytest.raises(ValueError, match="runs first"):
        Schedule(compute)


@pytest.mark.parametrize("steps, interval", [(1, 1), (7, 1), (20, 2), (50, 2), (20, 3), (50, 3), (5, 9)])
def test_every_nth_counts_from_the_first_executed_step(steps, interval):
    schedule = Schedule.every_nth(steps, 4, interval)
    since = 0
    for i in reversed(range(steps)):
        assert schedule.compute[i].tolist() == [[since == 0] * 2] * 4
        since = (since + 1) % interval
    assert schedule.cached_share() == pytest.approx(1 - math.ceil(steps / interval) / steps)


def test_every_nth_below_1_is_refused():
    with pytest.raises(ValueError, match="interval 0"):
        Schedule.every_nth(4, 2, 0)


def test_every_nth_takes_whole_numbers_only():
    assert Schedule.every_nth(7, 2, np.int64(3)) == Schedule.every_nth(7, 2, 3)
    for interval in (2.5, 3.0, "3", None):
        with pytest.raises(TypeError, match=f"^interval {interval!r} is no whole number$"):
            Schedule.every_nth(7, 2, interval)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("steps, depth, reused", [(20, 12, 186), (50, 12, 555), (7, 3, 0), (7, 3, 11), (7, 3, 18)])
def test_policies_reuse_exactly_as_many_layers_as_asked_at_the_steps_that_a_router_decides(name, steps, depth, reused):
    where = Router.trained_steps(steps)
    schedule = POLICIES[name](steps, depth, where, reused)
    assert (schedule.steps, schedule.depth) == (steps, depth)
    skipped = [[[k for k in range(2) if not block[k]] for block in row] for row in schedule.rows()]
    calls = [sum(map(len, row)) for row in skipped]
    assert sum(calls) == reused
    assert all(calls[i] == 0 for i in range(steps) if i not in where)
    counts = [calls[i] for i in where]
    if name == "random":
        assert max(counts) - min(counts) <= 1
        return
    halves = 0
    for i in where:
        blocks = skipped[i] if name == "first" else skipped[i][::-1]
        assert blocks == sorted(blocks, key=len, reverse=True)  # without a gap from the end that is meant
        halves += [len(block) for block in blocks].count(1)
        assert all(block == ([0] if name == "first" else [1]) for block in blocks if len(block) == 1)
    whole = [count // 2 for count in counts]
    assert halves == reused % 2 and max(whole) - min(whole) <= 1


def test_the_plan_of_the_first_blocks_by_hand():
    # Seven calls at steps 0 and 2: three blocks and an attention, one block at step 0 and two at step 2.
    schedule = Schedule.first_blocks(4, 3, [0, 2], 7)
    run, skip, half = [True, True], [False, False], [False, True]
    assert schedule.rows() == [[skip, half, run], [run] * 3, [skip, skip, run], [run] * 3]
    half.reverse()
    assert Schedule.last_blocks(4, 3, [0, 2], 7).rows() == [[run, half, skip], [run] * 3, [run, skip, skip], [run] * 3]


def test_random_layers_follow_the_seed_and_all_layers_are_drawn():
    plans = [Schedule.random_layers(20, 12, range(0, 19, 2), 186, seed) for seed in (0, 0, 1)]
    assert torch.equal(plans[0].compute, plans[1].compute) and not torch.equal(plans[0].compute, plans[2].compute)
    seeds = 300
    skipped = sum((~Schedule.random_layers(2, 3, [0], 2, seed).compute[0]).double() for seed in range(seeds))
    # Each of six layers with probability 1/3: five standard deviations.
    assert ((skipped - seeds / 3).abs() < 5 * math.sqrt(seeds * 2 / 9)).all()


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("reused", [-1, 13, 14])
def test_more_layers_than_there_are_cannot_be_reused(name, reused):
    with pytest.raises(ValueError, match=f"{reused} layers cannot be reused at 2 steps of 6"):
        POLICIES[name](4, 3, [0, 2], reused)


def test_a_policy_cannot_reuse_at_the_first_executed_step():
    with pytest.raises(ValueError, match="runs first"):
        Schedule.first_blocks(4, 3, [3], 1)


def test_a_written_schedule_reads_back(tmp_path):
    schedule = Schedule.random_layers(20, 12, range(0, 19, 2), 186, 0)
    schedule.save(tmp_path / "new" / "s.pt")
    assert torch.equal(Schedule.load(tmp_path / "new" / "s.pt").compute, schedule.compute)
    saved = torch.load(tmp_path / "new" / "s.pt", weights_only=True)
    assert list(saved) == ["compute"] and saved["compute"].dtype == torch.bool
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["s.pt"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_schedule_in_another_encoding_of_json_is_read(tmp_path, encoding):
    schedule = Schedule.every_nth(4, 3, 2)
    schedule.save(tmp_path / "s.json")
    (tmp_path / "other.json").write_text((tmp_path / "s.json").read_text(), encoding)
    assert torch.equal(Schedule.load(tmp_path / "other.json").compute, schedule.compute)


@pytest.mark.parametrize(
    "content, words",
    [
        ({"routers": {"0.prob": torch.zeros(4)}}, 'no tensor "compute"'),
        ({"compute": [[True]]}, 'no tensor "compute"'),
        ([torch.ones(1)], 'no tensor "compute"'),
        ({"compute": torch.ones(4, 3, 2)}, r"bool \[steps, depth, 2\], not torch.float32 \[4, 3, 2\]"),
        ({"compute": torch.zeros(4, 3, 2, dtype=torch.bool)}, "runs first"),
        (b"no checkpoint", "s.pt"),
        (None, "no such file"),
    ],
)
def test_files_that_are_no_schedule_are_refused(tmp_path, content, words):
    path = tmp_path / "s.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=words):
        Schedule.load(path)


def test_a_schedule_of_other_steps_or_depth_is_refused():
    schedule = Schedule.full(20, 3)
    schedule.check_fits("s.pt", 20, 3)
    with pytest.raises(UserError, match="s.pt is for 20 steps, the sampler runs 50: pass --num-sampling-steps 20"):
        schedule.check_fits("s.pt", 50, 3)
    with pytest.raises(UserError, match="s.pt is for 3 blocks, the model has 28"):
        schedule.check_fits("s.pt", 20, 28)


def test_the_table_of_a_schedule_adds_up():
    compute = torch.ones(4, 2, 2, dtype=torch.bool)
    compute[0] = False
    compute[2, 0, 1] = False
    text = Schedule(compute).describe({"layer": (10**9, 10**10), "fixed": 10**9})
    rows = [line.split() for line in text.splitlines()]
    assert rows[1] == ["2/2", "2/2", "23", "100.0%", "3", "1"]
    assert rows[2] == ["2/2", "1/2", "13", "56.5%", "2"]
    assert rows[3] == ["0/2", "0/2", "1", "4.3%", "0"]
    assert "cached 31.2% of all layers, 3 distinct steps; 60 of 92 G multiply-adds an image" in text
    assert text.endswith("so the speed-up is at most 1.533")


@pytest.mark.parametrize("steps", [10, 30, 40, 50, 80])
def test_a_plan_for_other_steps_runs_layers_at_the_nearest_timesteps(steps):
    schedule = Schedule.random_layers(50, 3, range(0, 49), 250, 0).with_order(1)
    other, old, new = schedule.with_steps(steps), create_diffusion(50), create_diffusion(steps)
    assert (other.steps, other.order) == (steps, 1)
    if steps == 50:
        assert torch.equal(other.compute, schedule.compute)
    width = np.diff(new.timestep_map).max()
    for i, l, k in np.ndindex(*other.compute.shape):
        times = np.asarray(old.timestep_map)[schedule.compute[:, l, k].numpy()]
        distance = np.abs(times - new.timestep_map[i]).min()
        # Timesteps are rounded, so in the middle between two steps either is right.
        assert distance <= width / 2 + 1 if other.compute[i, l, k] else distance >= width / 2 - 2


def test_a_schedule_by_change_by_hand():
    """Attention: 0.1 and 0.3 reuse; at age 3 the change is alpha, not below it. MLP: reuse for three steps at most."""
    changes = torch.full((7, 3, 2), 0.01)
    changes[5:, :, 0] = torch.tensor([[0.1, 9, 9], [9, 9, 9]])
    changes[4, :, 0] = torch.tensor([9, 0.3, 9])
    changes[3, :, 0] = torch.tensor([0.2, 0.2, 0.5])
    changes[2, 0, 0] = 0.6
    schedule = Schedule.by_change(changes, depth=2, alpha=0.5)
    assert schedule.compute[:, 0, 0].tolist() == [False, False, True, True, False, False, True]
    assert schedule.compute[:, 0, 1].tolist() == [False, False, True, False, False, False, True]
    assert torch.equal(schedule.compute[:, 0], schedule.compute[:, 1])
    for alpha in (0, -1, math.nan):
        with pytest.raises(ValueError, match="above 0"):
            Schedule.by_change(changes, 2, alpha)


def test_plans_are_equal_if_all_of_them_is():
    plan = Schedule.every_nth(6, 2, 3)
    same = Schedule(plan.compute.clone())
    others = [Schedule.every_nth(6, 2, 2), Schedule.every_nth(6, 3, 3), plan.with_order(1)]
    others += [Schedule(plan.compute, process="flow-euler"), "plan"]
    assert plan == same and len({plan, same}) == 1
    assert not any(plan == other for other in others) and len({plan, *others}) == 6
