import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusion import create_diffusion, linear_betas, space_timesteps


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_betas_are_linear_from_1e_4_to_2e_2():
    betas = linear_betas(1000)
    assert (betas[0], betas[-1]) == (1e-4, 0.02)
    np.testing.assert_allclose(np.diff(betas), (0.02 - 1e-4) / 999, rtol=1e-9)


@pytest.mark.parametrize(
    "sections, expected",
    [
        ("", list(range(12))),
        (None, list(range(12))),
        (12, list(range(12))),
        (1, [0]),
        ("2", [0, 11]),
        (4, [0, 4, 7, 11]),  # 0, 3.67, 7.33, 11
        ("3,2", [0, 2, 5, 6, 11]),  # halves of six: 0, 2.5 (Python rounds to even), 5; then 0, 5
        ("ddim4", [0, 3, 6, 9]),
        ("ddim6", [0, 2, 4, 6, 8, 10]),
    ],
)
def test_kept_timesteps(sections, expected):
    assert space_timesteps(12, sections).tolist() == expected


def test_every_count_up_to_all_steps_starts_at_0_ends_at_999_and_keeps_that_many():
    for n in range(2, 1001):
        kept = space_timesteps(1000, n)
        assert len(set(kept.tolist())) == n and kept[0] == 0 and kept[-1] == 999


@pytest.mark.parametrize("sections", [1001, 0, -3, "x", "10,", "ddim999", "ddim", "600,3", 2.5])
def test_counts_that_do_not_exist_are_refused(sections):
    with pytest.raises(ValueError):
        space_timesteps(1000, sections)


def test_respaced_betas_keep_the_cumulative_products():
    diffusion = create_diffusion(7)
    kept = np.cumprod(1 - linear_betas(1000))[diffusion.timestep_map]
    np.testing.assert_allclose(np.cumprod(1 - diffusion.betas), kept, rtol=1e-12)


