"""Run a `DiTPipeline` of diffusers with a router, a plan or any other policy:

    pipe = DiTPipeline.from_pretrained("facebook/DiT-XL-2-256")
    accelerate(pipe, "dynamiclayer", path="ckpt/DDIM20_router.pt", forecast=2)
    images = pipe(class_labels=[207], num_inference_steps=20).images

    with accelerate(load_pipeline("ckpt/fashion_mnist"), "fora", interval=3) as acceleration: ...
    print(acceleration.summary())

The pipeline differs from our sampler in two ways. It guides all channels of the noise, ours the first three, unless
`cfg_channels` tells. And its scheduler sets the timesteps: those of the published DDIMScheduler ("leading") equal
`create_diffusion("ddim20")` if the number of steps divides 1000. Routers were trained with timesteps spread up to 999
(`create_diffusion(20)`), for which DDIMScheduler has no setting: "linspace" passes these to the model, but steps from
each by the integer stride. A router loses nothing by this (docs/guide.md).
"""

import argparse
import time
import warnings
from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from diffusion import GaussianDiffusion, Process, noise_factors
from models import DiT
from pretrained.diffusers_layout import (
    as_trained,
    check_channels,
    dit_from_transformer,
    is_guided,
    leave_unguided,
    to_diffusers,
    with_null_class,
)
from pretrained.loading import load_dit, load_vae
from pretrained.spec import model_spec
from pretrained.weights import find_model_folder
from router import Router
from runtime import devices, released
from runtime.cli import METHODS, noise_scale_pair
from runtime.errors import UserError
from runtime.files import load_tensors
from sampling import make_denoiser, scale_and_shift
from schedule import Schedule

# What messages recommend. Euler's works too, but not in a DiTPipeline: see `check_scheduler`.
SCHEDULERS = "a DDIMScheduler, DPMSolverMultistepScheduler or UniPCMultistepScheduler"


class SchedulerSteps:
    """The calls of the model that a scheduler of diffusers asks for, as `make_denoiser` takes a process.

    Raises UserError and warns as `check_scheduler`.
    """

    def __init__(self, scheduler: Any) -> None:
        check_scheduler(scheduler)
        self._timesteps = torch.as_tensor(scheduler.timesteps).flip(0)  # index 0 runs last
        self.steps = len(self._timesteps)
        if getattr(scheduler, "num_inference_steps", None) not in (None, self.steps):
            raise _several_calls(scheduler, f"{self.steps} times in {scheduler.num_inference_steps} steps")
        self.times = np.asarray(self._timesteps.cpu(), dtype=np.float64) / 1000

    def timesteps(self, device: torch.device) -> Tensor:
        """The timesteps, which may have fractions, (steps,)."""
        return self._timesteps.to(device)


def check_scheduler(scheduler: Any) -> None:
    """Warn of a scheduler whose images are wrong in any DiTPipeline.

    Raises UserError if it calls the model more than once per step.
    """
    if (order := getattr(scheduler, "order", 1)) != 1:
        raise _several_calls(scheduler, f"{order} times a step")
    if getattr(scheduler, "init_noise_sigma", 1) != 1:
        warnings.warn(
            f"{type(scheduler).__name__} needs its first noise scaled by init_noise_sigma, which DiTPipeline leaves "
            f"out, so images are wrong with and without a policy: set pipe.scheduler to {SCHEDULERS}",
            stacklevel=1,  # always the same place, so Python shows it once
        )


def _several_calls(scheduler: Any, calls: str) -> UserError:
    return UserError(
        f"{type(scheduler).__name__} calls the model {calls}, and a plan needs one call a step: set pipe.scheduler to "
        + SCHEDULERS
    )


