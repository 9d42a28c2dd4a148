"""Flow matching against closed forms: for Gaussian data the velocity and the distribution at every time are known."""

import numpy as np
import pytest
import torch

from diffusion import FlowMatching
from diffusion.flow import on_path, velocity_loss

MEAN, STD = 1.5, 0.4  # of the data


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact_velocity(x, t):
    """E[noise - x_0 | x_t = x] for data from N(MEAN, STD^2): x_0, noise and x_t are jointly Gaussian."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    return -MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN)


def sample(flow, x, **arguments):
    return flow.loop(lambda x, i: exact_velocity(x, float(flow.times[i])), x, **arguments)


@pytest.mark.parametrize("sampler, order", [("euler", 1), ("heun", 2)])
def test_the_error_falls_with_the_order_of_the_sampler(sampler, order):
    """The flow carries the quantile z of the noise to that of the data, MEAN + STD z."""
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    errors = [(sample(FlowMatching(n, sampler), z[:, None]) - (MEAN + STD * z[:, None])).abs().max() for n in (64, 128)]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)
    assert errors[1] < 0.05


def test_the_sde_has_the_mean_and_variance_of_its_linear_recurrence_and_nearly_those_of_the_data():
    """The velocity is affine in x, so each step maps mean and variance by an affine map that is known."""
    n, steps = 400_000, 50
    flow, generator = FlowMatching(steps, "sde"), torch.Generator().manual_seed(1)
    times = [*np.linspace(1, 0.04, steps), 0.0]
    mean, variance = 0.0, 1.0
    for t, after in zip(times, times[1:]):
        h, slope = after - t, (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2)
        drift = slope + (1 + (1 - t) * slope)  # of x: v and the noise expected at x
        constant = exact_velocity(0, t) * (2 - t)
        noise = 2 * t * -h if after else 0.0
        mean, variance = mean + h * (drift * mean + constant), (1 + h * drift) ** 2 * variance + noise

    x = sample(flow, draw(n, 1), randn_like=lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype))
    assert x.mean().item() == pytest.approx(mean, abs=0.004)
    assert x.var().item() == pytest.approx(variance, rel=0.01)
    assert (mean, variance) == (pytest.approx(MEAN, abs=0.03), pytest.approx(STD**2, rel=0.15))


def test_the_sde_keeps_the_distribution_of_every_time():
    """Many short steps from the noise give mean and variance of x_t, whose marginal is known."""
    flow, generator = FlowMatching(500, "sde"), torch.Generator().manual_seed(1)
    x, seen = draw(100_000, 1), {}
    for i in range(499, 100, -1):
        v = exact_velocity(x, float(flow.times[i]))
        x = flow.step(v, x, i, torch.randn(x.shape, generator=generator, dtype=x.dtype))
        seen[i - 1] = x.mean().item(), x.var().item()
    for i in (400, 250, 100):
        t = flow.times[i]
        assert seen[i][0] == pytest.approx((1 - t) * MEAN, abs=0.015)
        assert seen[i][1] == pytest.approx((1 - t) ** 2 * STD**2 + t**2, rel=0.02)


def test_the_times_of_the_calls():
    assert FlowMatching(4).times.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert FlowMatching(4, "heun").times.tolist() == [0.0, 0.5, 0.5, 1.0]
    np.testing.assert_allclose(FlowMatching(3, "sde").times, [0.04, 0.52, 1.0])
    assert FlowMatching(1, "sde").times.tolist() == [1.0]
    assert FlowMatching(4, time_scale=1000).timesteps(torch.device("cpu")).tolist() == [250, 500, 750, 1000]


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_loops_call_the_network_once_for_each_index_with_a_python_int(sampler):
    flow, seen, draws = FlowMatching(6, sampler), [], []

    def denoise(x, i):
        seen.append((type(i), i))
        return torch.cat([x, torch.full_like(x, torch.nan)], dim=1)  # a learned variance is not used

    out = flow.loop(denoise, draw(2, 4, 3, 3), lambda x: draws.append(x) or x)
    assert seen == [(int, i) for i in range(5, -1, -1)]
    assert out.isfinite().all() and out.shape == (2, 4, 3, 3)
    assert len(draws) == flow.draws == (5 if sampler == "sde" else 0)


def test_a_step_with_the_true_velocity_stays_on_the_path():
    flow, x, noise = FlowMatching(5), draw(2, 4, 3, 3), draw(2, 4, 3, 3, seed=1)
    for i in range(1, 5):
        step = flow.step(noise - x, flow.q_sample(x, i, noise), i)
        torch.testing.assert_close(step, flow.q_sample(x, i - 1, noise))
    torch.testing.assert_close(flow.step(noise - x, flow.q_sample(x, 0, noise), 0), x)


def test_an_int_and_a_tensor_of_steps_noise_alike():
    flow, x, noise = FlowMatching(20), draw(3, 4, 2, 2), draw(3, 4, 2, 2, seed=1)
    i = torch.tensor([0, 7, 19])
    each = torch.cat([flow.q_sample(x[k : k + 1], int(i[k]), noise[k : k + 1]) for k in range(3)])
    torch.testing.assert_close(flow.q_sample(x, i, noise), each, rtol=1e-6, atol=1e-6)


def test_the_loss_is_least_at_the_conditional_mean_velocity():
    """Its minimum over functions of x_t is E[noise - x_0 | x_t]: adding anything raises it by the mean square."""
    x, noise, t = MEAN + STD * draw(200_000, 1), draw(200_000, 1, seed=1), 0.3
    v = exact_velocity(on_path(x, t, noise), t)
    losses = [velocity_loss(v + shift, x, noise).mean().item() for shift in (0.0, 0.5, -0.5)]
    assert losses[1] - losses[0] == pytest.approx(0.25, abs=0.01)
    assert losses[2] - losses[0] == pytest.approx(0.25, abs=0.01)
    assert torch.equal(velocity_loss(noise - x, x, noise), torch.zeros(len(x), dtype=x.dtype))


@pytest.mark.parametrize(
    "steps, sampler, word", [(4, "dopri5", "euler, heun, sde"), (5, "heun", "even"), (0, "euler", "0")]
)
def test_samplers_that_do_not_exist_are_refused(steps, sampler, word):
    with pytest.raises(ValueError, match=word):
        FlowMatching(steps, sampler)


def test_steps_that_need_more_are_refused():
    x = draw(1, 4, 2, 2)
    with pytest.raises(ValueError, match="noise"):
        FlowMatching(4, "sde").step(x, x, 2)
    with pytest.raises(ValueError, match="Heun"):
        FlowMatching(4, "heun").step(x, x, 2)
