"""The processes: Gaussian diffusion (DDIM, DDPM) and flow matching (Euler, Heun, SDE). Knows no model and no cache."""

from .flow import FlowMatching
from .gaussian import GaussianDiffusion, noise_factors
from .respace import linear_betas, space_timesteps


def create_diffusion(
    steps: int | str | None = "", diffusion_steps: int = 1000, noise_scale: tuple[float, float] = (1.0, 1.0)
) -> GaussianDiffusion:
    """Make the published process (linear betas, noise prediction, learned-range variance), respaced to fewer steps.

    steps: how many of the `diffusion_steps` to keep, as in `space_timesteps`; "" or None keeps all.
    noise_scale: as for `GaussianDiffusion`. Raises ValueError if there are not that many steps.
    """
    return GaussianDiffusion(linear_betas(diffusion_steps), space_timesteps(diffusion_steps, steps), noise_scale)


Process = GaussianDiffusion | FlowMatching

__all__ = [
    "FlowMatching",
    "GaussianDiffusion",
    "Process",
    "create_diffusion",
    "linear_betas",
    "noise_factors",
    "space_timesteps",
]
