"""The table of a learned plan against finite differences, and its dynamic programme against all plans."""

import itertools

import numpy as np
import pytest
import torch
from conftest import random_dit

from diffusion import create_diffusion
from sampling import sample_latents
from schedule import Schedule, forecast_weights
from training.plan_search import cheapest, forecast_errors
from training.plan_table import Trajectory, error_table, sources

STEPS, DEPTH = 7, 3


def some_plan(order):
    torch.manual_seed(4)
    compute = torch.rand(STEPS, DEPTH, 2) < 0.5
    compute[-1] = True
    return Schedule(compute, order)


@pytest.fixture
def problem():
    dit = random_dit().double()
    torch.manual_seed(1)
    z, y = torch.randn(2, 4, 4, 4, dtype=torch.float64), torch.tensor([1, 4])
    return dit, create_diffusion(STEPS), z, y


def run(problem, schedule, cfg_scale, replaced=None):
    """Final latents of a plan, and the fresh outputs; replaced: (step, layer, output to use there)."""
    dit, diffusion, z, y = problem
    path, plan, fresh, x = Trajectory(dit, diffusion, y, cfg_scale), sources(schedule), [], z
    for e in range(STEPS):
        fresh.append({})

        def output_of(n, run, e=e):
            fresh[e][n] = run()
            pairs = plan[e][n]
            kept = fresh[e][n] if pairs is None else sum(fresh[s][n] * w for s, w in pairs)
            return replaced[2](kept) if replaced and replaced[:2] == (e, n) else kept

        x = path.step(x, e, output_of)
    return x, fresh


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
@pytest.mark.parametrize("order", [0, 2])
def test_a_trajectory_with_its_forecasts_is_that_of_sampling(problem, order, cfg_scale):
    dit, diffusion, z, y = problem
    schedule = some_plan(order)
    expected = sample_latents(dit, diffusion, z, y, cfg_scale, schedule)
    assert torch.allclose(run(problem, schedule, cfg_scale)[0], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_the_table_agrees_with_finite_differences(problem, cfg_scale):
    schedule, window, (dit, diffusion, z, y) = some_plan(2), 3, problem
    vectors = torch.randn(2, *z.shape, dtype=z.dtype)
    table = error_table(dit, diffusion, schedule, z, y, vectors, cfg_scale, window)
    assert table.shape == (STEPS, 2 * DEPTH, window, window)
    _, fresh = run(problem, schedule, cfg_scale)
    for e, n in itertools.product(range(STEPS), range(2 * DEPTH)):
        moved = []
        for age in range(1, window + 1):
            difference = fresh[e - age][n] - fresh[e][n] if age <= e else torch.zeros_like(fresh[e][n])
            shifts = [lambda h, by=sign * 1e-5 * difference: h + by for sign in (1, -1)]
            up, down = (run(problem, schedule, cfg_scale, (e, n, shift))[0] for shift in shifts)
            slope = (up - down) / 2e-5
            moved.append((vectors * slope).flatten(2).sum(2).flatten())
        moved = torch.stack(moved, 1)
        assert torch.allclose(table[e, n], moved.T @ moved, rtol=1e-4, atol=1e-7 * table.max().item()), (e, n)


def predicted(table, compute, order):
    """The error of running one layer at the steps `compute` (bool [steps]), by the definition."""
    error, computed = 0.0, []
    for e, runs in enumerate(compute):
        if runs:
            computed = [e, *computed[:order]]
        else:
            ages = [e - s for s in computed]
            weights = np.array(forecast_weights(tuple(ages)))
            index = np.array(ages) - 1
            error += weights @ table[e][np.ix_(index, index)] @ weights
    return error


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_dynamic_programme_finds_the_best_of_all_plans(order):
    steps, random = 9, np.random.default_rng(order)
    moved = random.standard_normal((steps, 2, 4, steps - 1)) * np.arange(1, steps)
    table = np.einsum("lnri,lnrj->lnij", moved, moved)
    plans = [(True, *rest) for rest in itertools.product((False, True), repeat=steps - 1)]
    for price in (0.1, 30.0, 1000.0):
        prices = price * np.array([1.0, 2.0])
        found = cheapest(forecast_errors(table, order), prices)
        for n in range(2):
            costs = {plan: predicted(table[:, n], plan, order) + prices[n] * sum(plan) for plan in plans}
            best = min(costs.values())
            assert costs[tuple(found[:, n].tolist())] == pytest.approx(best), (price, n)
