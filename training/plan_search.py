"""The plan of least error for a number of multiply-adds, from an `error_table`: a dynamic programme for each layer."""

import itertools

import numpy as np
import torch

from schedule import Schedule, forecast_weights

LARGEST_GAP = 9  # steps from one computed output of a layer to the next
WINDOW = 3 * LARGEST_GAP - 1  # the oldest output that a forecast can read, in steps before it


def forecast_errors(table, order, gap=LARGEST_GAP):
    """Squared errors of forecasts, [layers, steps, gap, gap+1, gap+1], from the table of a plan.

    Indices: layer n, step e in the order in which they run, age a of the newest output (0 is not used), gaps b and d
    before it. A gap of 0 means that no such output exists; a forecast then has a lower order.
    """
    table = np.asarray(table).transpose(1, 0, 2, 3)  # [layers, steps, age-1, age-1]
    errors = np.zeros((*table.shape[:2], gap, gap + 1, gap + 1))
    for a, b, d in itertools.product(range(1, gap), range(gap + 1), range(gap + 1)):
        known = (a, a + b, a + b + d)[: 1 + (b > 0) + (b > 0 and d > 0)]
        ages = known[: order + 1]
        if ages[-1] > table.shape[2]:  # a plan of so few steps has no such outputs
            continue
        index, weights = np.array(ages) - 1, np.array(forecast_weights(ages))
        errors[:, :, a, b, d] = np.einsum("i,lsij,j->ls", weights, table[:, :, index][..., index], weights)
    return errors


def cheapest(errors, prices):
    """The steps at which to run each layer, bool [steps, layers], so that errors + prices * (steps run) are least.

    errors: of `forecast_errors`. prices: of running each layer once, [layers].
    """
    layers, steps, gap, *_ = errors.shape
    least = np.zeros((steps, layers, gap + 1, gap + 1))  # from step e on, if the layer runs there after gaps b and d
    next_gap = np.zeros(least.shape, dtype=int)
    for e in reversed(range(steps)):
        best, reused = np.full(least.shape[1:], np.inf), np.zeros(least.shape[1:])
        for n in range(1, gap + 1):  # the layer runs again n steps later, or the run has ended before that
            total = reused
            if e + n < steps:  # then n and b are the gaps
                total = reused + prices[:, None, None] + least[e + n, :, n, :, None]
            better = total < best
            best[better], next_gap[e][better] = total[better], n
            if e + n >= steps:
                break
            if n < gap:
                reused = reused + errors[:, e + n, n]
        least[e] = best
    compute = np.zeros((steps, layers), dtype=bool)
    for layer in range(layers):
        e = b = d = 0
        while e < steps:
            compute[e, layer] = True
            e, b, d = e + (n := next_gap[e, layer, b, d]), n, b
    return compute


def plan_for(table, order, costs, target, gap=LARGEST_GAP):
    """The `Schedule` of least predicted error whose multiply-adds are at most 1/`target` of the full run's, or None.

    table: of `error_table`. costs: of `DiT.multiply_adds`. gap: the most steps between two computed outputs of a layer.
    """
    errors, depth = forecast_errors(table, order, gap), table.shape[1] // 2
    layer_costs = np.tile(costs["layer"], depth) / np.mean(costs["layer"])
    scale = errors.max() or 1.0

    def plan(price):
        compute = cheapest(errors, price * layer_costs)
        return Schedule(torch.from_numpy(compute[::-1].copy()).unflatten(1, (depth, 2)), order)

    low, high = -30.0, 5.0  # powers of ten of `scale`
    found = plan(10**high * scale)
    if found.speedup_bound(costs) < target:
        return None
    for _ in range(35):
        middle = (low + high) / 2
        trial = plan(10**middle * scale)
        if trial.speedup_bound(costs) >= target:
            high, found = middle, trial
        else:
            low = middle
    return found


def largest_speedup(steps, depth, costs):
    """The speed-up of the fastest plan: every layer runs at every `LARGEST_GAP`-th step."""
    return Schedule.every_nth(steps, depth, LARGEST_GAP).speedup_bound(costs)
