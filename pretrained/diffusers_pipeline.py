"""A router, or any other `Schedule`, in a `DiTPipeline` of diffusers.

    pipe = DiTPipeline.from_pretrained("facebook/DiT-XL-2-256")
    accelerate(pipe, Router.load("ckpt/DDIM20_router.pt").schedule(0.1))
    images = pipe(class_labels=[207], num_inference_steps=20).images

What the pipeline does differently from our sampler: it guides all channels of the noise, ours the first three; and the
timesteps are the scheduler's. Those of diffusers' DDIMScheduler as published ("leading") are those of
`create_diffusion("ddim20")`, where the number of steps divides 1000; the routers were trained with other ones, spread
up to 999 (`create_diffusion(20)`), for which DDIMScheduler has no configuration: "linspace" hands these to the model,
but steps from each to where the integer stride leads. A router loses nothing by it (docs/guide.md).
"""

from typing import Any

import torch
from torch import Tensor, nn

from models import DiT
from pretrained.diffusers_layout import dit_from_transformer
from schedule import Schedule


class ScheduledTransformer(nn.Module):
    """A DiT in the place of a pipeline's transformer, whose layers run or are reused as a `Schedule` says.

    Which step it is follows from how often it was called since the scheduler last set its timesteps, as each call of
    the pipeline does first: so nothing is read from the device.
    """

    def __init__(self, dit: DiT, config: Any, pipe: Any, schedule: Schedule) -> None:
        super().__init__()
        self.dit, self.config = dit, config
        self._pipe, self._schedule = pipe, schedule
        self._timesteps: Any = None  # those of the trajectory under way, its steps to come, and what it remembers
        self._rows: Any = None
        self._cache: Any = None

    @property
    def dtype(self) -> torch.dtype:
        return self.dit.pos_embed.dtype

    @property
    def device(self) -> torch.device:
        return self.dit.pos_embed.device

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
        """hidden_states (N, C, H, W), timestep (N,), class_labels (N,) -> an object with `sample` (N, 2C, H, W).

        Raises ValueError where the pipeline runs another number of steps than the schedule is for.
        """
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        timesteps = self._pipe.scheduler.timesteps
        if timesteps is not self._timesteps:
            if len(timesteps) != self._schedule.steps:
                raise ValueError(
                    f"the schedule is for {self._schedule.steps} steps, the pipeline runs {len(timesteps)}: "
                    f"pass num_inference_steps={self._schedule.steps} or accelerate it with a schedule for "
                    f"{len(timesteps)}"
                )
            self._timesteps, self._rows, self._cache = timesteps, self._schedule.rows(), self.dit.empty_cache()
        if not self._rows:
            raise ValueError("all steps of the scheduler were run: start again with scheduler.set_timesteps")
        row = self._rows.pop()  # the last index runs first
        output = self.dit(hidden_states, timestep, class_labels, row, self._cache)
        if not self._rows:
            self._cache = None
        return Transformer2DModelOutput(sample=output)


@torch.no_grad()
def accelerate(pipe: Any, schedule: Schedule) -> None:
    """From now on the layers of a `DiTPipeline` run or are reused as `schedule` says, in every call.

    Its transformer is replaced, by one that shares its weights; set back, `pipe.transformer` runs everything again.
    Again accelerated, it follows the new schedule. Any scheduler will do that calls the model once a step.
    Raises ValueError where the schedule is for another number of blocks, or the model is none that a DiT can be
    (`checkpoints.dit_from_transformer`); a call with another number of steps raises one, too.
    """
    model = pipe.transformer
    dit = model.dit if isinstance(model, ScheduledTransformer) else dit_from_transformer(model)
    if schedule.depth != dit.depth:
        raise ValueError(f"the schedule is for {schedule.depth} blocks, the pipeline's model has {dit.depth}")
    pipe.transformer = ScheduledTransformer(dit, model.config, pipe, schedule)
