"""Updates of a router, the same on any number of processes, and the state that a checkpoint must restore."""

import math
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist

from router import Router, router_loss
from training.batches import clean_latents, draw_steps


@dataclass(frozen=True)
class TrainingConfig:
    """What determines the updates of a `Trainer`, apart from the model and the data.

    updates: in all. batch_size: images per update, on all ranks. draws: sampler steps per update, each with its part of
    the batch. seed: of the initial scores and the draws. l1_weight: larger caches more layers; it is adjusted if there
    is target_cached, a share of all layers. threshold: layers with at most this score are cached.
    ste_threshold, order: see `router_loss`.
    """

    updates: int
    batch_size: int
    draws: int
    seed: int
    lr: float
    l1_weight: float
    threshold: float
    ste_threshold: float | None = None
    target_cached: float | None = None
    order: int = 0


def slices_per_draw(part, draw_size):
    """Split a rank's `part` (a range) of the batch by draws of `draw_size` images: [(draw, slice of the part)]."""
    return [
        (d, slice(max(part.start, d * draw_size) - part.start, min(part.stop, (d + 1) * draw_size) - part.start))
        for d in range(part.start // draw_size, (part.stop - 1) // draw_size + 1)
    ]


def reduce_gradients(router, rows, values, processes):
    """Sum the gradients of the drawn `rows` and `values` (V,) over all ranks, in one message from CPU to CPU.

    Returns the summed values, and the size of the message in bytes. Raises UserError if another rank has ended.
    """
    parameters = [router.routers[i].prob for i in rows]
    message = torch.cat([*(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters), values]).cpu()
    with processes.exchange():
        dist.all_reduce(message)
    *gradients, values = message.to(values.device).split([len(p) for p in parameters] + [len(values)])
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient.clone()
    return values, message.nbytes


def response_time(lr, draws, rows):
    """Return the updates in which AdamW can move a score by 2 logits, if each draws `draws` times from `rows` steps."""
    return 2 / lr / (1 - (1 - 1 / rows) ** draws)


# Bounds of an adjusted L1 weight: Adam squares gradients of its size in float32, and 0 could not grow again.
L1_WEIGHTS = 1e-30, 1e15


def is_state(state):
    """Whether a `Trainer` can continue from `state`, which has the entries of `Trainer.state_dict` and "routers"."""
    rows, window = state["routers"], state["window"]
    try:
        for i, moments in state["opt"]["state"].items():
            shapes = {rows[f"{i:d}.prob"].shape, moments["exp_avg"].shape, moments["exp_avg_sq"].shape}
            if len(shapes) > 1 or not moments["step"] >= 0:
                return False
        per_step = window["mse"], window["draws"]
        numbers = [state["step"], state["l1_weight"], window["l1"], window["updates"], *chain(*per_step)]
        return (
            isinstance(state["step"], int)
            and all(isinstance(number, int | float) and 0 <= number < math.inf for number in numbers)
            and all(isinstance(values, list) and len(values) == len(rows) for values in per_step)
            and all(isinstance(name, str) for name in state["skipped"])
        )
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return False


class Trainer:
    """A router in training: scores, Adam's moments, the L1 weight, and the figures collected for the next report.

    All ranks hold equal ones. diffusion: of the sampler. part: this rank's range of the batch (`BatchSampler.part`).
    """

    def __init__(self, dit, vae, diffusion, config, processes, part):
        self.dit, self.vae, self.diffusion, self.config, self.processes = dit, vae, diffusion, config, processes
        self.device = next(dit.parameters()).device
        self.draw_size = config.batch_size // config.draws  # images
        self.slices = slices_per_draw(part, self.draw_size)
        generator = torch.Generator().manual_seed(config.seed)  # the same initial scores on all ranks
        self.router = Router(diffusion.steps, dit.depth, generator, diffusion.name).to(self.device)
        self.trained_steps = list(self.router.trained_steps(diffusion.steps))
        self.optimizer = torch.optim.AdamW(self.router.parameters(), lr=config.lr, weight_decay=0)
        self.l1_weight = config.l1_weight
        self.updates_done = 0
        self.between_updates = True  # False if an interrupted update has moved the scores
        self.skipped = set()  # images that could not be read
        self.reduced_bytes = 0
        self.start_window()

    def start_window(self):
        """Start to sum figures for the next report: errors and draws per step, L1 terms, updates."""
        steps = self.diffusion.steps
        self.window = {"mse": [0.0] * steps, "draws": [0] * steps, "l1": 0.0, "updates": 0}

    def state_dict(self):
        """Return what a checkpoint holds beside the scores: tensors and plain types."""
        return {
            "opt": self.optimizer.state_dict(),
            "step": self.updates_done,
            "l1_weight": self.l1_weight,
            "window": self.window,
            "skipped": sorted(self.skipped),
        }

    def load_state_dict(self, state):
        """Continue from a checkpoint, with the learning rate of the config, and its L1 weight if that is fixed.

        state: `is_state` must hold.
        """
        self.router.routers.load_state_dict(state["routers"])
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["opt"]["state"]})
        self.updates_done, self.window, self.skipped = state["step"], state["window"], set(state["skipped"])
        if self.config.target_cached:
            self.l1_weight = state["l1_weight"]

    def update(self, batch, stop=False):
        """Make one update from this rank's part of the batch; return whether any rank passed `stop`.

        The loss is the mean over the draws of: mean error of the draw's images + l1_weight * sum of its scores.
        batch: from a DataLoader of `TrainingSamples`. Raises UserError if the loss is not finite; nothing has changed.
        """
        config = self.config
        draws = draw_steps(config.seed, self.updates_done, config.draws, len(self.trained_steps))
        rows = [self.trained_steps[k] for k in draws]
        # Summed over the ranks beside the gradients: the error of each draw, the L1 term, the wish to stop.
        values = torch.zeros(len(rows) + 2, device=self.device)
        values[-1] = stop
        self.optimizer.zero_grad(set_to_none=True)
        for d, part in self.slices:
            scores = self.router(rows[d])
            x_start, y, noise = clean_latents({name: v[part] for name, v in batch.items()}, self.vae, self.device)
            inputs = x_start, y, noise, config.ste_threshold, config.order
            mse = router_loss(self.dit, self.diffusion, scores, rows[d] + 1, *inputs)
            share = len(mse) / config.batch_size
            (share * (mse.mean() + self.l1_weight * scores.sum())).backward()
            values[d] += mse.detach().sum() / self.draw_size
            values[-2] += share * scores.detach().sum()
        drawn = sorted(set(rows))
        if self.processes.size > 1:
            values, self.reduced_bytes = reduce_gradients(self.router, drawn, values, self.processes)
        norm = torch.stack([self.router.routers[i].prob.grad.norm() for i in drawn]).sum()
        *errors, l1, stops, norm = torch.cat([values, norm[None]]).tolist()  # waits for the device
        self._check_finite(errors, norm, rows)
        self.between_updates = False
        self.optimizer.step()
        self.router.clamp_()
        self.updates_done += 1
        if config.target_cached:
            self.adjust_l1_weight()
        for row, error in zip(rows, errors):
            self.window["mse"][row] += error
            self.window["draws"][row] += 1
        self.window["l1"] += l1
        self.window["updates"] += 1
        self.between_updates = True
        return stops > 0

    def _check_finite(self, errors, norm, rows):
        names = [f"of draw {d}, step {row + 1}," for d, row in enumerate(rows)] + ["or its gradient"]
        for name, value in zip(names, [*errors, norm]):
            if not math.isfinite(value):
                raise self.processes.error(
                    f"the loss {name} in update {self.updates_done + 1} is not finite ({value}): try --dtype fp32 or a "
                    "lower --lr, and check the weights; the router before this update is saved"
                )

    def adjust_l1_weight(self):
        """Move the L1 weight towards the wanted share of cached layers: an integral controller of its logarithm.

        It looks at the scores some time ahead: they follow the weight so slowly that their present share would make it
        oscillate. A missing share counts up to 0.1, so the logarithm moves by at most 6 per response time, and per
        update if the response is faster than that (a learning rate above 2).
        """
        config = self.config
        response = response_time(config.lr, config.draws, len(self.trained_steps))
        ahead = min(2, (config.updates - self.updates_done) / response)
        layers = self.diffusion.steps * 2 * self.dit.depth
        share = (self.predict_scores(ahead) <= config.threshold).sum().item() / layers
        missing = min(0.1, max(-0.1, config.target_cached - share))
        lowest, highest = L1_WEIGHTS
        self.l1_weight = min(highest, max(lowest, self.l1_weight * math.exp(min(60.0, 60.0 / response) * missing)))

    @torch.no_grad()
    def predict_scores(self, ahead):
        """Return float32 [trained steps, 2*depth]: the scores `ahead` response times from now, at Adam's pace."""
        scores = []
        for i in self.trained_steps:
            logits = self.router.routers[i].prob
            state, (beta1, beta2) = self.optimizer.state.get(logits), self.optimizer.defaults["betas"]
            if state:
                mean = state["exp_avg"] / (1 - beta1 ** int(state["step"]))
                square = state["exp_avg_sq"] / (1 - beta2 ** int(state["step"]))
                logits = logits - 2 * ahead * mean / (square.sqrt() + self.optimizer.defaults["eps"])
                logits = logits.clamp(-Router.LIMIT, Router.LIMIT)
            scores.append(logits.sigmoid())
        return torch.stack(scores)

    def report(self):
        """Return the figures since `start_window`, and of the present router: a dict for JSON, a line of the log."""
        window, trained, schedule = self.window, self.trained_steps, self.router.schedule(self.config.threshold)
        costs = self.dit.multiply_adds()
        mse, l1 = sum(window["mse"]) / sum(window["draws"]), window["l1"] / window["updates"]
        drawn = [i for i in trained if window["draws"][i]]
        moments = {i: self.optimizer.state.get(self.router.routers[i].prob) for i in trained}
        cached = int((~schedule.compute).sum())
        return {
            "step": self.updates_done,
            "loss": mse + self.l1_weight * l1,
            "mse": mse,
            "l1": l1,
            "l1_weight": self.l1_weight,
            "non_zero": len(trained) * 2 * schedule.depth - cached,
            "cached": cached,
            "cached_share": schedule.cached_share(),
            "multiply_adds": int(schedule.multiply_adds(costs).sum()),
            "speedup_bound": schedule.speedup_bound(costs),
            "reduced_bytes": self.reduced_bytes,
            "skipped_images": len(self.skipped),
            "mse_per_step": {i: window["mse"][i] / window["draws"][i] for i in drawn},
            "draws_per_step": {i: window["draws"][i] for i in drawn},
            "updates_per_row": {i: int(state["step"]) for i, state in moments.items() if state},
            "scores": [[round(v, 3) for v in row] for row in self.router.scores()[trained].flatten(1).tolist()],
        }
