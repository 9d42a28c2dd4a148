"""Updates of a router, the same on any number of processes, and all that a checkpoint must bring back of them."""

import math

import torch
import torch.distributed as dist

from router import Router, router_loss
from training.batches import clean_latents, draw_steps


def pieces(part, draw_size):
    """Cuts a process's `part` (a range) of the batch where another draw begins: [(draw, slice of the part)]."""
    return [
        (d, slice(max(part.start, d * draw_size) - part.start, min(part.stop, (d + 1) * draw_size) - part.start))
        for d in range(part.start // draw_size, (part.stop - 1) // draw_size + 1)
    ]


def reduce_gradients(router, rows, values, processes):
    """Sums the gradients of the drawn `rows` and `values` (V,) over all processes, in one message from CPU to CPU.

    What a process did not draw counts as 0. Returns the sum of `values`, and the bytes of the message.
    Raises UserError where another process is gone.
    """
    parameters = [router.routers[i].prob for i in rows]
    message = torch.cat([*(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters), values]).cpu()
    with processes.exchange():
        dist.all_reduce(message)
    *gradients, values = message.to(values.device).split([len(p) for p in parameters] + [len(values)])
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient.clone()
    return values, message.nbytes


class TargetShare:
    """Adjusts the weight of the L1 term until a wanted share of all layers is cached: an integral controller.

    The logarithm of the weight moves by how far the share is from `target`, at most by 6 in a response time. The share
    it is shown is the one that the scores are heading for (`Training.heading`): they follow the weight so late that
    the present share would make it swing. response: updates that a score needs to follow (`response_time`).
    """

    GAIN, MOST = 60.0, 0.1  # a gain in a response time; the largest difference that counts

    def __init__(self, target, response):
        self.target, self.response = target, response

    def adjust(self, l1_weight, share):
        """The weight for the next update, from this one's and the share of all layers that it left heading for 0."""
        missing = min(self.MOST, max(-self.MOST, self.target - share))
        return l1_weight * math.exp(self.GAIN / self.response * missing)


def response_time(lr, draws, rows):
    """Updates in which AdamW can move a score of one of `rows` steps by 2 logits, `draws` of them drawn at a time."""
    return 2 / lr / (1 - (1 - 1 / rows) ** draws)


class Trainer:
    """A router in training: its scores, Adam's moments, the weight of the L1 term, and what was seen since a report.

    Every process of the job holds one, and they stay equal. args: the flags of train_router.py; updates: how many there
    will be; part: this process's range of the batch, as `data.BatchSampler` gives it.
    """

    def __init__(self, dit, vae, diffusion, args, updates, processes, part):
        self.dit, self.vae, self.diffusion, self.args, self.processes = dit, vae, diffusion, args, processes
        self.updates = updates
        self.device = next(dit.parameters()).device
        self.draw_size = args.global_batch_size // args.draws_per_step
        self.pieces = pieces(part, self.draw_size)
        generator = torch.Generator().manual_seed(args.global_seed)  # the same initial scores everywhere
        self.router = Router(diffusion.steps, dit.depth, generator).to(self.device)
        self.trained = list(self.router.trained_steps(diffusion.steps))
        self.layers = diffusion.steps * 2 * dit.depth
        self.optimizer = torch.optim.AdamW(self.router.parameters(), lr=args.lr, weight_decay=0)
        self.control = None
        self.l1_weight = args.l1
        if args.target_cached:
            response = response_time(args.lr, args.draws_per_step, len(self.trained))
            self.control = TargetShare(args.target_cached, response)
        self.step = 0
        self.skipped = set()  # images that could not be read
        self.reduced_bytes = 0
        self.new_window()

    def new_window(self):
        """Forgets what was seen since the last report."""
        # Per step the sum of its draws' errors, and their number; the sum of the L1 terms; the updates.
        steps = self.diffusion.steps
        self.window = {"mse": [0.0] * steps, "draws": [0] * steps, "l1": 0.0, "updates": 0}

    def state_dict(self):
        """What belongs into a router file beside its scores (`Router.save`): tensors and plain types."""
        return {
            "opt": self.optimizer.state_dict(),
            "step": self.step,
            "l1_weight": self.l1_weight,
            "window": self.window,
            "skipped": sorted(self.skipped),
        }

    def load_state_dict(self, state):
        """Continues from a router file with what `state_dict` gave. The learning rate stays the flag's."""
        self.router.routers.load_state_dict(state["routers"])
        self.optimizer.load_state_dict(state["opt"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr
        self.step, self.window, self.skipped = state["step"], state["window"], set(state["skipped"])
        if self.control:
            self.l1_weight = state["l1_weight"]

    def update(self, batch, stop=False):
        """One update from this process's part of the batch, as `data.TrainingSamples` and a loader make it.

        Returns whether any process was told to `stop`.

        The loss is the mean over the draws; a draw's is its images' mean error plus the weighted sum of its scores.
        Raises UserError where it is not finite; nothing has changed then.
        """
        args = self.args
        rows = [
            self.trained[k] for k in draw_steps(args.global_seed, self.step, args.draws_per_step, len(self.trained))
        ]
        drawn = sorted(set(rows))
        # What the processes tell each other beside the gradients: each draw's error, the L1 term, a wish to stop.
        values = torch.zeros(len(rows) + 2, device=self.device)
        values[-1] = stop
        self.optimizer.zero_grad(set_to_none=True)
        for d, piece in self.pieces:
            scores = self.router(rows[d])
            part = {name: values[piece] for name, values in batch.items()}
            x_start, y, noise = clean_latents(part, self.vae, self.device)
            mse = router_loss(self.dit, self.diffusion, scores, rows[d] + 1, x_start, y, noise, args.ste_threshold)
            share = len(mse) / args.global_batch_size
            (share * (mse.mean() + self.l1_weight * scores.sum())).backward()
            values[d] += mse.detach().sum() / self.draw_size
            values[-2] += share * scores.detach().sum()
        if self.processes.size > 1:
            values, self.reduced_bytes = reduce_gradients(self.router, drawn, values, self.processes)
        norm = torch.stack([self.router.routers[i].prob.grad.norm() for i in drawn]).sum()
        *errors, l1, told, norm = torch.cat([values, norm[None]]).tolist()  # waits for the device
        for d, error in enumerate([*errors, norm]):
            if not math.isfinite(error):
                where = f"of draw {d}, step {rows[d] + 1}," if d < len(rows) else "or its gradient"
                raise self.processes.error(
                    f"the loss {where} in update {self.step + 1} is not finite ({error}): try --dtype fp32 or a lower "
                    "--lr, and look at the weights; the router of before is kept"
                )
        self.optimizer.step()
        self.router.clamp_()
        self.step += 1
        if self.control:
            ahead = min(2, (self.updates - self.step) / self.control.response)
            share = (self.heading(ahead) <= args.thres).sum().item() / self.layers
            self.l1_weight = self.control.adjust(self.l1_weight, share)
        for row, error in zip(rows, errors):
            self.window["mse"][row] += error
            self.window["draws"][row] += 1
        self.window["l1"] += l1
        self.window["updates"] += 1
        return told > 0

    @torch.no_grad()
    def heading(self, ahead):
        """The scores of the trained steps, float32 [rows, 2*depth], so many response times ahead at Adam's pace."""
        scores = []
        for i in self.trained:
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
        """What the log says of the updates since `new_window`, and of the router as it stands: a dict for JSON."""
        seen, window, trained = self.window["updates"], self.window, self.trained
        schedule = self.router.schedule(self.args.thres)
        costs = self.dit.multiply_adds()
        mse, l1 = sum(window["mse"]) / sum(window["draws"]), window["l1"] / seen
        drawn = [i for i in trained if window["draws"][i]]
        moments = {i: self.optimizer.state.get(self.router.routers[i].prob) for i in trained}
        cached = int((~schedule.compute).sum())
        return {
            "step": self.step,
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
