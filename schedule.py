"""`Schedule`: the plan of which layer runs at which step. Plain data; knows no model and no router.

Schedule.every_nth(steps=20, depth=12, interval=3).with_order(2).save("every3.json")
python sample.py --accelerate-method schedule --path every3.json ...
"""

import hashlib
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion import GaussianDiffusion
from runtime.errors import UserError
from runtime.files import atomic_write, load_tensors

ORDERS = (0, 1, 2)  # of forecasts


@dataclass(frozen=True, eq=False)
class Schedule:
    """The plan of one sampling run. Plans are equal if they run the same layers, of the same process and order.

    compute: bool [steps, depth, 2], k = 0 attention, 1 MLP: True runs the layer, False reuses its output.
             Step i counts as in `diffusion`: i = steps-1 runs first, i = 0 last.
    order:   0 reuses the last output; 1 or 2 forecast the output from the last two or three (`forecast_weights`).
    process: `name` of the process that the plan was made for; with the number of steps it determines the times.
    Raises ValueError if the shape, type or order is wrong, or the step that runs first does not run every layer: a
    later step would reuse an output that was never computed.
    """

    compute: Tensor
    order: int = 0
    process: str = GaussianDiffusion.name

    def __post_init__(self) -> None:
        if type(self.process) is not str:
            raise ValueError(f"process {self.process!r} is no text such as {GaussianDiffusion.name!r}")
        if type(self.order) is not int or self.order not in ORDERS:
            raise ValueError(f"order {self.order!r} is none of 0 (reuse), 1 and 2 (linear and quadratic forecast)")
        shape = tuple(self.compute.shape)
        if self.compute.dtype != torch.bool or len(shape) != 3 or shape[2] != 2 or 0 in shape:
            raise ValueError(f"a schedule is bool [steps, depth, 2], not {self.compute.dtype} {list(shape)}")
        if not self.compute[-1].all():
            missing = int((~self.compute[-1]).sum())
            raise ValueError(
                f"step {shape[0] - 1} runs first and must run every layer: {missing} of {2 * shape[1]} would reuse an "
                "output that no step computed"
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schedule):
            return NotImplemented
        same = (self.order, self.process) == (other.order, other.process)
        return same and torch.equal(self.compute, other.compute)

    def __hash__(self) -> int:
        return hash((self.sha256(), self.process))

    @classmethod
    def full(cls, steps: int, depth: int) -> "Schedule":
        """Run every layer at every step."""
        return cls(torch.ones(steps, depth, 2, dtype=torch.bool))

    @classmethod
    def every_nth(cls, steps: int, depth: int, interval: int) -> "Schedule":
        """Run every layer at every `interval`-th step, beginning with the first that runs, and none in between.

        Raises ValueError if the interval is below 1, TypeError if it is no whole number.
        Source: Selvaraju et al. 2024, arXiv:2407.01425 (FORA).
        """
        try:
            interval = operator.index(interval)
        except TypeError:
            raise TypeError(f"interval {interval!r} is no whole number") from None
        if interval < 1:
            raise ValueError(f"interval {interval} is below 1")
        executed = steps - 1 - torch.arange(steps)
        return cls((executed % interval == 0)[:, None, None].repeat(1, depth, 2))

    @classmethod
    def random_layers(cls, steps: int, depth: int, where: Sequence[int], reused: int, seed: int) -> "Schedule":
        """Reuse `reused` random layer calls, spread evenly (+-1) over the steps i in `where`.

        All other steps run every layer. seed: of the choice; within a step all layers are equally likely.
        Raises ValueError if `reused` is more than all layer calls of the steps in `where`.
        """
        random = np.random.default_rng(seed)
        counts = _spread(reused, len(where), depth)
        return cls._reusing(steps, depth, {i: random.permutation(2 * depth)[:count] for i, count in zip(where, counts)})

    @classmethod
    def first_blocks(cls, steps: int, depth: int, where: Sequence[int], reused: int) -> "Schedule":
        """Reuse `reused` layer calls in the first blocks, spread evenly (+-1 block) over the steps i in `where`.

        A block reuses attention and MLP together; if `reused` is odd, one step reuses one more attention alone.
        All other steps run every layer. Raises ValueError as `random_layers`.
        """
        counts = _spread(reused, len(where), depth, unit=2)
        return cls._reusing(steps, depth, {i: np.arange(count) for i, count in zip(where, counts)})

    @classmethod
    def last_blocks(cls, steps: int, depth: int, where: Sequence[int], reused: int) -> "Schedule":
        """As `first_blocks`, but in the last blocks; if `reused` is odd, one step reuses one more MLP alone."""
        counts = _spread(reused, len(where), depth, unit=2)
        return cls._reusing(steps, depth, {i: 2 * depth - 1 - np.arange(count) for i, count in zip(where, counts)})

    @classmethod
    def by_change(cls, changes: Tensor, depth: int, alpha: float) -> "Schedule":
        """Reuse attention, or the MLP, of all blocks while it has changed by less than `alpha` since it ran.

        changes: [steps, most, 2]: [i, a-1, k] is the relative change of layer k's output from step i + a to step i, as
        `training.smoothcache.layer_changes` measures it. A layer is reused at most `most` steps in a row.
        Raises ValueError if alpha is not above 0. Source: Liu et al. 2024, arXiv:2411.10510 (SmoothCache).
        """
        if not alpha > 0:
            raise ValueError(f"alpha {alpha} is not above 0")
        steps, most, _ = changes.shape
        compute = torch.ones(steps, depth, 2, dtype=torch.bool)
        for k in (0, 1):
            ran = steps - 1  # the last step that runs the layer
            for i in range(steps - 2, -1, -1):
                if ran - i <= most and changes[i, ran - i - 1, k] < alpha:
                    compute[i, :, k] = False
                else:
                    ran = i
        return cls(compute)

    @classmethod
    def _reusing(cls, steps: int, depth: int, layers: Mapping[int, np.ndarray]) -> "Schedule":
        """Reuse the layers `layers[i]` (counted in the order in which they run) at step i, and run all others."""
        compute = torch.ones(steps, 2 * depth, dtype=torch.bool)
        for i, reused in layers.items():
            compute[i, torch.as_tensor(reused)] = False
        return cls(compute.reshape(steps, depth, 2))

    def with_order(self, order: int) -> "Schedule":
        """The same plan with forecasts of this order. Raises ValueError if there is no such order."""
        return replace(self, order=order)

    def with_steps(self, steps: int) -> "Schedule":
        """This plan for a sampler of another number of steps: a layer runs at the timesteps nearest to those of before.

        With fewer steps it runs about as often as before, so the speed-up is lower: begin with a faster plan. Samplers
        spread their timesteps evenly (`create_diffusion`). Raises ValueError if `steps` is below 2.
        """
        if steps < 2:
            raise ValueError(f"{steps} steps have no nearest ones: pass at least 2")
        compute = torch.zeros(steps, self.depth, 2, dtype=torch.bool)
        for i, row in enumerate(self.compute):
            compute[round(i * (steps - 1) / max(1, self.steps - 1))] |= row
        return replace(self, compute=compute)

    def sha256(self) -> str:
        """SHA-256 of `compute`, one byte per layer, and of the order if it is not 0, as hex digits.

        Not of the process: the digest says what is computed.
        """
        digest = hashlib.sha256(self.compute.contiguous().numpy().tobytes())
        if self.order:
            digest.update(f"order {self.order}".encode())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write a schedule file, as JSON, atomically; a name in .pt gives a file of torch instead.

        "steps", "depth" and "order", "process" unless it is "diffusion", and "rows": a text per step, the step that
        runs first comes first. It has a pair of digits per block, for attention and MLP: 1 runs the layer, 0 reuses or
        forecasts it. A text "1" or "0" alone is for all layers.
        """
        path, process = Path(path), {"process": self.process} if self.process != GaussianDiffusion.name else {}
        if path.suffix == ".pt":
            saved = {"compute": self.compute} | ({"order": self.order} if self.order else {}) | process
            with atomic_write(path) as part, part.open("wb") as file:  # opened here for the reason in `Router.save`
                return torch.save(saved, file)
        rows = [" ".join(f"{a:d}{m:d}" for a, m in row) for row in self.compute.flip(0).tolist()]
        short = {" ".join([digit * 2] * self.depth): digit for digit in "01"}
        content: dict[str, Any] = {"steps": self.steps, "depth": self.depth, "order": self.order, **process}
        content |= {"rows": [short.get(row, row) for row in rows]}
        with atomic_write(path) as part:
            part.write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path, depth: int | None = None) -> "Schedule":
        """Load a schedule file without running code in it: JSON, or a .pt of earlier versions.

        The JSON of SmoothCache ({"attn": [1, 0, ...], "mlp": [...]}) decides alike for all blocks: depth is their
        number. Raises UserError if the file is missing or no schedule file.
        """
        path = Path(path)
        try:
            content = path.read_bytes()
            if path.suffix == ".json" or content.lstrip()[:1] in (b"{", b"["):
                return cls._from_json(json.loads(content), depth)
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{path} is not a schedule file: {error}") from error
        except OSError:
            pass  # the next line reports it
        saved = load_tensors(path)
        compute = saved.get("compute") if isinstance(saved, dict) else None
        if not isinstance(compute, torch.Tensor):
            raise UserError(
                f'{path} is not a schedule file: it has no tensor "compute"; Schedule.save writes JSON, and a router '
                "is a file for --accelerate-method dynamiclayer"
            )
        try:
            return cls(compute, saved.get("order", 0), saved.get("process", GaussianDiffusion.name))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is not a schedule file: {error}") from error

    @classmethod
    def _from_json(cls, content: Any, depth: int | None) -> "Schedule":
        """The schedule in the content of a JSON file. Raises ValueError or TypeError if there is none."""
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        if {"attn", "mlp"} & content.keys():  # SmoothCache
            if depth is None:
                raise ValueError("SmoothCache's files do not hold the number of blocks")
            columns = [content.get("attn") or [], content.get("mlp") or []]
            if not all(isinstance(c, list) and {*map(repr, c)} <= {"0", "1"} for c in columns):
                raise ValueError('"attn" and "mlp" must be lists of 1 (compute) and 0 (reuse)')
            if len(columns[0]) != len(columns[1]) or not columns[0]:
                raise ValueError(f'"attn" has {len(columns[0])} steps and "mlp" has {len(columns[1])}')
            decisions = torch.tensor(columns, dtype=torch.bool).T  # (steps, 2), in the order in which they run
            return cls(decisions.flip(0)[:, None].repeat(1, depth, 1))
        unknown = sorted(content.keys() - {"steps", "depth", "order", "process", "rows"})
        missing = sorted({"steps", "depth", "rows"} - content.keys())
        if unknown or missing:
            raise ValueError(
                f"its keys are steps, depth, order, process and rows; {'missing' if missing else 'unknown'}: "
                f"{', '.join(missing or unknown)}"
            )
        steps, depth, order = content["steps"], content["depth"], content.get("order", 0)
        for name, value in (("steps", steps), ("depth", depth)):
            if type(value) is not int or not 1 <= value <= 1000:
                raise ValueError(f"{name} is {value!r} and no whole number from 1 to 1000")
        texts = content["rows"]
        if not isinstance(texts, list) or len(texts) != steps:
            raise ValueError(f"it has {len(texts) if isinstance(texts, list) else 'no'} rows for {steps} steps")
        rows = []
        for number, text in enumerate(texts):
            digits = "".join(text.split()) if isinstance(text, str) else ""
            digits = digits * 2 * depth if digits in ("0", "1") else digits
            if len(digits) != 2 * depth or set(digits) - {"0", "1"}:
                raise ValueError(
                    f"row {number + 1} is {text!r}: 1, 0, or {2 * depth} digits 1 and 0 are needed, a pair for each of "
                    f"{depth} blocks"
                )
            rows.append([digit == "1" for digit in digits])
        compute = torch.tensor(rows).reshape(steps, depth, 2).flip(0)
        return cls(compute, order, content.get("process", GaussianDiffusion.name))

    def check_fits(self, path: str | Path, steps: int, depth: int, process: str = GaussianDiffusion.name) -> None:
        """Raises UserError if this schedule, loaded from `path`, is not for `steps` steps and `depth` blocks.

        process: `name` of the process that it must be made for, too.
        """
        if self.process != process:
            raise UserError(
                f"{path} was made for the process {self.process} and the sampler runs {process}, with other times: "
                "pass a file made for it"
            )
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
        """Per step and block [attention, MLP] for `models.apply_layer`: True, and False or the weights of the forecast.

        They are Python values, so that the loop reads nothing from a device.
        """
        rows = self.compute.tolist()
        if not self.order:
            return rows
        for l in range(self.depth):
            for k in (0, 1):
                computed: list[int] = []  # the last steps that ran this layer, newest first
                for i in range(self.steps - 1, -1, -1):
                    if rows[i][l][k]:
                        computed = [i, *computed[: self.order]]
                    else:
                        weights = forecast_weights(tuple(step - i for step in computed))
                        rows[i][l][k] = weights + (0.0,) * (self.order + 1 - len(weights))
        return rows

    def oldest_reads(self) -> list[int]:
        """Per step the earliest step whose output a layer reuses there; the step itself if all layers run."""
        oldest = list(range(self.steps))
        for layer in self.compute.flatten(1).T.tolist():
            computed: list[int] = []  # as in `rows`
            for i in range(self.steps - 1, -1, -1):
                if layer[i]:
                    computed = [i, *computed[: self.order]]
                else:
                    oldest[i] = max(oldest[i], computed[-1])
        return oldest

    def distinct_rows(self) -> int:
        """Number of different rows."""
        return len(self.compute.flatten(1).unique(dim=0))

    def cached_share(self) -> float:
        """Share of all layer calls that reuse an output, in [0, 1)."""
        return 1 - self.compute.float().mean().item()

    def multiply_adds(self, costs: Mapping[str, Any]) -> Tensor:
        """Multiply-adds of each step, int64 [steps], for `costs` as `DiT.multiply_adds` returns them."""
        return costs["fixed"] + (self.compute * torch.tensor(costs["layer"])).sum(dim=(1, 2))

    def speedup_bound(self, costs: Mapping[str, Any]) -> float:
        """Multiply-adds of the full run divided by those of this schedule: the speed-up if time followed them."""
        full = Schedule.full(self.steps, self.depth)
        return full.multiply_adds(costs).sum().item() / self.multiply_adds(costs).sum().item()

    def describe(self, costs: Mapping[str, Any]) -> str:
        """A table to print: a line per distinct row with its layers and multiply-adds, then cached share and bound."""
        cost, steps_by_row = self.multiply_adds(costs), dict[tuple[bool, ...], list[int]]()
        for i in range(self.steps - 1, -1, -1):
            steps_by_row.setdefault(tuple(self.compute[i].flatten().tolist()), []).append(i)
        lines = [f"{'attention':>9} {'MLP':>7} {'G multiply-adds':>16} {'of full':>8}  steps (the sampler counts down)"]
        full = cost.max().item()
        for same in steps_by_row.values():
            attention, mlp = self.compute[same[0]].sum(0).tolist()
            lines.append(
                f"{attention:>6}/{self.depth} {mlp:>4}/{self.depth} {cost[same[0]] / 1e9:>16.4g} "
                f"{cost[same[0]] / full:>8.1%}  {' '.join(map(str, same))}"
            )
        lines.append(
            f"cached {self.cached_share():.1%} of all layers, {self.distinct_rows()} distinct steps; "
            f"{cost.sum() / 1e9:.4g} of {full * self.steps / 1e9:.4g} G multiply-adds an image, so the speed-up is "
            f"at most {self.speedup_bound(costs):.3f}"
        )
        if self.order:
            lines.append(f"reused outputs are forecasts of order {self.order}, from the last {self.order + 1} computed")
        return "\n".join(lines)


@cache
def forecast_weights(ages: tuple[int, ...]) -> tuple[float, ...]:
    """Weights of the outputs computed `ages` steps ago, newest first: the value now of the polynomial through them.

    One output gives order 0, two the line, three the parabola, on any gaps. Source: Newton's interpolation in
    Lagrange's form; Liu et al. 2025, arXiv:2503.06923 (TaylorSeer), forecast with derivatives on equal gaps.
    """
    return tuple(float(prod(b / (b - a) for b in ages if b != a)) for a in ages)


def _spread(calls: int, steps: int, depth: int, unit: int = 1) -> list[int]:
    """Spread `calls` layer calls evenly over `steps` steps of 2 * depth layers: a count for each step.

    Counts are multiples of `unit`; the step with the fewest gets the remainder. Raises ValueError if they do not fit.
    """
    if not 0 <= calls <= steps * 2 * depth:
        raise ValueError(f"{calls} layers cannot be reused at {steps} steps of {2 * depth} layers")
    units = calls // unit
    counts = [unit * ((n + 1) * units // steps - n * units // steps) for n in range(steps)]
    if calls % unit:
        counts[counts.index(min(counts))] += calls % unit
    return counts
