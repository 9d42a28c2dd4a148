"""`Schedule`: which layer runs at which step. Plain data; knows no model and no router.

Schedule.every_nth(steps=20, depth=12, interval=2).save("fora2.pt")   # then --accelerate-method schedule --path
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.errors import UserError
from runtime.files import atomic_write, load_tensors


@dataclass(frozen=True)
class Schedule:
    """The plan of one sampling run.

    compute: bool [steps, depth, 2], k = 0 attention, 1 MLP: True runs the layer, False reuses its last output.
             The index i counts as in `diffusion`: i = steps-1 runs first, i = 0 last.
    Raises ValueError where the shape or type is another, or the first executed step does not run every layer,
    since then an output would be reused before it was computed.
    """

    compute: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.compute.shape)
        if self.compute.dtype != torch.bool or len(shape) != 3 or shape[2] != 2 or 0 in shape:
            raise ValueError(f"a schedule is bool [steps, depth, 2], not {self.compute.dtype} {list(shape)}")
        if not self.compute[-1].all():
            missing = int((~self.compute[-1]).sum())
            raise ValueError(
                f"step {shape[0] - 1} is executed first and must run every layer: {missing} of {2 * shape[1]} would "
                "reuse what no step computed"
            )

    @classmethod
    def full(cls, steps: int, depth: int) -> "Schedule":
        """Every layer at every step."""
        return cls(torch.ones(steps, depth, 2, dtype=torch.bool))

    @classmethod
    def every_nth(cls, steps: int, depth: int, interval: int) -> "Schedule":
        """Every `interval`-th executed step runs every layer, from the first one on; those between reuse every layer.

        The share reused follows from the interval: 1 - 1/interval where it divides `steps`.
        Raises ValueError where the interval is below 1. Source: Selvaraju et al. 2024, arXiv:2407.01425 (FORA).
        """
        if interval < 1:
            raise ValueError(f"interval {interval} is below 1")
        executed = steps - 1 - torch.arange(steps)
        return cls((executed % interval == 0)[:, None, None].repeat(1, depth, 2))

    @classmethod
    def random_layers(cls, steps: int, depth: int, where: Sequence[int], reused: int, seed: int) -> "Schedule":
        """`reused` layer calls, drawn from `seed`, reuse: as many in each step of `where` as in the next, or one more.

        Steps outside `where` (of steps i) run every layer. Within a step all layers are equally likely.
        Raises ValueError where the steps of `where` have fewer layers.
        """
        random = np.random.default_rng(seed)
        counts = _spread(reused, len(where), depth)
        return cls._reusing(steps, depth, {i: random.permutation(2 * depth)[:count] for i, count in zip(where, counts)})

    @classmethod
    def first_blocks(cls, steps: int, depth: int, where: Sequence[int], reused: int) -> "Schedule":
        """`reused` layer calls reuse, those of the first blocks: as many blocks in each step of `where`, or one more.

        A block reuses attention and MLP together; of an odd number of calls, the last is one attention alone.
        Steps outside `where` (of steps i) run every layer. Raises ValueError as `random_layers`.
        """
        counts = _spread(reused, len(where), depth, unit=2)
        return cls._reusing(steps, depth, {i: np.arange(count) for i, count in zip(where, counts)})

    @classmethod
    def last_blocks(cls, steps: int, depth: int, where: Sequence[int], reused: int) -> "Schedule":
        """As `first_blocks`, from the end: the last blocks, and of an odd number of calls one MLP alone."""
        counts = _spread(reused, len(where), depth, unit=2)
        return cls._reusing(steps, depth, {i: 2 * depth - 1 - np.arange(count) for i, count in zip(where, counts)})

    @classmethod
    def _reusing(cls, steps: int, depth: int, layers: Mapping[int, np.ndarray]) -> "Schedule":
        """At step i the `layers[i]` reuse, counted in the order in which they run; everything else runs."""
        compute = torch.ones(steps, 2 * depth, dtype=torch.bool)
        for i, some in layers.items():
            compute[i, torch.as_tensor(some)] = False
        return cls(compute.reshape(steps, depth, 2))

    def sha256(self) -> str:
        """The SHA-256 of what runs, as text: of a byte a layer, in the order of `compute`."""
        return hashlib.sha256(self.compute.contiguous().numpy().tobytes()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Writes a schedule file, {"compute": bool [steps, depth, 2]}, whole or not at all."""
        with atomic_write(path) as part, part.open("wb") as file:  # as in `Router.save`
            torch.save({"compute": self.compute}, file)

    @classmethod
    def load(cls, path: str | Path) -> "Schedule":
        """Reads a schedule file without running what is in it. Raises UserError where it is missing or another file."""
        saved = load_tensors(path)
        compute = saved.get("compute") if isinstance(saved, dict) else None
        if not isinstance(compute, torch.Tensor):
            raise UserError(f'{path} is not a schedule file: it has no tensor "compute"; Schedule.save writes them')
        try:
            return cls(compute)
        except ValueError as error:
            raise UserError(f"{path} is not a schedule file: {error}") from error

    def check_fits(self, path: str | Path, steps: int, depth: int) -> None:
        """Raises UserError where this plan, read from `path`, is not one for `steps` steps and `depth` blocks."""
        if self.steps != steps:
            raise UserError(
                f"{path} is for {self.steps} steps, the sampler runs {steps}: "
                f"pass --num-sampling-steps {self.steps} or a file for {steps} steps"
            )
        if self.depth != depth:
            raise UserError(
                f"{path} is for {self.depth} blocks, the model has {depth}: pass a file made for this model"
            )

    @property
    def steps(self) -> int:
        return len(self.compute)

    @property
    def depth(self) -> int:
        return self.compute.shape[1]

    def rows(self) -> list:
        """Per step, per block, (attention, MLP) as Python bools: a loop hands them down without a device read."""
        return self.compute.tolist()

    def distinct_rows(self) -> int:
        """How many different steps there are: as many graphs as a compiler of whole steps needs."""
        return len(self.compute.flatten(1).unique(dim=0))

    def cached_share(self) -> float:
        """The share of all layer calls that reuse an output, in [0, 1)."""
        return 1 - self.compute.float().mean().item()

    def multiply_adds(self, costs: Mapping[str, Any]) -> Tensor:
        """Multiply-adds of each step, int64 [steps], for `costs` as `DiT.multiply_adds` returns them."""
        return costs["fixed"] + (self.compute * torch.tensor(costs["layer"])).sum(dim=(1, 2))

    def speedup_bound(self, costs: Mapping[str, Any]) -> float:
        """By how much fewer multiply-adds could at most shorten a run, against running everything."""
        full = Schedule.full(self.steps, self.depth)
        return full.multiply_adds(costs).sum().item() / self.multiply_adds(costs).sum().item()

    def describe(self, costs: Mapping[str, Any]) -> str:
        """A table of what runs: a line per kind of step with its layers and multiply-adds, then share and bound."""
        compute, work = self.compute, self.multiply_adds(costs)
        kinds: dict[tuple[bool, ...], list[int]] = {}
        for i in range(self.steps - 1, -1, -1):
            kinds.setdefault(tuple(compute[i].flatten().tolist()), []).append(i)
        lines = [f"{'attention':>9} {'MLP':>7} {'G multiply-adds':>16} {'of full':>8}  steps (the sampler counts down)"]
        full = work.max().item()
        for steps in kinds.values():
            attention, mlp = compute[steps[0]].sum(0).tolist()
            lines.append(
                f"{attention:>6}/{self.depth} {mlp:>4}/{self.depth} {work[steps[0]] / 1e9:>16.4g} "
                f"{work[steps[0]] / full:>8.1%}  {' '.join(map(str, steps))}"
            )
        lines.append(
            f"cached {self.cached_share():.1%} of all layers, {self.distinct_rows()} distinct steps; "
            f"{work.sum() / 1e9:.4g} of "
            f"{full * self.steps / 1e9:.4g} G multiply-adds an image, so the speed-up is at most "
            f"{self.speedup_bound(costs):.3f}"
        )
        return "\n".join(lines)


def _spread(layers: int, places: int, depth: int, unit: int = 1) -> list[int]:
    """`layers` in `places` parts of at most 2 * depth, ints: units of `unit` layers evenly, what is left in one part.

    Raises ValueError where they are too many.
    """
    if not 0 <= layers <= places * 2 * depth:
        raise ValueError(f"{layers} layers cannot be reused at {places} steps of {2 * depth} layers")
    units = layers // unit
    counts = [unit * ((k + 1) * units // places - k * units // places) for k in range(places)]
    if layers % unit:
        counts[counts.index(min(counts))] += layers % unit
    return counts
