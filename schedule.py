"""`Schedule`: which layer runs at which step. Plain data; knows no model and no router."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Schedule:
    """The plan of one sampling run.

    compute: bool [steps, depth, 2], k = 0 attention, 1 MLP: True runs the layer, False reuses its last output.
             The index i counts as in `diffusion`: i = steps-1 runs first, i = 0 last.
    Raises ValueError where the shape or type is another, or the first executed step does not run every layer,
    since then an output would be reused before it was computed.
    """

    compute: torch.Tensor

    def __post_init__(self):
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
    def full(cls, steps, depth):
        """Every layer at every step."""
        return cls(torch.ones(steps, depth, 2, dtype=torch.bool))

    @property
    def steps(self):
        return len(self.compute)

    @property
    def depth(self):
        return self.compute.shape[1]

    def rows(self):
        """Per step, per block, (attention, MLP) as Python bools: a loop hands them down without a device read."""
        return self.compute.tolist()

    def distinct_rows(self):
        """How many different steps there are: as many graphs as a compiler of whole steps needs."""
        return len(self.compute.flatten(1).unique(dim=0))

    def cached_share(self):
        """The share of all layer calls that reuse an output, in [0, 1)."""
        return 1 - self.compute.float().mean().item()

    def multiply_adds(self, costs):
        """Multiply-adds of each step, int64 [steps], for `costs` as `DiT.multiply_adds` returns them."""
        return costs["fixed"] + (self.compute * torch.tensor(costs["layer"])).sum(dim=(1, 2))

    def speedup_bound(self, costs):
        """By how much fewer multiply-adds could at most shorten a run, against running everything."""
        full = Schedule.full(self.steps, self.depth)
        return full.multiply_adds(costs).sum().item() / self.multiply_adds(costs).sum().item()
