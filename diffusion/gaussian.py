"""Gaussian diffusion with noise prediction and learned-range variance: steps, loops, the pretraining loss.

Index i counts the kept steps, from n-1 (noise) down to 0; the network sees `timestep_map[i]`.
The loops call `denoise(x, i)` with a Python int, so that nobody has to read the step from a device.
Sources: Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Nichol and Dhariwal 2021 (variance, hybrid loss).
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

Progress = Callable[[Iterable[int]], Iterable[int]]  # wraps the steps of a loop, like tqdm


def noise_factors(noise_scale: tuple[float, float], times: Iterable[float]) -> list[float]:
    """The factor of the predicted noise at each of `times`. noise_scale: a factor, and the highest t it applies at."""
    factor, highest = noise_scale
    return [factor if t <= highest else 1.0 for t in times]


class GaussianDiffusion:
    """A diffusion process of n kept steps.

    betas: float64 (T,), of the original process; timestep_map: the kept timesteps in increasing order, int (n,).
    The betas of the kept steps follow from the cumulative products.
    noise_scale: as in `noise_factors`. A model's inputs while it samples differ from those of its training, so it
    predicts too much noise (Ning et al. 2023, arXiv:2308.15321).
    """

    name = "diffusion"  # in files of plans and routers, which have this name if they have none
    draws = 0  # of noise in `loop`

    def __init__(
        self, betas: np.ndarray, timestep_map: np.ndarray, noise_scale: tuple[float, float] = (1.0, 1.0)
    ) -> None:
        self.timestep_map = np.asarray(timestep_map)
        self.times = self.timestep_map / len(betas)  # t of each step: 0 is data, nearly 1 is noise
        self._noise_factors = noise_factors(noise_scale, self.times)
        alphas_cumprod = np.cumprod(1.0 - np.asarray(betas, dtype=np.float64))[self.timestep_map]
        previous = np.append(1.0, alphas_cumprod[:-1])
        self.betas = betas = 1.0 - alphas_cumprod / previous
        self.steps = len(betas)
        posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
        # The variance of the last step is 0, so its logarithm is that of the step before, as published.
        clipped = np.append(posterior_variance[1:2] if self.steps > 1 else betas, posterior_variance[1:])
        self._tables = {
            "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alphas_cumprod),
            "sqrt_recip_alphas_cumprod": np.sqrt(1 / alphas_cumprod),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / alphas_cumprod - 1),
            "alphas_cumprod": alphas_cumprod,
            "alphas_cumprod_prev": previous,
            "posterior_mean_coef_start": betas * np.sqrt(previous) / (1 - alphas_cumprod),
            "posterior_mean_coef_x": (1 - previous) * np.sqrt(1 - betas) / (1 - alphas_cumprod),
            "posterior_log_variance": np.log(clipped),
            "log_betas": np.log(betas),
        }
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    def _at(self, name: str, i: int | Tensor, like: Tensor) -> float | Tensor:
        """Coefficient `name` at step i: a float if i is an int, float32 (N, 1, 1, ...) if i is a tensor (N,).

        A kernel takes a float as an argument, so a loop over ints copies nothing to the device.
        """
        if isinstance(i, int):
            return float(self._tables[name][i])
        key = name, like.device
        if key not in self._on_device:
            self._on_device[key] = torch.from_numpy(self._tables[name]).float().to(like.device)
        return self._on_device[key][i].reshape(-1, *[1] * (like.dim() - 1))

    def timesteps(self, device: torch.device) -> Tensor:
        """`timestep_map` as a tensor on `device`, int64 (n,), copied there once."""
        key = "timestep_map", device
        if key not in self._on_device:
            self._on_device[key] = torch.from_numpy(self.timestep_map).to(device)
        return self._on_device[key]

    def q_sample(self, x_start: Tensor, i: int | Tensor, noise: Tensor) -> Tensor:
        """Noise x_start (N, ...) to step i (an int, or int64 (N,)) by the forward process; same shape."""
        return (
            self._at("sqrt_alphas_cumprod", i, x_start) * x_start
            + self._at("sqrt_one_minus_alphas_cumprod", i, x_start) * noise
        )

    def _predicted_noise(self, output: Tensor, x: Tensor, i: int) -> Tensor:
        """The noise (N, C, H, W) in a model output (N, >=C, H, W), scaled; x (N, C, H, W)."""
        noise, factor = output[:, : x.shape[1]], self._noise_factors[i]
        return noise if factor == 1 else noise * factor

    def _predict_start(self, x: Tensor, i: int | Tensor, noise: Tensor) -> Tensor:
        return self._at("sqrt_recip_alphas_cumprod", i, x) * x - self._at("sqrt_recipm1_alphas_cumprod", i, x) * noise

    def _posterior(self, x_start: Tensor, x: Tensor, i: int | Tensor) -> tuple[Tensor, float | Tensor]:
        mean = self._at("posterior_mean_coef_start", i, x) * x_start + self._at("posterior_mean_coef_x", i, x) * x
        return mean, self._at("posterior_log_variance", i, x)

    def _model_log_variance(self, output: Tensor, i: int | Tensor) -> Tensor:
        """Log variance (N, C, H, W): the model's output interpolates between the posterior's and that of beta."""
        fraction = (output + 1) / 2
        return fraction * self._at("log_betas", i, output) + (1 - fraction) * self._at(
            "posterior_log_variance", i, output
        )

    def ddim_step(self, output: Tensor, x: Tensor, i: int, eta: float = 0.0, noise: Tensor | None = None) -> Tensor:
        """One DDIM step from i to i-1: model output (N, 2C, H, W) and x (N, C, H, W) -> x (N, C, H, W).

        noise: like x. Raises ValueError if it is missing and eta > 0. Source: Song et al. 2021, eq. 12.
        """
        predicted = self._predicted_noise(output, x, i)
        start = self._predict_start(x, i, predicted)
        alpha, previous = self._tables["alphas_cumprod"][i], self._tables["alphas_cumprod_prev"][i]
        sigma = eta * math.sqrt((1 - previous) / (1 - alpha) * (1 - alpha / previous))
        x = math.sqrt(previous) * start + math.sqrt(1 - previous - sigma**2) * predicted
        if sigma > 0:
            if noise is None:
                raise ValueError(f"a DDIM step with eta {eta} adds noise: pass it")
            x = x + sigma * noise
        return x

    def ancestral_step(self, output: Tensor, x: Tensor, i: int, noise: Tensor) -> Tensor:
        """One DDPM step from i to i-1 with learned variance: model output (N, 2C, H, W), x (N, C, H, W) -> x.

        noise: like x, not used at i = 0. Source: Ho et al. 2020, alg. 2; Nichol and Dhariwal 2021, eq. 15.
        """
        predicted, variance = self._predicted_noise(output, x, i), output.chunk(2, dim=1)[1]
        mean, _ = self._posterior(self._predict_start(x, i, predicted), x, i)
        return mean + torch.exp(0.5 * self._model_log_variance(variance, i)) * noise if i > 0 else mean

    def ddim_loop(
        self,
        denoise: Callable[[Tensor, int], Tensor],
        x: Tensor,
        eta: float = 0.0,
        randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
        progress: Progress | None = None,
    ) -> Tensor:
        """Sample from noise x (N, C, H, W) with DDIM.

        denoise: function (x, i) -> model output (N, 2C, H, W). randn_like: draws noise like x if eta > 0.
        progress: wraps the iterable of steps (e.g. tqdm); None shows nothing.
        """
        for i in self._countdown(progress):
            noise = randn_like(x) if eta > 0 else None
            x = self.ddim_step(denoise(x, i), x, i, eta, noise)
        return x

    def ancestral_loop(
        self,
        denoise: Callable[[Tensor, int], Tensor],
        x: Tensor,
        randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
        progress: Progress | None = None,
    ) -> Tensor:
        """Sample from noise x (N, C, H, W) with DDPM; arguments as in `ddim_loop`.

        Draws noise like x at every step, also at the last, which does not use it: so do the published samples.
        """
        for i in self._countdown(progress):
            noise = randn_like(x)
            x = self.ancestral_step(denoise(x, i), x, i, noise)
        return x

    # What `FlowMatching` has too: the sampler that adds no noise.
    step, loop = ddim_step, ddim_loop

    def _countdown(self, progress: Progress | None) -> Iterable[int]:
        steps = range(self.steps - 1, -1, -1)
        return progress(steps) if progress else steps

    def pretraining_loss(
        self, output: Tensor, x_start: Tensor, x: Tensor, i: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Hybrid loss per sample, two tensors (N,): mean squared error of the noise, and the variational term.

        output: model output (N, 2C, H, W) at x = q_sample(x_start, i, noise), i int64 (N,). The second term, in bits
        per dimension, trains only the variance. Source: Nichol and Dhariwal 2021, sec. 3.1, eq. 16.
        """
        predicted, variance = output.chunk(2, dim=1)
        mean, log_variance = self._posterior(x_start, x, i)
        model_mean, _ = self._posterior(self._predict_start(x, i, predicted.detach()), x, i)
        model_log_variance = self._model_log_variance(variance, i)
        kl = 0.5 * (
            model_log_variance
            - log_variance
            - 1
            + torch.exp(log_variance - model_log_variance)
            + (mean - model_mean) ** 2 * torch.exp(-model_log_variance)
        )
        # At i = 0 the exact likelihood of a latent, a Gaussian density, replaces the divergence.
        likelihood = 0.5 * (
            math.log(2 * math.pi) + model_log_variance + (x_start - model_mean) ** 2 * torch.exp(-model_log_variance)
        )
        is_last_step = (i == 0).reshape(-1, *[1] * (x.dim() - 1))
        bits = torch.where(is_last_step, likelihood, kl).flatten(1).mean(1) / math.log(2)
        return ((predicted - noise) ** 2).flatten(1).mean(1), bits
