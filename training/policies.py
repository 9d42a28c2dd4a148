"""Policies by name: every way to make a `Schedule` that --accelerate-method offers.

make_schedule("fora", steps=20, depth=12, interval=3, forecast=2)
make_schedule("smoothcache", steps=50, depth=dit.depth, alpha=0.18, dit=dit, cfg_scale=1.5)
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from diffusion import Process, create_diffusion
from models import DiT
from pretrained.spec import ModelSpec
from router import Router
from runtime import released
from runtime.cli import METHODS
from runtime.errors import UserError
from runtime.hashes import fingerprint
from schedule import Schedule
from training.smoothcache import layer_changes

RANDOM_SEED = 0  # of the random layers, so that equal flags give equal schedules


def make_schedule(
    method: str,
    steps: int,
    depth: int,
    forecast: int | None = None,
    diffusion: Process | None = None,
    **settings: Any,
) -> Schedule:
    """The `Schedule` of a policy for `steps` sampling steps and `depth` blocks.

    method and its settings, which are keyword arguments:
        "dynamiclayer"             path: of a router file; threshold: as --thres, default 0.1
        "schedule"                 path: of a schedule file, ours or SmoothCache's
        "fora"                     interval: run every layer at every interval-th step, none in between
        "smoothcache"              alpha: largest relative change of an output that is reused; dit: the DiT to measure
                                   it on; cfg_scale: guidance, default 1
        "random", "first", "last"  cached: share of all layer calls that are reused, at the steps that a router decides
    forecast: order of the forecast, as in `Schedule`; None is that of a schedule file, else 0.
    diffusion: the process of the model; None is `create_diffusion(steps)`.
    Raises UserError if a file cannot be used or does not fit, ValueError if the method is unknown or the value of a
    setting is wrong, TypeError if a setting is missing or is one of another method.
    """
    if method not in POLICIES:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(POLICIES)}")
    diffusion = diffusion or create_diffusion(steps)
    if method in ("dynamiclayer", "schedule"):
        settings["process"] = diffusion.name
    if method == "smoothcache":
        settings["diffusion"] = diffusion
    schedule = replace(POLICIES[method](steps, depth, **settings), process=diffusion.name)
    return schedule if forecast is None else schedule.with_order(forecast)


def _router_file(steps: int, depth: int, path: str, process: str, threshold: float = 0.1) -> Schedule:
    if Path(path).suffix == ".json":
        raise UserError(f"{path} is no router file: pass --accelerate-method schedule if it is a schedule file")
    schedule = Router.load(released.find(path)).schedule(threshold)
    schedule.check_fits(path, steps, depth, process)
    return schedule


def _schedule_file(steps: int, depth: int, path: str, process: str) -> Schedule:
    schedule = Schedule.load(released.find(path), depth)
    schedule.check_fits(path, steps, depth, process)
    return schedule


def _smoothcache(
    steps: int, depth: int, alpha: float, dit: DiT, diffusion: Process, cfg_scale: float = 1.0
) -> Schedule:
    return Schedule.by_change(layer_changes(dit, steps, cfg_scale, diffusion), depth, alpha)


def _share(policy: Callable[..., Schedule]) -> Callable[..., Schedule]:
    """A policy for a share `cached` of all layer calls, at the steps that a router decides.

    policy: function (steps, depth, where, number of layer calls).
    """

    def make(steps: int, depth: int, cached: float) -> Schedule:
        return policy(steps, depth, Router.trained_steps(steps), round(cached * steps * depth * 2))

    return make


POLICIES: dict[str, Callable[..., Schedule]] = {
    "dynamiclayer": _router_file,
    "schedule": _schedule_file,
    "fora": Schedule.every_nth,
    "smoothcache": _smoothcache,
    "random": _share(partial(Schedule.random_layers, seed=RANDOM_SEED)),
    "first": _share(Schedule.first_blocks),
    "last": _share(Schedule.last_blocks),
}


def schedule_of_flags(
    args: argparse.Namespace, model: ModelSpec | DiT, cfg_scale: float = 1.0, diffusion: Process | None = None
) -> Schedule | None:
    """The schedule that the flags ask for, or None if they name no method.

    model: its `ModelSpec` before it is loaded, which gives the schedules of files and None for all others, so that a
    wrong file is refused early; then the DiT. cfg_scale: guidance of the sampler. diffusion: as for `make_schedule`.
    Raises UserError as `make_schedule`.
    """
    method = args.accelerate_method
    if method is None or isinstance(model, ModelSpec) and not args.path:
        return None
    setting, _ = METHODS[method]
    settings = {setting: getattr(args, setting)}
    if method == "dynamiclayer":
        settings |= {"threshold": args.thres}
    if method == "smoothcache":
        settings |= {"dit": model, "cfg_scale": cfg_scale}
    return make_schedule(method, args.num_sampling_steps, model.depth, args.forecast, diffusion, **settings)


def manifest_entries(args: argparse.Namespace, schedule: Schedule | None) -> dict[str, Any]:
    """What a manifest says of the schedule of `schedule_of_flags`, as JSON types.

    "router", "threshold" and "schedule" (its SHA-256) are None if they do not apply; other entries are there if they
    do: "forecast", and "method" with its setting.
    """
    entries: dict[str, Any] = dict.fromkeys(("router", "threshold", "schedule"))
    if schedule is None:
        return entries
    if args.accelerate_method == "dynamiclayer":
        router = Router.load(released.find(args.path))
        entries |= {"router": fingerprint(router, {}), "threshold": args.thres}
    else:
        entries |= {"schedule": schedule.sha256()}
    if not args.path:
        setting, _ = METHODS[args.accelerate_method]
        entries |= {"method": args.accelerate_method, setting: getattr(args, setting)}
    return entries | ({"forecast": schedule.order} if schedule.order else {})
