"""`Router`: the learnable scores over a DiT's layers, and the files they are kept in.

One logit per step and layer, independent of the input; its sigmoid is the layer's score. The scores of a step
are one `Parameter`, so that the optimizer's state of a step moves only when that step was drawn.
Source: Ma et al. 2024, arXiv:2406.01733, sec. 3.
"""

import argparse
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffusion import GaussianDiffusion
from models import DiT
from runtime import released
from runtime.errors import UserError
from runtime.files import atomic_write, load_tensors
from runtime.hashes import fingerprint
from schedule import Schedule

if TYPE_CHECKING:
    from diffusion import GaussianDiffusion
    from models import DiT


class Row(nn.Module):
    """The logits of one step, float32 (2*depth,): attention 0, MLP 0, attention 1, ..."""

    def __init__(self, layers: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.prob = nn.Parameter(torch.randn(layers, generator=generator))  # the released files' name; it holds logits


class Router(nn.Module):
    """Scores in (0, 1) for every layer of a DiT of `depth` blocks at each of `steps` sampling steps.

    Logits start from a unit normal, as in the released files, drawn from `generator`.
    """

    LIMIT = 5.0  # of a logit in training: the sigmoid still has a gradient there

    def __init__(self, steps: int, depth: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.steps, self.depth = steps, depth
        self.routers = nn.ModuleList(Row(2 * depth, generator) for _ in range(steps))

    def forward(self, i: int) -> Tensor:
        """The scores of step i, float32 [depth, 2], with their gradient."""
        return torch.sigmoid(self.get_parameter(f"routers.{i}.prob")).reshape(self.depth, 2)

    @torch.no_grad()
    def scores(self) -> Tensor:
        """The scores of all steps, float32 [steps, depth, 2] on the CPU; only those of trained steps mean anything."""
        return torch.stack([self(i) for i in range(self.steps)]).cpu()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Logits back into [-LIMIT, LIMIT]."""
        for logits in self.parameters():
            logits.clamp_(-self.LIMIT, self.LIMIT)

    @staticmethod
    def trained_steps(steps: int) -> range:
        """The steps i that a router of `steps` decides: the even ones that follow an odd one.

        Steps go in pairs from i = steps-1 down; with an odd count the first one executed stays alone, in full.
        """
        return range(0, steps - 1, 2)

    @torch.no_grad()
    def schedule(self, threshold: float) -> Schedule:
        """The `Schedule` in which a layer of a trained step runs where its score > threshold; other steps are full.

        Raises ValueError where the threshold is outside [0, 1].
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold {threshold} is outside [0, 1]")
        compute = torch.ones(self.steps, self.depth, 2, dtype=torch.bool)
        trained = list(self.trained_steps(self.steps))
        compute[trained] = self.scores()[trained] > threshold
        return Schedule(compute)

    def state(self) -> OrderedDict[str, Tensor]:
        """The layout of router files: {"0.prob": float32 (2*depth,), "1.prob": ...}."""
        return OrderedDict((name, row.detach().cpu().clone()) for name, row in self.routers.named_parameters())

    def save(self, path: str | Path, **extra: Any) -> None:
        """Writes a router file whole or not at all; `extra` ("opt", "args") must be tensors and plain types."""
        # Through a file of Python's: of a full disk torch's own writer says nothing that could be told from a bug.
        with atomic_write(path) as part, part.open("wb") as file:
            torch.save({"routers": self.state(), **extra}, file)

    @classmethod
    def load(cls, path: str | Path) -> "Router":
        """Reads a router file, ours or a released one, without running what is in it, onto the CPU.

        Raises UserError where the file is missing, cut off, or holds something else.
        """
        # The released files carry the Namespace of their flags.
        saved = load_tensors(path, allow=[argparse.Namespace])
        return cls.from_state(path, saved.get("routers") if isinstance(saved, dict) else None)

    @classmethod
    def from_state(cls, path: str | Path, rows: Any) -> "Router":
        """The router of `rows`, found in the file at `path` and laid out as in `state`. Raises UserError as `load`."""
        if not isinstance(rows, dict) or not rows:
            raise UserError(f'{path} is not a router file: it has no "routers"; train_router.py writes them')
        steps = len(rows)
        names = {f"{i}.prob" for i in range(steps)}
        plain = all(isinstance(row, torch.Tensor) and row.is_floating_point() for row in rows.values())
        sizes = {tuple(row.shape) for row in rows.values()} if plain else {None}
        size = sizes.pop()
        if set(rows) != names or sizes or size is None or len(size) != 1 or size[0] % 2 or not size[0]:
            raise UserError(
                f'{path} is not a router file: "routers" must be 0.prob to {steps - 1}.prob of one even length'
            )
        rows = {name: row.float() for name, row in rows.items()}
        if not all(row.isfinite().all() for row in rows.values()):
            raise UserError(f"{path} holds logits that are not finite: it is damaged, train or fetch it again")
        router = cls(steps, size[0] // 2)
        router.routers.load_state_dict(rows)
        return router

    def check_fits(self, path: str | Path, steps: int, depth: int) -> None:
        """Raises UserError where this router, read from `path`, is not one for `steps` steps and `depth` blocks."""
        Schedule.full(self.steps, self.depth).check_fits(path, steps, depth)


def router_loss(
    dit: "DiT",
    diffusion: "GaussianDiffusion",
    scores: Tensor,
    i: int,
    x_start: Tensor,
    y: Tensor,
    noise: Tensor,
    threshold: float | None = None,
) -> Tensor:
    """How far the blended model is from the plain one at step i-1, per image: float32 (N,).

    scores: [depth, 2] of step i-1, the only thing that gets a gradient; i: odd step, an int.
    x_start (N, C, H, W) clean latents, y (N,) labels with the null class where they were dropped, noise like x_start.
    threshold: None blends by the scores; a number hardens them in the forward pass (straight-through).
    The model at step i fills the cache and takes one DDIM step; there the plain model teaches the one in which each
    layer's output is score * fresh + (1 - score) * cached.
    Raises ValueError where i is no odd step of the diffusion.
    Source: Ma et al. 2024, sec. 3.3; the mean runs over all 2C output channels.
    """
    if not (i % 2 and 0 < i < diffusion.steps):
        raise ValueError(f"router training starts from odd steps below {diffusion.steps}, not from {i}")
    before, at = diffusion.timesteps(y.device)[i - 1 : i + 1, None].expand(-1, len(y))
    cache = dit.empty_cache()
    with torch.no_grad():
        x = diffusion.q_sample(x_start, i, noise)
        x = diffusion.ddim_step(dit(x, at, y, cache=cache), x, i)
        teacher = dit(x, before, y)
    if threshold is not None:
        # The parenthesis is exactly 0: hard values forward, the gradient of the scores backward.
        scores = (scores > threshold).float() + (scores - scores.detach())
    student = dit(x, before, y, [row.unbind() for row in scores.unbind()], cache)
    return (teacher - student).square().flatten(1).mean(1)


def load_schedule(method: str | None, path: str | None, threshold: float) -> tuple[Schedule | None, dict[str, Any]]:
    """The `Schedule` of the file at `path`, or None, and what a manifest says of it: JSON types, None what is not used.

    method: "dynamiclayer" for a router file, used at `threshold`, "schedule" for a schedule file, None for neither.
    Raises UserError where the file is missing, damaged, or another one.
    """
    described = dict.fromkeys(("router", "threshold", "schedule"))
    if method is None:
        return None, described
    path = released.find(path)
    if method == "schedule":
        schedule = Schedule.load(path)
        return schedule, described | {"schedule": schedule.sha256()}
    router = Router.load(path)
    return router.schedule(threshold), described | {"router": fingerprint(router, {}), "threshold": threshold}
