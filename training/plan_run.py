"""Learn plans for given speed-ups: rounds of tables and plans that can be continued, and a report.

NNN-MODEL/args.json                flags and versions of the last launch
NNN-MODEL/checkpoints/search.pt    what the search has found so far, to continue it
NNN-MODEL/DDIMn_Xx.json            the plan for n steps and a speed-up of X, a schedule file; its picture is a .png;
                                   Eulern_Xx.json for a flow model
"""

import math
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

from pretrained.spec import SAMPLER_NAMES
from runtime.errors import UserError
from runtime.files import atomic_write, load_tensors
from runtime.noise import ImageNoise
from runtime.signals import sigterm_interrupts
from sampling import check_finite, sample_latents
from schedule import Schedule
from training.plan_search import LARGEST_GAP, WINDOW, largest_speedup, plan_for
from training.plan_table import error_table, samples_at_once
from training.plots import save_plans
from training.run_folder import RunFolder, sampling_command

# Samples for a table, for the choice among the plans found, and for the error that is reported.
TABLE, CHOICE, HELD_OUT = 64, 64, 64
DIRECTIONS = 1  # in the space of the final latents, for each sample of a table
# Their noise has numbers that no image of a sample set has.
FIRST = {"table": 1 << 40, "choice": 2 << 40, "held-out": 3 << 40}
LARGEST_STEP = 1.3  # a table is wrong far from its plan, so the speed-up grows by at most this factor at once
GAPS = (4, 6, LARGEST_GAP)  # limits to try for the steps between two computed outputs