class ScheduledTransformer(ModelMixin):  # of diffusers, or a pipeline would be saved without it
    """A DiT in place of a pipeline's transformer; its layers run or are reused as a `Schedule` decides.

    It counts its calls to know the step, so it reads nothing from the device. The count restarts when the scheduler has
    new timesteps, which each call of the pipeline sets first.
    original: the transformer that it replaces; kind: its library and class, as the pipeline's configuration names them.
    plan: a function, number of steps -> `Schedule`; schedule: the only one that it returns, None if there are several.
    cfg_channels: how many channels the pipeline guides. noise_scale: as for `GaussianDiffusion`.
    """

    def __init__(
        self,
        dit: DiT,
        original: Any,
        kind: tuple[str, str],
        pipe: Any,
        plan: Callable[[int], Schedule],
        schedule: Schedule | None,
        cfg_channels: int,
        noise_scale: tuple[float, float],
    ) -> None:
        super().__init__()
        self.dit, self.config, self.cfg_channels = dit, original.config, cfg_channels
        self.kind, self.noise_scale = kind, noise_scale
        self._original = (original,)  # in a tuple, or it would be a submodule
        self._pipe, self._plan = pipe, plan
        # Of the last trajectory: its plan, and the seconds that it took, if it came to its end.
        self.schedule = schedule
        self.seconds: float | None = None
        # Of the current trajectory: its timesteps, the factor of the noise at each (index 0 runs last), the number of
        # calls still to come, its denoiser, which has the cache, whether it is guided (a tensor of the device), and
        # when it began.
        self._timesteps: Any = None
        self._factors: list[float] = []
        self._left = 0
        self._denoise: Any = None
        self._guided: Any = None
        self._start = 0.0

    @property
    def original(self) -> Any:
        """The transformer that this replaces."""
        return self._original[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.dit.pos_embed.dtype

    @property
    def device(self) -> torch.device:
        return self.dit.pos_embed.device

    @wraps(ModelMixin.save_pretrained)  # a pipeline passes the arguments that it finds in the signature
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the transformer that this replaces; a pipeline that is being saved names the class of that one."""
        self._pipe.register_to_config(transformer=self.kind)  # which the pipeline saves last
        moved_to(self, self.original).save_pretrained(*args, **kwargs)

    @torch.compiler.disable  # the count would need a graph per step: the blocks are compiled instead
    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True) -> Any:
        """hidden_states (N, C, H, W), timestep (N,), class_labels (N,) -> an object with `sample` (N, 2C, H, W).

        timestep is that of the scheduler, whose timesteps come one after the other.
        Raises UserError if the pipeline runs a different number of steps than the plan has.
        """
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        if self._pipe.scheduler.timesteps is not self._timesteps:
            self._begin(hidden_states, class_labels)
        if not self._left:
            raise UserError("all steps of the scheduler were run: start again with scheduler.set_timesteps")
        self._left -= 1
        output = self._denoise(hidden_states, self._left)
        leave_unguided(output, slice(self.cfg_channels, self.dit.in_channels), self._guided)
        if (factor := self._factors[self._left]) != 1:
            output[:, : self.dit.in_channels] *= factor
        if not self._left:
            self._denoise = None
            devices.synchronize(self.device)
            self.seconds = time.perf_counter() - self._start
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _begin(self, x: Tensor, labels: Tensor) -> None:
        """Begin a trajectory."""
        self._denoise, self._left, self.seconds = None, 0, None
        if not devices.are_compiled(self.dit.blocks) and _is_compiled(self._pipe.transformer):
            devices.compile_blocks(cast(nn.ModuleList, self.dit.blocks))
        steps = SchedulerSteps(self._pipe.scheduler)
        self._factors = noise_factors(self.noise_scale, steps.times.tolist())
        self.schedule = self._plan(steps.steps)
        devices.synchronize(self.device)
        self._start = time.perf_counter()
        self._guided = is_guided(x, labels)
        labels = with_null_class(labels, self.dit.num_classes, self._guided)
        self._denoise = make_denoiser(self.dit, cast(Process, steps), labels, 1.0, self.schedule)
        self._timesteps, self._left = self._pipe.scheduler.timesteps, steps.steps


def moved_to(current: Any, transformer: Any) -> Any:
    """The transformer, with the device and dtype of the current one, if the pipeline was moved meanwhile."""
    if (transformer.device, transformer.dtype) != (current.device, current.dtype):
        transformer.to(device=current.device, dtype=current.dtype)
    return transformer


class Acceleration:
    """A pipeline that follows a policy, from `accelerate` to `disable`, or to the end of a `with` block.

    A `with` block leaves the pipeline as it found it; `disable` leaves it without any policy. A later `with` block
    follows the policy again.
    """

    def __init__(self, pipe: Any, model: ScheduledTransformer, name: str) -> None:
        self._pipe, self._model, self._name = pipe, model, name
        self._before = pipe.transformer
        pipe.transformer = model

    def __enter__(self) -> "Acceleration":
        current = self._pipe.transformer
        if _not_compiled(current) is not self._model:  # after `disable`, or after another block
            self._before = current
            self._put(self._model)
        return self

    def __exit__(self, *_: Any) -> None:
        self._put(self._before)

    def disable(self) -> None:
        """Put the pipeline's own transformer back, which was never changed."""
        self._put(self._model.original)

    def _put(self, transformer: Any) -> None:
        self._pipe.transformer = moved_to(self._pipe.transformer, transformer)

    @property
    def schedule(self) -> Schedule | None:
        """The plan; of a policy that serves any number of steps that of the last call, None before the first."""
        return self._model.schedule

    @property
    def seconds(self) -> float | None:
        """Seconds of the denoising loop of the last call; None if there was none, or if it was interrupted."""
        return self._model.seconds

    def summary(self) -> str:
        """One line: what was skipped, the bound on the speed-up that follows, and the time of the last call."""
        schedule, seconds = self.schedule, self.seconds
        if schedule is None:
            return f"{self._name}: the pipeline was not called yet"
        bound = schedule.speedup_bound(self._model.dit.multiply_adds())
        name = f"{self._name}, forecast {schedule.order}" if schedule.order else self._name
        took = "no call came to its end" if seconds is None else f"denoising took {seconds:.3f} s"
        return (
            f"{name}: {schedule.cached_share():.1%} of the layer calls of {schedule.steps} steps skipped, so the"
            f" speed-up is at most {bound:.3f}; {took}"
        )


@torch.no_grad()
def accelerate(
    pipe: Any,
    policy: Schedule | str | Path,
    forecast: int | None = None,
    cfg_channels: int | None = None,
    noise_scale: float | tuple[float, float] = 1.0,
    **settings: Any,
) -> Acceleration:
    """Make every later call of a `DiTPipeline` follow a policy; call again to follow another.

    policy: a `Schedule`; a router or schedule file; or a name of --accelerate-method with its `settings`, as for
    `training.policies.make_schedule`. A name without a file serves any number of steps; "smoothcache" measures at the
    first call of each.
    forecast: order of the forecast; None is that of the schedule, else 0.
    cfg_channels: how many channels the pipeline guides; None leaves it as it is.
    noise_scale: a factor of the predicted noise, or a pair of it and the highest t at which it applies, as for
    --noise-scale of sample.py.
    Works with every scheduler that calls the model once per step, and under torch.compile, which then compiles the
    blocks. `pipe.transformer` is replaced by a model that shares its weights; see `Acceleration` for the way back.
    Raises UserError if policy, scheduler and model do not fit; so does a call of the pipeline with another number of
    steps than the plan has. Raises ValueError and TypeError for wrong settings, as `make_schedule`. Warns of a plan
    that skips nothing, and of a scheduler whose images are wrong in any DiTPipeline.
    """
    check_scheduler(pipe.scheduler)
    try:
        scale = noise_scale_pair(np.asarray(noise_scale, dtype=float).ravel().tolist())
    except ValueError as error:
        raise ValueError(f"noise_scale {error}") from None
    current = _not_compiled(pipe.transformer)
    if isinstance(current, ScheduledTransformer):
        dit, original, kind, channels = current.dit, current.original, current.kind, current.cfg_channels
    else:
        if hasattr(current, "_hf_hook"):
            raise UserError("the pipeline moves its parts to the GPU and back: accelerate it before it is offloaded")
        dit, original, kind = dit_from_transformer(current), pipe.transformer, pipe.config["transformer"]
        channels = current.config.get("cfg_channels")
        if _is_compiled(original):
            devices.compile_blocks(cast(nn.ModuleList, dit.blocks))
    channels = check_channels(dit.in_channels, cfg_channels, channels)
    plan, schedule = _make_plan(dit, policy, forecast, settings)
    shown = settings | ({"noise_scale": scale} if scale[0] != 1 else {})
    words = [f"{name} {value}" for name, value in shown.items()]
    name = ", ".join([type(policy).__name__ if isinstance(policy, Schedule) else str(policy), *words])
    return Acceleration(pipe, ScheduledTransformer(dit, original, kind, pipe, plan, schedule, channels, scale), name)


def _not_compiled(model: Any) -> Any:
    """A module without torch.compile(module) around it."""
    return getattr(model, "_orig_mod", model)


def _is_compiled(model: Any) -> bool:
    """Whether a user compiled a module, by torch.compile(module) or module.compile()."""
    return hasattr(model, "_orig_mod") or devices.are_compiled([model])


def _make_plan(
    dit: DiT, policy: Schedule | str | Path, forecast: int | None, settings: dict[str, Any]
) -> tuple[Callable[[int], Schedule], Schedule | None]:
    """`plan` and `schedule` of a `ScheduledTransformer`, for a policy as in `accelerate`, which says what is raised."""
    from training.policies import make_schedule  # needs this package, at the top of its file

    if isinstance(policy, str) and policy in METHODS and METHODS[policy][0] != "path":
        if policy == "smoothcache":
            settings = settings | {"dit": dit}
        else:  # wrong settings are refused now, for the number of steps that a pipeline has by default
            make_schedule(policy, 50, dit.depth, forecast, **settings)

        @lru_cache
        def plan(steps: int) -> Schedule:
            if (interval := settings.get("interval", 1)) > steps:
                raise UserError(f"interval {interval} is more than the {steps} steps: pass at most {steps}")
            schedule = make_schedule(policy, steps, dit.depth, forecast, **settings)
            _warn_if_full(policy, schedule)
            return schedule

        return plan, None

    schedule, name = _given_schedule(dit, policy, settings)
    if schedule.process != GaussianDiffusion.name:
        raise UserError(f"{name} was made for the process {schedule.process}, and a DiTPipeline runs diffusion")
    if schedule.depth != dit.depth:
        raise UserError(f"{name} is for {schedule.depth} blocks, the pipeline's model has {dit.depth}")
    if forecast is not None:
        schedule = schedule.with_order(forecast)
    _warn_if_full(name, schedule)

    def fitting(steps: int) -> Schedule:
        if steps != schedule.steps:
            raise UserError(
                f"{name} is for {schedule.steps} steps, the pipeline runs {steps}: "
                f"pass num_inference_steps={schedule.steps}, or accelerate it with another schedule"
            )
        return schedule

    return fitting, schedule


def _warn_if_full(name: str, schedule: Schedule) -> None:
    if not schedule.cached_share():
        text = f"{name} skips nothing in {schedule.steps} steps: change its setting, or pass another policy"
        warnings.warn(text, stacklevel=2)


def _given_schedule(dit: DiT, policy: Schedule | str | Path, settings: dict[str, Any]) -> tuple[Schedule, str]:
    """A policy that is a `Schedule` or a file, and how messages name it."""
    settings = dict(settings)
    if isinstance(policy, Schedule):
        schedule, name = policy, "the schedule"
    else:
        method = policy if policy in METHODS else None
        path = settings.pop("path", None) if method else policy
        if path is None:
            raise TypeError(f"{method} needs the setting path, the name of a file")
        if not method and not Path(path).suffix and not Path(path).exists():
            raise UserError(f"{policy} is neither a policy ({', '.join(METHODS)}) nor a file")
        file = released.find(path)
        if not method:
            is_plan = file.suffix == ".json"
            if not is_plan:
                saved = load_tensors(file, allow=[argparse.Namespace])
                is_plan = isinstance(saved, dict) and "compute" in saved
            method = "schedule" if is_plan else "dynamiclayer"
        if method == "schedule":
            schedule = Schedule.load(file, dit.depth)
        else:
            schedule = Router.load(file).schedule(settings.pop("threshold", 0.1))
        name = str(path)
    if settings:
        raise TypeError(f"{name} has no setting {', '.join(settings)}")
    return schedule, name


def load_pipeline(name: str | Path, cfg_channels: int | None = None) -> Any:
    """A `DiTPipeline`, on the CPU, of a model of ours or of diffusers.

    name: a model folder, a file of weights for DiT-XL/2, or a folder or Hub name of a DiTPipeline (fetched if needed).
    cfg_channels: how many channels the pipeline guides; None is what a model folder recommends (3 by default), and for
    a pipeline of diffusers all.
    A model of ours gets a DDIMScheduler with the published betas. Raises UserError if the model is missing, damaged, or
    none that diffusers can run.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    if ((folder := find_model_folder(name)) / "model_index.json").is_file():
        pipe = DiTPipeline.from_pretrained(folder)
        as_trained(pipe.transformer, cfg_channels)
        return pipe
    spec = model_spec(ckpt=str(name))
    if spec.process != "diffusion":
        raise UserError(f"{name} is a flow model, and a DiTPipeline of diffusers runs diffusion: use sample.py")
    dit = load_dit(spec, "cpu")
    if scale_and_shift(load_vae(spec, "cpu"))[1]:  # checks the folder, too
        raise UserError(f"the VAE of {name} has a shift_factor, which DiTPipeline leaves out: use sample.py")
    try:
        transformer = to_diffusers(dit, check_channels(dit.in_channels, cfg_channels, spec.cfg_channels))
    except ValueError as error:
        raise UserError(f"{name} cannot run in diffusers: {error}") from error
    vae = AutoencoderKL.from_pretrained(released.fetch_vae(spec.vae) if spec.vae in ("ema", "mse") else spec.vae)
    labels = dict(enumerate(spec.class_names or []))
    return DiTPipeline(transformer, vae, DDIMScheduler(beta_start=1e-4, clip_sample=False), id2label=labels or None)
