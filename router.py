"""`Router`: learnable scores of a DiT's layers, their files, and their training loss.

There is one logit per step and layer, independent of the input; its sigmoid is the layer's score. The scores of a step
are one `Parameter`, so that the optimiser's state of a step changes only if that step was drawn.
Source: Ma et al. 2024, arXiv:2406.01733, sec. 3.
"""

import argparse
import re
from collections import OrderedDict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion import GaussianDiffusion, Process
from models import DiT
from runtime.errors import UserError
from runtime.files import atomic_write, load_tensors
from schedule import Schedule, forecast_weights

# Where others keep the rows of a router, from the outside to the inside, and what they call them.
NESTED = ("routers", "router", "state_dict", "model_state_dict", "model", "module", "routers")
ROW = re.compile(r"((?:[^.]+\.)*?)(\d+)\.(?:(?:module|_orig_mod)\.)*prob")


class Row(nn.Module):
    """The logits of one step, float32 (2*depth,): attention 0, MLP 0, attention 1, ..."""

    def __init__(self, layers: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        # Named as in the released files, although it holds logits.
        self.prob = nn.Parameter(torch.randn(layers, generator=generator))


class Router(nn.Module):
    """Scores in (0, 1) for every layer of a DiT of `depth` blocks at each of `steps` sampling steps.

    Logits start from a unit normal, as in the released files, drawn from `generator`.
    process: `name` of the process that it is for, as in `Schedule`.
    """

    LIMIT = 5.0  # largest absolute logit in training: the sigmoid still has a gradient there

    def __init__(
        self,
        steps: int,
        depth: int,
        generator: torch.Generator | None = None,
        process: str = GaussianDiffusion.name,
    ) -> None:
        super().__init__()
        self.steps, self.depth, self.process = steps, depth, process
        self.routers = nn.ModuleList(Row(2 * depth, generator) for _ in range(steps))

    def forward(self, i: int) -> Tensor:
        """The scores of step i, float32 [depth, 2], with their gradient."""
        return torch.sigmoid(self.get_parameter(f"routers.{i}.prob")).reshape(self.depth, 2)

    @torch.no_grad()
    def scores(self) -> Tensor:
        """The scores of all steps, float32 [steps, depth, 2] on the CPU; only `trained_steps` are ever used."""
        return torch.stack([self(i) for i in range(self.steps)]).cpu()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Clamp the logits into [-LIMIT, LIMIT]."""
        for logits in self.parameters():
            logits.clamp_(-self.LIMIT, self.LIMIT)

    @staticmethod
    def trained_steps(steps: int) -> range:
        """The steps i that a router for `steps` steps decides: every even i that runs right after an odd one.

        If `steps` is odd, the step that runs first has no partner before it and runs in full.
        """
        return range(0, steps - 1, 2)

    @torch.no_grad()
    def schedule(self, threshold: float) -> Schedule:
        """The `Schedule` that runs a layer of a trained step if its score > threshold, and all other steps in full.

        Raises ValueError if the threshold is outside [0, 1].
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold {threshold} is outside [0, 1]")
        compute = torch.ones(self.steps, self.depth, 2, dtype=torch.bool)
        trained = list(self.trained_steps(self.steps))
        compute[trained] = self.scores()[trained] > threshold
        return Schedule(compute, process=self.process)

    def state(self) -> OrderedDict[str, Tensor]:
        """The rows as router files hold them: {"0.prob": float32 (2*depth,), "1.prob": ...}."""
        return OrderedDict((name, row.detach().cpu().clone()) for name, row in self.routers.named_parameters())

    def save(self, path: str | Path, **extra: Any) -> None:
        """Write a router file atomically; `extra` entries ("opt", "args") must be tensors and plain types."""
        # Python opens the file, because torch's own writer does not report a full disk as an OSError.
        with atomic_write(path) as part, part.open("wb") as file:
            process = {"process": self.process} if self.process != GaussianDiffusion.name else {}
            torch.save({"routers": self.state(), **process, **extra}, file)

    @classmethod
    def load(cls, path: str | Path) -> "Router":
        """Load a router file, ours or a released one, onto the CPU without running code in it.

        The rows may be in another dict, below the names of modules: "module.0.prob", "router.routers.0.prob".
        Raises UserError if the file is missing, cut off, or no router file.
        """
        # The released files contain the Namespace of their flags.
        saved = load_tensors(path, allow=[argparse.Namespace])
        process = saved.get("process") if isinstance(saved, dict) else None
        for key in NESTED:
            if isinstance(saved, dict) and isinstance(saved.get(key), dict):
                saved = saved[key]
        rows = saved if isinstance(saved, dict) else {}
        matches = {name: ROW.fullmatch(name) for name in rows if isinstance(name, str)}
        prefixes = sorted({match[1] for match in matches.values() if match})
        if len(prefixes) > 1:
            several = " and ".join(prefix or "one without prefix" for prefix in prefixes)
            raise UserError(f"{path} holds several routers, {several}: save one of them alone")
        renamed = {name: f"{match[2]}.prob" for name, match in matches.items() if match}
        if len(set(renamed.values())) == len(renamed):  # else two rows would become one
            rows = {renamed.get(name, name): row for name, row in rows.items()}
        router = cls.from_state(path, rows if prefixes else None)
        router.process = process if isinstance(process, str) else GaussianDiffusion.name
        return router

    @classmethod
    def from_state(cls, path: str | Path, rows: Any) -> "Router":
        """Make a router from `rows`, laid out as in `state` and loaded from `path`. Raises UserError as `load`."""
        if not isinstance(rows, dict) or not rows:
            raise UserError(f'{path} is not a router file: it has no "routers"; train_router.py writes them')
        steps = len(rows)
        names = {f"{i}.prob" for i in range(steps)}
        plain = all(isinstance(row, torch.Tensor) and row.is_floating_point() for row in rows.values())
        lengths = {len(row) if row.dim() == 1 else 0 for row in rows.values()} if plain else {0}
        if set(rows) != names or len(lengths) != 1 or not (length := lengths.pop()) or length % 2:
            raise UserError(
                f'{path} is not a router file: "routers" must be 0.prob to {steps - 1}.prob of one even length'
            )
        rows = {name: row.float() for name, row in rows.items()}
        if not all(row.isfinite().all() for row in rows.values()):
            raise UserError(f"{path} holds logits that are not finite: it is damaged, train or fetch it again")
        router = cls(steps, length // 2)
        router.routers.load_state_dict(rows)
        return router


def router_loss(
    dit: DiT,
    diffusion: Process,
    scores: Tensor,
    i: int,
    x_start: Tensor,
    y: Tensor,
    noise: Tensor,
    threshold: float | None = None,
    order: int = 0,
) -> Tensor:
    """Squared error of the blended model against the plain one at step i-1, per image: float32 (N,).

    The model runs in full at step i, which fills the cache, and takes one step (DDIM or Euler) to i-1. There the plain
    model is the teacher, and the student blends each layer's output by its score (`models.apply_layer`). With forecasts
    the model starts `order` odd steps earlier, if there are so many; the student blends the forecast and the output.

    scores: [depth, 2] of step i-1; only they get a gradient. i: an odd step, an int.
    x_start, noise: clean latents and noise (N, C, H, W). y: labels (N,), some already dropped to the null class.
    threshold: None blends by the scores; a number hardens them in the forward pass (straight-through).
    order: of the forecast, as in `Schedule`. Raises ValueError if i is not an odd step of the diffusion.
    Source: Ma et al. 2024, sec. 3.3; the mean is over all 2C output channels.
    """
    if not (i % 2 and 0 < i < diffusion.steps):
        raise ValueError(f"router training starts from odd steps below {diffusion.steps}, not from {i}")
    timesteps = diffusion.timesteps(y.device)[:, None].expand(-1, len(y))
    odd = range(i, diffusion.steps, 2)[: order + 1]  # the steps that fill the cache
    cache = dit.empty_cache(order)
    with torch.no_grad():
        x = diffusion.q_sample(x_start, odd[-1], noise)
        for j in range(odd[-1], i - 1, -1):
            x = diffusion.step(dit(x, timesteps[j], y, cache=cache if j in odd else None), x, j)
        t_next = timesteps[i - 1]
        teacher = dit(x, t_next, y)
        if order:
            weights = forecast_weights(tuple(j - (i - 1) for j in odd))
            for slot in chain(*cache):
                slot.appendleft(torch.stack([weight * output for weight, output in zip(weights, slot)]).sum(0))
    if threshold is not None:
        # The second term is exactly 0: hard values forward, the gradient of the scores backward.
        scores = (scores > threshold).float() + (scores - scores.detach())
    student = dit(x, t_next, y, [row.unbind() for row in scores.unbind()], cache)
    return (teacher - student).square().flatten(1).mean(1)