def test_an_int_and_a_tensor_of_steps_noise_alike():
    diffusion, x, noise = create_diffusion(20), draw(3, 4, 2, 2), draw(3, 4, 2, 2, seed=1)
    i = torch.tensor([0, 7, 19])
    each = torch.cat([diffusion.q_sample(x[k : k + 1], int(i[k]), noise[k : k + 1]) for k in range(3)])
    torch.testing.assert_close(diffusion.q_sample(x, i, noise), each, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("i", [1, 10, 19])
def test_a_ddim_step_with_the_true_noise_lands_on_the_same_image_noised_less(i):
    diffusion, x, noise = create_diffusion(20), draw(2, 4, 4, 4), draw(2, 4, 4, 4, seed=1)
    output = torch.cat([noise, torch.zeros_like(noise)], dim=1)
    step = diffusion.ddim_step(output, diffusion.q_sample(x, i, noise), i)
    torch.testing.assert_close(step, diffusion.q_sample(x, i - 1, noise), rtol=1e-4, atol=1e-4)


def test_the_last_ddim_step_with_the_true_noise_gives_the_image():
    diffusion, x, noise = create_diffusion(20), draw(2, 4, 4, 4), draw(2, 4, 4, 4, seed=1)
    output = torch.cat([noise, torch.zeros_like(noise)], dim=1)
    torch.testing.assert_close(diffusion.ddim_step(output, diffusion.q_sample(x, 0, noise), 0), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factor, highest", [(0.9, 1.0), (0.9, 0.5), (1.1, 0.0)])
def test_scaled_noise_is_what_a_model_with_less_noise_would_predict_up_to_that_time(factor, highest):
    """The DDIM step written out in float64, with alphas from the betas; both steps equal those of a scaled output."""
    diffusion, plain = create_diffusion(20, noise_scale=(factor, highest)), create_diffusion(20)
    alphas = np.append(1.0, np.cumprod(1 - plain.betas))
    x, output, noise = draw(2, 4, 2, 2), draw(2, 8, 2, 2, seed=1), draw(2, 4, 2, 2, seed=2)
    for i in (0, 9, 10, 19):  # timesteps 0, 473, 526, 999
        used = factor if plain.timestep_map[i] / 1000 <= highest else 1
        predicted = used * output[:, :4].double()
        start = (x.double() - (1 - alphas[i + 1]) ** 0.5 * predicted) / alphas[i + 1] ** 0.5
        expected = alphas[i] ** 0.5 * start + (1 - alphas[i]) ** 0.5 * predicted
        torch.testing.assert_close(diffusion.ddim_step(output, x, i).double(), expected, rtol=1e-4, atol=1e-5)
        scaled = torch.cat([predicted.float(), output[:, 4:]], dim=1)
        expected = plain.ancestral_step(scaled, x, i, noise)
        torch.testing.assert_close(diffusion.ancestral_step(output, x, i, noise), expected)


def test_ddim_with_eta_one_has_the_variance_of_the_posterior():
    diffusion, n, i = create_diffusion(20), 200000, 10
    x = torch.zeros(n, 1)
    output = torch.zeros(n, 2)
    out = diffusion.ddim_step(output, x, i, eta=1.0, noise=draw(n, 1))
    cumulative = np.cumprod(1 - diffusion.betas)
    posterior = diffusion.betas[i] * (1 - cumulative[i - 1]) / (1 - cumulative[i])
    assert out.var().item() == pytest.approx(posterior, rel=0.02)


def test_an_ancestral_step_is_the_product_of_the_two_gaussians():
    """The posterior q(x[i-1] | x[i], x0) as the normalised product of q(x[i] | x[i-1]) and q(x[i-1] | x0)."""
    diffusion, i = create_diffusion(20), 9
    x_start, x = 0.7, -0.4
    beta, previous = diffusion.betas[i], np.cumprod(1 - diffusion.betas)[i - 1]
    precision = (1 - beta) / beta + 1 / (1 - previous)
    mean = (np.sqrt(1 - beta) * x / beta + np.sqrt(previous) * x_start / (1 - previous)) / precision
    cumulative = np.cumprod(1 - diffusion.betas)[i]
    noise = (x - np.sqrt(cumulative) * x_start) / np.sqrt(1 - cumulative)
    one = torch.ones(1, 1, 1, 1)
    for value, variance in ((-1.0, 1 / precision), (1.0, beta)):  # the two ends of the learned range
        output = torch.cat([one * noise, one * value], dim=1)
        step = [diffusion.ancestral_step(output, one * x, i, one * k).item() for k in (0, 1)]
        assert step[0] == pytest.approx(mean, rel=1e-5)
        assert (step[1] - step[0]) ** 2 == pytest.approx(variance, rel=1e-4)


def test_the_last_ancestral_step_adds_no_noise():
    diffusion, x, output = create_diffusion(20), draw(1, 4, 2, 2), draw(1, 8, 2, 2, seed=1)
    steps = [diffusion.ancestral_step(output, x, 0, noise) for noise in (torch.zeros_like(x), torch.ones_like(x))]
    assert torch.equal(*steps)


def test_the_variational_term_is_the_divergence_of_the_two_posteriors():
    diffusion, i = create_diffusion(), 400
    x_start, noise, output = draw(2, 4, 3, 3), draw(2, 4, 3, 3, seed=1), draw(2, 8, 3, 3, seed=2)
    steps = torch.full((2,), i)
    x = diffusion.q_sample(x_start, steps, noise)
    mse, bits = diffusion.pretraining_loss(output, x_start, x, steps, noise)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    true = torch.cat([noise, zero - 1], dim=1)
    mean, std = (diffusion.ancestral_step(true, x, i, zero), diffusion.ancestral_step(true, x, i, one))
    model, model_std = (diffusion.ancestral_step(output, x, i, zero), diffusion.ancestral_step(output, x, i, one))
    expected = kl_divergence(Normal(mean, std - mean), Normal(model, model_std - model)).flatten(1).mean(1) / np.log(2)
    torch.testing.assert_close(bits, expected, rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(mse, (output[:, :4] - noise).square().flatten(1).mean(1))


def test_the_variational_term_teaches_the_variance_alone():
    diffusion, steps = create_diffusion(), torch.tensor([0, 400])
    x_start, noise = draw(2, 4, 3, 3), draw(2, 4, 3, 3, seed=1)
    output = draw(2, 8, 3, 3, seed=2).requires_grad_()
    _, bits = diffusion.pretraining_loss(output, x_start, diffusion.q_sample(x_start, steps, noise), steps, noise)
    bits.sum().backward()
    assert not output.grad[:, :4].any()
    assert output.grad[:, 4:].all()


def test_loops_pass_python_ints_from_the_last_step_to_0():
    diffusion, seen = create_diffusion(5), []

    def denoise(x, i):
        seen.append((type(i), i))
        return torch.cat([x, x], dim=1)

    for loop in (diffusion.ddim_loop, diffusion.ancestral_loop):
        loop(denoise, draw(1, 4, 2, 2))
    assert seen == [(int, i) for i in (4, 3, 2, 1, 0)] * 2
