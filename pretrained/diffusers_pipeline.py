"""Run a `DiTPipeline` of diffusers with a router or any other `Schedule`:

    pipe = DiTPipeline.from_pretrained("facebook/DiT-XL-2-256")
    accelerate(pipe, Router.load("ckpt/DDIM20_router.pt").schedule(0.1))
    images = pipe(class_labels=[207], num_inference_steps=20).images

The pipeline differs from our sampler in two ways. It guides all channels of the noise, ours the first three. And its
scheduler sets the timesteps: those of the published DDIMScheduler ("leading") equal `create_diffusion("ddim20")` if the
number of steps divides 1000. Routers were trained with timesteps spread up to 999 (`create_diffusion(20)`), for which
DDIMScheduler has no setting: "linspace" passes these to the model, but steps from each by the integer stride. A router
loses nothing by this (docs/guide.md).
"""

from typing import Any

import torch
from torch import Tensor, nn

from models import DiT
from pretrained.diffusers_layout import dit_from_transformer
from schedule import Schedule


class ScheduledTransformer(nn.Module):
    """A DiT in place of a pipeline's transformer; its layers run or are reused as a `Schedule` decides.

    It counts its calls to know the step, so it reads nothing from the device. The count restarts when the scheduler has
    new timesteps, which each call of the pipeline sets first.
    """

    def __init__(self, dit: DiT, config: Any, pipe: Any, schedule: Schedule) -> None:
        super().__init__()
        self.dit, self.config = dit, config
        self._pipe, self._schedule = pipe, schedule
        # Of the current trajectory: its timesteps, the rows of the schedule still to run, and its cache.
        self._timesteps: Any = None
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

        Raises ValueError if the pipeline runs a different number of steps than the schedule has.
        """
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        timesteps = self._pipe.scheduler.timesteps
        if timesteps is not self._timesteps:
            if len(timesteps) != self._schedule.steps:
                raise ValueError(
                    f"the schedule is for {self._schedule.steps} steps, the pipeline runs {len(timesteps)}: "
                    f"pass num_inference_steps={self._schedule.steps}, or accelerate it with another schedule"
                )
            self._timesteps, self._rows = timesteps, self._schedule.rows()
            self._cache = self.dit.empty_cache(self._schedule.order)
        if not self._rows:
            raise ValueError("all steps of the scheduler were run: start again with scheduler.set_timesteps")
        row = self._rows.pop()  # the last index runs first
        output = self.dit(hidden_states, timestep, class_labels, row, self._cache)
        if not self._rows:
            self._cache = None
        return Transformer2DModelOutput(sample=output)


@torch.no_grad()
def accelerate(pipe: Any, schedule: Schedule) -> None:
    """Make every later call of a `DiTPipeline` follow `schedule`; call again to follow another schedule.

    Replaces `pipe.transformer` by a model that shares its weights; assign the old one to undo this. Works with every
    scheduler that calls the model once per step.
    Raises ValueError if the schedule has a different number of blocks, or if the model cannot become a DiT. A call of
    the pipeline with a different number of steps raises ValueError, too.
    """
    model = pipe.transformer
    dit = model.dit if isinstance(model, ScheduledTransformer) else dit_from_transformer(model)
    if schedule.depth != dit.depth:
        raise ValueError(f"the schedule is for {schedule.depth} blocks, the pipeline's model has {dit.depth}")
    pipe.transformer = ScheduledTransformer(dit, model.config, pipe, schedule)
