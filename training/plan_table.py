"""The table behind a learned plan: what the reuse of each layer at each step does to the final latents.

A plan is run with its forecasts, and every layer that it reuses is also computed on the inputs that it has there. A
forecast differs from that fresh output f by a weighted sum of the differences between earlier fresh outputs and f, and
back-propagation from the final latents tells how far such a difference moves them. `error_table` keeps the mean squares
and products of these movements, from which `training.plan_search` knows the error of any other plan nearby.

Steps are counted here in the order in which they run, e = steps-1-i, and layers as n = 2*l + k.
"""

from collections import deque
from functools import partial

import torch

from models import Guidance, modulate

# Bytes for the outputs and gradients of the samples that are handled at once, on the device. DiT-XL/2 at 256 x 256
# takes one sample at a time and 10 GB in float32, beside its 2.7 GB of weights.
MEMORY = 2**30
ACTIVATIONS = 20  # tensors (T, D) per layer in the graph of one step


class Trajectory:
    """The steps of DDIM, or of Euler, for some samples, one by one, with access to the output of each layer.

    dit: frozen. y: labels (N,). cfg_scale: guidance; 1 is none.
    """

    def __init__(self, dit, diffusion, y, cfg_scale):
        self.dit, self.diffusion, self.cfg_scale = dit, diffusion, cfg_scale
        self.y = y if cfg_scale == 1.0 else torch.cat([y, torch.full_like(y, dit.num_classes)])
        self.timesteps, self.times = diffusion.timesteps(y.device), diffusion.times.tolist()

    def step(self, x, e, output_of):
        """Return x (N, C, H, W) after step e.

        output_of: function (n, run) -> the output (R, T, D) of layer n before its gate, R = 2N with guidance, else N;
        run() computes it.
        """
        dit, i = self.dit, self.diffusion.steps - 1 - e
        with torch.no_grad():
            modulations = dit.modulations(dit.condition(self.timesteps[i].expand(len(self.y)), self.y))
        rows = x.repeat(len(self.y) // len(x), 1, 1, 1)
        stream = dit.x_embedder(rows.to(dit.pos_embed.dtype)).contiguous() + dit.pos_embed
        for l, block in enumerate(dit.blocks):
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulations[l].unsqueeze(2).unbind(1)
            run = partial(_run, block.attn, block.norm1, stream, shift_a, scale_a)
            stream = torch.addcmul(stream, gate_a, output_of(2 * l, run))
            run = partial(_run, block.mlp, block.norm2, stream, shift_m, scale_m)
            stream = torch.addcmul(stream, gate_m, output_of(2 * l + 1, run))
        output = dit.unpatchify(dit.final_layer(stream, modulations[-1])).to(x.dtype)
        if self.cfg_scale != 1.0:
            output = Guidance.of(self.cfg_scale).apply(output, self.times[i])[: len(x)]
        return self.diffusion.step(output, x, i)


def _run(layer, norm, stream, shift, scale):
    return layer(modulate(norm(stream), shift, scale))


def sources(schedule):
    """Per step e and layer n of a schedule: None if it runs, else its forecast as pairs (step that ran, weight)."""
    table, computed = [], [deque(maxlen=schedule.order + 1) for _ in range(2 * schedule.depth)]
    for e, row in enumerate(reversed(schedule.rows())):
        table.append([])
        for ran, decision in zip(computed, (decision for block in row for decision in block)):
            if decision is True:
                ran.appendleft(e)
                table[e].append(None)
            else:
                table[e].append(list(zip(ran, decision or (1.0,))))  # False reuses the last output
    return table


def forecast(pairs, n, outputs):
    """The forecast of layer n from the pairs of `sources`. outputs: of each step, a list of those of all layers."""
    return sum(outputs[e][n] * weight for e, weight in pairs)


def samples_at_once(dit, steps, window, directions, cfg_scale):
    """How many samples `error_table` can handle at once in `MEMORY` bytes, at least 1."""
    rows = 1 if cfg_scale == 1.0 else 2
    outputs = steps if dit.pos_embed.device.type == "cpu" else window + 1
    tensors = outputs + 4 * directions + ACTIVATIONS  # 4: gradients of this step, and of three earlier ones
    return max(1, MEMORY // (tensors * dit.cache_bytes(rows, dit.pos_embed.dtype)))


def error_table(dit, diffusion, schedule, z, y, vectors, cfg_scale, window, tick=lambda: None):
    """The table around a schedule, summed over samples and directions: float64 [steps, layers, window, window].

    Element [e, n, a-1, b-1] is the sum of p_a * p_b, where p_a is how far the final latents move along a direction if
    the output of layer n at step e is replaced by that of a steps before.
    z, y: noise (N, C, H, W) and labels (N,). vectors: the directions, (K, N, C, H, W). window: the largest age.
    tick: called twice a step. Memory: the outputs of all steps lie on the CPU, `window` of them on the device, and one
    step of the graph at a time. The gradient is exact: it passes through every step, computed or forecast.
    """
    path, plan = Trajectory(dit, diffusion, y, cfg_scale), sources(schedule)
    with torch.no_grad():
        inputs, outputs = _run_plan(path, plan, z, schedule, tick)
    table = torch.zeros(schedule.steps, 2 * schedule.depth, window, window, dtype=torch.float64)
    later = {}  # {(step, layer): gradient (K, R, T, D) that reaches its output from later steps that reuse it}
    near = {}  # outputs of the last steps before this one, on the device
    reach = max([window, *(e - s for e, row in enumerate(plan) for pairs in row for s, _ in pairs or ())])
    for e in reversed(range(schedule.steps)):
        for s in range(max(0, e - reach), e + 1):
            near[s] = near.get(s) or [output.to(z.device) for output in outputs[s]]
        vectors, gradients = _backward(path, plan[e], e, inputs[e], near, later, vectors)
        for n, gradient in enumerate(gradients):
            for s, weight in plan[e][n] or ():
                later[s, n] = later[s, n].add_(gradient, alpha=weight) if (s, n) in later else gradient * weight
            later.pop((e, n), None)
            ages = range(1, min(window, e) + 1)
            if ages:
                moved = _movements(gradient, [near[e - a][n] - near[e][n] for a in ages], len(z))
                table[e, n, : len(ages), : len(ages)] = (moved.T @ moved).cpu()
        del near[e], outputs[e]
        tick()
    return table


def _run_plan(path, plan, z, schedule, tick):
    """Run a plan; return x (N, C, H, W) before each step, and per step the fresh outputs of all layers, on the CPU."""
    x, inputs, outputs = z, [], []
    last = [deque(maxlen=schedule.order + 1) for _ in range(2 * schedule.depth)]
    for e, row in enumerate(plan):
        fresh = {}

        def output_of(n, run, row=row, fresh=fresh):
            fresh[n] = run()
            return fresh[n] if row[n] is None else sum(o * w for o, (_, w) in zip(last[n], row[n]))

        inputs.append(x)
        x = path.step(x, e, output_of)
        for n, pairs in enumerate(row):
            if pairs is None:
                last[n].appendleft(fresh[n])
        outputs.append([fresh[n].cpu() for n in range(len(row))])
        tick()
    return inputs, outputs


def _backward(path, row, e, x, near, later, vectors):
    """Gradients of step e: of x (K, N, C, H, W), and of what each layer adds to the stream, a list of (K, R, T, D).

    row: of `sources`. vectors: the gradients (K, N, C, H, W) of x after the step. The output of a layer that runs has
    a second gradient, from `later` steps that reuse it; it passes on to what that layer was computed from.
    """
    added, ran = [], []

    def output_of(n, run):
        if row[n] is None:
            output = run()
            if (e, n) in later:
                ran.append((output, later[e, n]))
            added.append(output.view_as(output))  # its gradient is that of this step alone
        else:
            added.append(forecast(row[n], n, near).requires_grad_())
        return added[-1]

    with torch.enable_grad():
        x = x.detach().requires_grad_()
        ends = [path.step(x, e, output_of), *(output for output, _ in ran)]
    grads = []
    for k, vector in enumerate(vectors):
        starts = [vector, *(gradient[k] for _, gradient in ran)]
        grads.append(torch.autograd.grad(ends, [x, *added], starts, retain_graph=k + 1 < len(vectors)))
    first, *others = map(torch.stack, zip(*grads))
    return first, others


def _movements(gradient, differences, samples):
    """Products of gradients (K, R, T, D) with differences, a list of A tensors (R, T, D): float64 (K * N, A)."""
    products = torch.einsum("krd,ard->kra", gradient.flatten(2), torch.stack(differences).flatten(2))
    # The rows with and without the label belong to one sample.
    return products.double().unflatten(1, (-1, samples)).sum(1).flatten(0, 1)
