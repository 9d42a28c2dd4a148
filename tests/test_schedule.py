import pytest
import torch

from schedule import Schedule


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
    with pytest.raises(ValueError, match="executed first"):
        Schedule(compute)
