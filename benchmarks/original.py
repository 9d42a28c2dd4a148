"""What the original implementation computes, in the plain operations in which it does; ours is measured against it."""

from functools import partial


def plain_modulate(x, shift, scale):
    """x (N, T, D) scaled and shifted by per-sample vectors (N, D), in two operations."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def attention(block, x, shift, scale):
    return block.attn(plain_modulate(block.norm1(x), shift, scale))


def mlp(block, x, shift, scale):
    return block.mlp(plain_modulate(block.norm2(x), shift, scale))


def plain_forward(dit, x, t, y, layer):
    """What `DiT.forward` computes: (N, 2C, H, W).

    layer: a function (l, k, run) -> output (N, T, D) of attention (k = 0) or MLP (k = 1) of block l; run() computes it.
    """
    x = dit.x_embedder(x) + dit.pos_embed
    c = dit.t_embedder(t) + dit.y_embedder(y)
    for l, block in enumerate(dit.blocks):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * layer(l, 0, partial(attention, block, x, shift_a, scale_a))
        x = x + gate_m.unsqueeze(1) * layer(l, 1, partial(mlp, block, x, shift_m, scale_m))
    shift, scale = dit.final_layer.adaLN_modulation(c).chunk(2, dim=1)
    x = dit.final_layer.linear(plain_modulate(dit.final_layer.norm_final(x), shift, scale))
    return dit.unpatchify(x)


def original_loss(dit, diffusion, scores, i, x_start, y, noise):
    """`router.router_loss` as the original implementation goes about it; the same arguments, the same values (N,).

    Without gradients are the pass that fills the cache and the DDIM step. The loss is differentiated through the
    teacher as through the student, and with respect to every parameter of `dit` that requires a gradient.
    """
    import torch

    before, at = (torch.full_like(y, int(diffusion.timestep_map[step])) for step in (i - 1, i))
    cached = {}

    def fill(l, k, run):
        cached[l, k] = run()
        return cached[l, k]

    def blend(l, k, run):
        return scores[l, k] * run() + (1 - scores[l, k]) * cached[l, k]

    with torch.no_grad():
        x = diffusion.q_sample(x_start, i, noise)
        x = diffusion.ddim_step(plain_forward(dit, x, at, y, fill), x, i)
    teacher = plain_forward(dit, x, before, y, lambda l, k, run: run())
    student = plain_forward(dit, x, before, y, blend)
    return ((teacher - student) ** 2).flatten(1).mean(1)


def original_latents(dit, diffusion, z, y, cfg_scale, schedule=None):
    """`sampling.sample_latents` by DDIM as the original implementation goes about it: latents (N, C, H, W).

    Each step asks the device for its timestep, whose place in the schedule is looked up; each layer asks whether its
    number is in a tensor. Coefficients are gathered from tensors, the variance is computed, noise is drawn for nothing.
    The model always runs on [x, x], so cfg_scale is not 1.
    """
    import torch

    device, steps = z.device, diffusion.steps
    place = {int(t): i for i, t in enumerate(diffusion.timestep_map)}
    running = {}
    for i in range(steps if schedule else 0):
        if not schedule.compute[i].all():
            running[i] = schedule.compute[i].flatten().nonzero()[:, 0]
    cached = {}

    def model(x, t, y):
        i = place[t[0].item()]

        def layer(l, k, run):
            if i not in running or 2 * l + k in running[i]:
                cached[l, k] = run()
            return cached[l, k]

        half = x[: len(x) // 2]
        output = plain_forward(dit, torch.cat([half, half]), t, y, layer)
        noise, rest = output[:, :3], output[:, 3:]
        cond, uncond = noise.chunk(2)
        noise = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([noise, noise]), rest], dim=1)

    def coefficient(values, i, like):
        return torch.from_numpy(values).to(device)[i].float().reshape(-1, 1, 1, 1).expand_as(like)

    tables = diffusion._tables
    timestep_map = torch.as_tensor(diffusion.timestep_map, device=device)
    y, x = torch.cat([y, torch.full_like(y, dit.num_classes)]), torch.cat([z, z])
    with torch.no_grad():
        for step in range(steps - 1, -1, -1):
            i = torch.full((len(x),), step, device=device)
            predicted, variance = model(x, timestep_map[i], y).chunk(2, dim=1)
            low = coefficient(tables["posterior_log_variance"], i, x)
            fraction = (variance + 1) / 2
            torch.exp(fraction * coefficient(tables["log_betas"], i, x) + (1 - fraction) * low)
            recip = coefficient(tables["sqrt_recip_alphas_cumprod"], i, x)
            recipm1 = coefficient(tables["sqrt_recipm1_alphas_cumprod"], i, x)
            start = recip * x - recipm1 * predicted
            noise = (recip * x - start) / recipm1
            previous = coefficient(tables["alphas_cumprod_prev"], i, x)
            torch.randn_like(x)
            x = start * torch.sqrt(previous) + torch.sqrt(1 - previous) * noise
    return x[: len(z)]