def draw(dit, seed, purpose, first, count, total):
    """Noise (N, C, H, W) and labels (N,) of `count` samples from number `first` on, on the device of the model.

    The labels of `total` samples are spread evenly over the classes.
    """
    numbers, device = range(first, first + count), dit.pos_embed.device
    shape = (dit.in_channels, dit.input_size, dit.input_size)
    noise = ImageNoise(seed, (FIRST[purpose] + k for k in numbers), shape, dit.num_classes, device)
    return noise.z, torch.tensor([k % total * dit.num_classes // total for k in numbers], device=device)


@dataclass
class Problem:
    """What plans are learned for: a frozen DiT, its sampler, the guidance, the order of forecasts, and a seed."""

    dit: object
    diffusion: object
    cfg_scale: float
    order: int
    seed: int
    samples: int = TABLE
    directions: int = DIRECTIONS
    latents: dict = field(default_factory=dict)  # of the full run, by purpose

    @property
    def window(self):
        return min(WINDOW, self.diffusion.steps - 1)

    def batches(self, total):
        """The (first, count) of the samples that are handled at once."""
        size = samples_at_once(self.dit, self.diffusion.steps, self.window, self.directions, self.cfg_scale)
        return [(first, min(size, total - first)) for first in range(0, total, size)]

    def table(self, plan, batch, tick):
        """`error_table` of one batch of samples."""
        z, y = draw(self.dit, self.seed, "table", *batch, self.samples)
        generator = torch.Generator().manual_seed(self.seed + batch[0])  # one for each batch
        vectors = torch.randn(self.directions, *z.shape, generator=generator).to(z.device)
        return error_table(self.dit, self.diffusion, plan, z, y, vectors, self.cfg_scale, self.window, tick)

    def sample(self, purpose, total, plan=None):
        """The final latents (N, C, H, W) of the samples of one purpose, on the CPU."""
        parts = []
        for batch in self.batches(total):
            z, y = draw(self.dit, self.seed, purpose, *batch, total)
            latents = sample_latents(self.dit, self.diffusion, z, y, self.cfg_scale, plan).cpu()
            if plan is None:
                check_finite(latents.isfinite().flatten(1).all(1, keepdim=True))
            parts.append(latents)
        return torch.cat(parts)

    def errors(self, purpose, total, plan):
        """Mean squared error of the final latents of each sample against the full run, (N,)."""
        if purpose not in self.latents:
            self.latents[purpose] = self.sample(purpose, total)
        difference = self.sample(purpose, total, plan) - self.latents[purpose]
        return difference.square().flatten(1).mean(1).nan_to_num(math.inf)


class Search:
    """The search for plans, with its state after each batch of samples, so that it can be continued.

    state: {"plans": {text: bool [steps, depth, 2]}, "errors": {text: float}, "table": what is known of the next table,
    "before": the last table and its aim}.
    save: called after each change of `state`.
    """

    def __init__(self, problem, state, save):
        self.problem, self.state, self.save = problem, state, save
        for name, empty in {"plans": {}, "errors": {}, "table": None, "before": None}.items():
            self.state.setdefault(name, empty)
        self.costs = problem.dit.multiply_adds()

    def learn(self, target, last=None):
        """The plan with a speed-up of at least `target` that has the least error on the samples of choice.

        last: a plan with a lower speed-up to start from, if it is nearer than every n-th step.
        """
        plan = max(filter(None, (self.uniform(target), last)), key=self.speedup)
        steps = max(1, math.ceil(math.log(max(1.0, target / self.speedup(plan))) / math.log(LARGEST_STEP)))
        aims = [target * (self.speedup(plan) / target) ** (1 - k / steps) for k in range(1, steps)] + [target] * 2
        candidates = [self.faster_uniform(target)]
        self.error(candidates[0])  # before the tables, since it refuses a full run that is not finite
        for number, aim in enumerate(aims):
            name = f"{target:g}x, round {number + 1} of {len(aims)}"
            plan = self.round(plan, aim, number, name)
            print(f"{name}: speed-up at most {self.speedup(plan):.3f}, error {self.error(plan):.2e}", flush=True)
            if aim == target:
                candidates.append(plan)
        return min(candidates, key=self.error)

    def speedup(self, plan):
        return plan.speedup_bound(self.costs)

    def uniform(self, target):
        """Every n-th step, the nearest below a speed-up; every second step if there is none."""
        plans = [self.every_nth(n) for n in range(2, LARGEST_GAP + 1)]
        return max((p for p in plans if self.speedup(p) <= target), key=self.speedup, default=plans[0])

    def faster_uniform(self, target):
        """Every n-th step, the nearest with at least this speed-up."""
        plans = [self.every_nth(n) for n in range(1, LARGEST_GAP + 1)]
        return min((p for p in plans if self.speedup(p) >= target), key=self.speedup)

    def every_nth(self, n):
        steps = self.problem.diffusion.steps
        return Schedule.every_nth(steps, self.problem.dit.depth, n).with_order(self.problem.order)

    def round(self, plan, aim, number, key):
        """The best plan for a speed-up of `aim` from the table around `plan`: that of each of `GAPS` is tried.

        The table of the round before is added if its aim was the same: a plan found in a table is tuned to its samples.
        number: of the round; each has samples of its own.
        """
        if key not in self.state["plans"]:
            table, before = self.table(plan, number, key), self.state["before"]
            if before and before["aim"] == aim:
                table = table + before["table"]
            if not table.isfinite().all():
                raise UserError(
                    f"{key}: gradients of the latents are not finite: check the weights, or pass --dtype fp32 or a "
                    "lower --cfg-scale"
                )
            found = [plan_for(table.numpy(), plan.order, self.costs, aim, gap) for gap in GAPS]
            best = min(filter(None, found), key=self.error)
            self.state["plans"][key] = best.compute
            self.state |= {"table": None, "before": {"aim": aim, "table": table}}
            self.save()
        return Schedule(self.state["plans"][key], plan.order)

    def table(self, plan, number, key):
        """The table around a plan, from all batches; those of an interrupted search are not computed again."""
        problem, known, around = self.problem, self.state["table"], f"{key} {plan.sha256()}"
        done, table = (known["samples"], known["sum"]) if known and known["around"] == around else (0, None)
        total = 2 * problem.samples * plan.steps
        with tqdm(total=total, initial=2 * done * plan.steps, desc=key, unit="step", disable=None) as bar:
            for first, count in problem.batches(problem.samples):
                if first < done:
                    continue
                batch = number * problem.samples + first, count
                part = problem.table(plan, batch, lambda count=count: bar.update(count))
                table = part if table is None else table + part
                self.state["table"] = {"around": around, "samples": first + count, "sum": table}
                self.save()
        return table

    def error(self, plan, purpose="choice"):
        """Mean squared error of the final latents on the samples of choice, or on those held out."""
        key = f"{purpose} {plan.sha256()}"
        if key not in self.state["errors"]:
            errors = self.problem.errors(purpose, {"choice": CHOICE, "held-out": HELD_OUT}[purpose], plan)
            self.state["errors"][key] = errors.mean().item()
            self.save()
        return self.state["errors"][key]


# The flags that determine plans, beside the model: --resume continues a search with the same. Targets may be added.
DETERMINING = ("num_sampling_steps", "forecast", "global_seed", "dtype", "cfg_scale")


def check_targets(targets, steps, dit):
    """Raise UserError if no plan is as fast as a target."""
    most = largest_speedup(steps, dit.depth, dit.multiply_adds())
    if max(targets) > most:
        raise UserError(
            f"--target-speedup {max(targets):g} is beyond {most:.2f}, the most for {steps} steps of this model (every "
            f"layer runs at every {LARGEST_GAP}th step): pass at most {math.floor(most * 100) / 100:g}"
        )


def learn_plans(args, spec, dit, diffusion, cfg_scale, identity):
    """Learn and report the plans of --target-speedup, in a new run's folder or in that of --resume."""
    check_targets(args.target_speedup, diffusion.steps, dit)
    order = 2 if args.forecast is None else args.forecast
    flags = vars(args) | {"cfg_scale": float(cfg_scale), "forecast": order}
    determining = {name: flags[name] for name in DETERMINING} | {"model": identity} | cfg_scale.entries()
    run, state = open_search(args, spec.name, determining)
    folder = run.folder

    def save():
        with atomic_write(run.checkpoints / "search.pt") as part, part.open("wb") as file:
            torch.save({"determining": determining, "state": state}, file)

    run.save_args(vars(args))
    print(f"{folder}: plans of order {order} for {diffusion.steps} steps, guidance {cfg_scale:g}")
    search = Search(Problem(dit, diffusion, cfg_scale, order, args.global_seed), state, save)
    guidance = ["--cfg-scale", f"{cfg_scale:g}"]
    guidance += ["--cfg-channels", args.cfg_channels] if args.cfg_channels else []
    guidance += ["--cfg-interval", *args.cfg_interval] if args.cfg_interval else []
    save()
    last = None
    try:
        with sigterm_interrupts():
            for target in sorted(set(args.target_speedup)):
                last = search.learn(target, last)
                path = folder / f"{SAMPLER_NAMES[spec.sampler()]}{diffusion.steps}_{target:g}x.json"
                replace(last, process=diffusion.name).save(path)
                save_plans({path.stem: last}, path.with_suffix(".png"))
                report(search, target, last, path)
                plan = ["--accelerate-method", "schedule", "--path", path]
                print(f"sample with it: {sampling_command(args, spec, *guidance, *plan)}", flush=True)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"continue with the same command and --resume {shlex.quote(str(folder))}") from None


def report(search, target, plan, path):
    """Print the bound and error of a plan, and those of every n-th step that is the next slower and the next faster."""
    uniform = {p.sha256(): p for p in (search.uniform(target), search.faster_uniform(target))}
    others = [f"{search.error(other, 'held-out'):.2e} at {search.speedup(other):.3f}" for other in uniform.values()]
    print(
        f"{path}: speed-up at most {search.speedup(plan):.3f}, error {search.error(plan, 'held-out'):.2e} on "
        f"{HELD_OUT} held-out samples; every n-th step: {', '.join(others)}",
        flush=True,
    )


def open_search(args, name, determining):
    """The `RunFolder` of a search, and the state to continue (empty for a new one)."""
    if args.resume not in (None, "auto"):
        folder = Path(args.resume)
        if folder.parts[-2:] == ("checkpoints", "search.pt"):
            folder = folder.parent.parent
        saved = read_search(folder)
        for flag in saved["determining"] | determining:
            before = saved["determining"].get(flag)
            if before != determining.get(flag):
                given = "--" + flag.replace("_", "-")
                what = f"without {given}" if before is None else f"with {given} {before}"
                what = "with another model" if flag == "model" else what
                raise UserError(f"--resume {folder} searched {what}: pass the same, or leave out --resume")
        return RunFolder(folder), read_search(folder)["state"]  # again: the process that held the lock may have saved
    if args.resume == "auto":
        run, saved = RunFolder.newest(
            args.results_dir, "search.pt", read_search, lambda saved: saved["determining"] == determining
        )
        if run is not None:
            return run, saved["state"]
        print(f"--resume auto: no search in {args.results_dir} has these flags and model, so a new one starts")
    return RunFolder.new(args.results_dir, name), {}


def read_search(folder):
    """Load search.pt of a folder. Raises UserError if it is missing, damaged, or no search."""
    path = folder / "checkpoints" / "search.pt"
    saved = load_tensors(path)
    if not isinstance(saved, dict) or not all(isinstance(saved.get(name), dict) for name in ("determining", "state")):
        raise UserError(f"{path} is no search to continue: name a folder of --target-speedup")
    return saved
