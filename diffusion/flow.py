"""Flow matching on the linear path: the samplers Euler, Heun and Euler-Maruyama, and the training loss.

The path is x_t = (1 - t) x_0 + t noise, so t = 1 is noise and t = 0 is data. The network predicts the velocity
v = dx_t/dt = noise - x_0, and sees `time_scale` * t.
Index i counts the calls of the network, from n-1 (noise) down to 0, as in `GaussianDiffusion`: caches, routers and
plans see no difference. Sources: Lipman et al. 2023, arXiv:2210.02747; Ma et al. 2024, arXiv:2401.08740 (SiT).
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

Progress = Callable[[Iterable[int]], Iterable[int]]  # wraps the steps of a loop, like tqdm

SAMPLERS = ("euler", "heun", "sde")
LAST_STEP = 0.04  # length of the last step of "sde", as published


class FlowMatching:
    """A flow that is sampled with n calls of the network.

    steps: n. sampler: "euler": n uniform steps; "heun": n/2 uniform steps of two calls each, for an even n;
    "sde": Euler-Maruyama, n - 1 uniform steps from 1 to 0.04, then one to 0 without noise.
    time_scale: what t = 1 is to the network; 1 as in SiT and REPA.
    Raises ValueError if the sampler is unknown or cannot have n calls.
    """

    def __init__(self, steps: int, sampler: str = "euler", time_scale: float = 1.0) -> None:
        if sampler not in SAMPLERS or steps < 1:
            raise ValueError(f"sampler {sampler!r} with {steps} steps: choose one of {', '.join(SAMPLERS)}, and 1 step")
        if sampler == "heun" and steps % 2:
            raise ValueError(
                f"heun calls the model twice in a step, so it cannot make {steps} calls: pass an even number"
            )
        self.steps, self.sampler, self.time_scale = steps, sampler, time_scale
        self.name = f"flow-{sampler}"  # in files of plans and routers: with the number of steps it determines the times
        i = np.arange(steps)
        self.times = {  # float64 (n,), t of call i
            "euler": (i + 1) / steps,
            "heun": (i + i % 2) / steps,  # an odd call begins a step, the even one after it is at the end of the step
            "sde": np.linspace(LAST_STEP if steps > 1 else 1.0, 1.0, steps),
        }[sampler]
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    def timesteps(self, device: torch.device) -> Tensor:
        """What the network gets as time at each call: float32 (n,) on `device`, copied there once."""
        return self._copied("timesteps", self.time_scale * self.times, device)

    def _copied(self, name: str, values: np.ndarray, device: torch.device) -> Tensor:
        key = name, device
        if key not in self._on_device:
            self._on_device[key] = torch.from_numpy(values).float().to(device)
        return self._on_device[key]

    def q_sample(self, x_start: Tensor, i: int | Tensor, noise: Tensor) -> Tensor:
        """x at the time of call i (an int, or int64 (N,)) on the path from x_start (N, ...) to noise; same shape."""
        if isinstance(i, int):
            return on_path(x_start, float(self.times[i]), noise)
        return on_path(x_start, self._copied("times", self.times, x_start.device)[i], noise)

    def _length(self, i: int) -> float:
        """The change of t in the step that begins with call i: below 0."""
        return float((self.times[i - 1] if i else 0.0) - self.times[i])

    def step(self, output: Tensor, x: Tensor, i: int, noise: Tensor | None = None) -> Tensor:
        """One step from call i to call i-1: network output (N, >=C, H, W) and x (N, C, H, W) -> x (N, C, H, W).

        noise: like x; only "sde" adds it, and not in its last step. Raises ValueError if it is missing, or if call i is
        the second of a step of Heun, which needs the first too (`loop`).
        """
        v, h = output[:, : x.shape[1]], self._length(i)
        if self.sampler == "heun" and i % 2 == 0:
            raise ValueError(f"call {i} is the second of a step of Heun: use loop")
        if self.sampler != "sde":
            return x + h * v
        # dx = (v - w/2 score) dt + sqrt(w) dW with w = 2 t; t * score = -E[noise | x] = -(x + (1 - t) v)
        x = x + h * (v + x + (1 - float(self.times[i])) * v)
        if i == 0:
            return x
        if noise is None:
            raise ValueError("a step of the sde sampler adds noise: pass it")
        return x + math.sqrt(2 * float(self.times[i]) * -h) * noise

    @property
    def draws(self) -> int:
        """How often `loop` draws noise."""
        return self.steps - 1 if self.sampler == "sde" else 0

    def loop(
        self,
        denoise: Callable[[Tensor, int], Tensor],
        x: Tensor,
        randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
        progress: Progress | None = None,
    ) -> Tensor:
        """Sample from noise x (N, C, H, W); arguments as in `GaussianDiffusion.ddim_loop`.

        Source: Ma et al. 2024, sec. 2.3 and 3.4; Karras et al. 2022, arXiv:2206.00364, alg. 1 (Heun).
        """
        steps: Iterable[int] = range(self.steps - 1, -1, -1)
        begin = v = x
        for i in progress(steps) if progress else steps:
            output = denoise(x, i)
            if self.sampler == "heun" and i % 2 == 0:
                x = begin + self._length(i + 1) / 2 * (v + output[:, : x.shape[1]])
                continue
            begin, v = x, output[:, : x.shape[1]]
            x = self.step(output, x, i, randn_like(x) if self.sampler == "sde" and i else None)
        return x


def on_path(x_start: Tensor, t: float | Tensor, noise: Tensor) -> Tensor:
    """x_t = (1 - t) x_start + t noise, (N, ...); t: a float, or (N,) in [0, 1]."""
    t = t.reshape(-1, *[1] * (x_start.dim() - 1)) if isinstance(t, Tensor) else t
    return (1 - t) * x_start + t * noise


def velocity_loss(output: Tensor, x_start: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the velocity per sample, (N,): network output (N, >=C, H, W) at a point of the path."""
    return (output[:, : x_start.shape[1]] - (noise - x_start)).square().flatten(1).mean(1)
