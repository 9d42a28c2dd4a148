"""What a user writes to speed up a `DiTPipeline` of diffusers, for each peer of `benchmarks.peers`, and for ours.

A set-up is a function (pipe, steps, **settings). It changes `pipe`, and may return a function that makes the context
manager that each later call of the pipeline needs. Its body is what a user writes (`statements_of_user`), so each
does what its library asks for and nothing else.
"""

import ast
import inspect
import textwrap
from contextlib import nullcontext, redirect_stdout
from functools import partial
from io import StringIO


def plain(pipe, steps):
    """Nothing."""


def dbcache(pipe, steps, threshold, first=1, warmup=4, in_a_row=-1, order=None):
    """cache-dit. Its defaults (8 first blocks, 8 steps of warm-up, threshold 0.08) skip nothing here in 20 steps."""
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=first,
        Bn_compute_blocks=0,
        residual_diff_threshold=threshold,
        max_warmup_steps=warmup,
        max_continuous_cached_steps=in_a_row,
        enable_separate_cfg=False,
        num_inference_steps=steps,
    )
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)


def smoothcache(pipe, steps, schedule):
    """dit-smoothcache. It has no calibration, and its class for diffusers leaves out the MLPs."""
    from diffusers.models.attention import BasicTransformerBlock
    from SmoothCache.smooth_cache_helper import SmoothCacheHelper

    helper = SmoothCacheHelper(pipe.transformer, BasicTransformerBlock, ["attn1", "ff"], schedule)
    helper.enable()

    def before_each_call():
        helper.reset_state()  # otherwise the second call caches nothing
        return redirect_stdout(StringIO())  # it prints a line for each layer call

    return before_each_call


def first_block_cache(pipe, steps, threshold):
    """diffusers. DiT's class has no `enable_cache`, and its pipeline sets no `cache_context`."""
    from diffusers import FirstBlockCacheConfig
    from diffusers.models.cache_utils import CacheMixin

    model = pipe.transformer
    model.__class__ = type("CachedDiT", (type(model), CacheMixin), {})
    model.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    return partial(model.cache_context, "both halves")


def taylorseer(pipe, steps, interval, order=1):
    """diffusers. The names of layers that it looks for by default match none of DiT's, without a message."""
    import torch
    from diffusers import TaylorSeerCacheConfig
    from diffusers.models.cache_utils import CacheMixin

    model = pipe.transformer
    model.__class__ = type("CachedDiT", (type(model), CacheMixin), {})
    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=2,
        disable_cache_after_step=steps - 1,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"transformer_blocks\.\d+\.(attn1|ff)"],
    )
    model.enable_cache(config)
    return partial(model.cache_context, "both halves")


def magcache(pipe, steps, threshold, retention=0.2, in_a_row=3):
    """diffusers. It prints the ratios of its calibration and keeps them nowhere.

    retention: share of the steps that run first, in full; in_a_row: steps that may be skipped one after another.
    """
    import json
    import re

    from diffusers import MagCacheConfig
    from diffusers.models.cache_utils import CacheMixin

    model = pipe.transformer
    model.__class__ = type("CachedDiT", (type(model), CacheMixin), {})
    model.enable_cache(MagCacheConfig(num_inference_steps=steps, calibrate=True))
    with redirect_stdout(StringIO()) as printed, model.cache_context("both halves"):
        pipe(class_labels=[0, 1, 2, 3], num_inference_steps=steps)
    ratios = json.loads(re.findall(r"\[[\d., e-]+\]", printed.getvalue())[0])
    model.disable_cache()
    settings = {"threshold": threshold, "retention_ratio": retention, "max_skip_steps": in_a_row}
    model.enable_cache(MagCacheConfig(num_inference_steps=steps, mag_ratios=ratios, **settings))
    return partial(model.cache_context, "both halves")


def hicache(pipe, steps, interval, order=2):
    """hicache-pp. It has no hook: the user wraps the model, or writes the denoising loop."""
    import hicache_pp
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    forward = pipe.transformer.forward
    state = hicache_pp.hicache_init(num_steps=steps, interval=interval, max_order=order, end_enhance=steps - 1)

    def forecasting(*args, **kwargs):
        if hicache_pp.hicache_decide(state) == "forecast":
            output = hicache_pp.hicache_forecast(state)
        else:
            output = forward(*args, **kwargs).sample
            hicache_pp.hicache_update_derivatives(state, output)
        state["step"] += 1
        return Transformer2DModelOutput(sample=output)

    def before_each_call():
        hicache_pp.hicache_reset(state)
        return nullcontext()

    pipe.transformer.forward = forecasting
    return before_each_call


def ours(pipe, steps, schedule):
    """Our adapter."""
    from pretrained.diffusers_pipeline import accelerate

    accelerate(pipe, schedule)


def our_sampler(dit, steps, z, y, cfg_scale, schedule=None, noise_scale=(1, 1), progress=None):
    """Our sampler instead of the pipeline, with the timesteps of the pipeline."""
    from diffusion import create_diffusion
    from sampling import sample_latents

    diffusion = create_diffusion(f"ddim{steps}", noise_scale=noise_scale)
    return sample_latents(dit, diffusion, z, y, cfg_scale, schedule, progress=progress)


def statements_of_user(setup):
    """Statements in the body of a set-up, without its docstring.

    One that returns what makes the context manager stands for the `with` of later calls.
    """
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(setup))).body
    return sum(isinstance(node, ast.stmt) for part in function.body[1:] for node in ast.walk(part))


def make_pipeline(dit, vae):
    """A DiTPipeline of a DiT, whose call stops at the latents and begins with `latents` instead of its own noise.

    It has a class of its own, since cache-dit changes the class of a pipeline, which it knows by its first letters.
    """
    import torch
    from diffusers import DDIMScheduler, DiTPipeline

    from diffusion import noise_factors
    from models import Guidance
    from pretrained.diffusers_layout import NULL_CLASS, to_diffusers

    class DiTLatents(DiTPipeline):
        @torch.no_grad()
        def predict_noise(self, x, t, labels, guidance_scale):
            """The guided noise of x (2N, C, H, W), twice N images, at timestep t; half of the labels are null."""
            output = self.transformer(x, timestep=t.expand(len(x)), class_labels=labels).sample
            return Guidance.of(guidance_scale).apply(output, t / 1000)[:, : x.shape[1]]

        @torch.no_grad()
        def __call__(
            self,
            class_labels,
            guidance_scale=4.0,
            num_inference_steps=50,
            latents=None,
            noise_scale=(1, 1),
            progress=iter,
            observe=lambda x, t, labels, noise: None,
        ):
            """Denoise latents (N, C, H, W), in the loop of DiTPipeline. guidance_scale: also a `Guidance`.

            noise_scale: as for `GaussianDiffusion`. observe: called with what `predict_noise` got and returned.
            """
            if latents is None:
                side = self.transformer.config.sample_size
                latents = torch.randn(len(class_labels), self.transformer.config.in_channels, side, side)
            labels = torch.tensor(class_labels)
            labels = torch.cat([labels, torch.full_like(labels, NULL_CLASS)])
            self.scheduler.set_timesteps(num_inference_steps)
            x = torch.cat([latents, latents])
            for t in progress(self.scheduler.timesteps):
                half = x[: len(x) // 2]
                x = torch.cat([half, half])
                noise = self.predict_noise(x, t, labels, guidance_scale)
                observe(x, t, labels, noise)
                (factor,) = noise_factors(noise_scale, [t / 1000])
                x = self.scheduler.step(noise * factor, t, x).prev_sample
            self.maybe_free_model_hooks()
            return x[: len(x) // 2]

    scheduler = DDIMScheduler(beta_start=1e-4, clip_sample=False)  # betas as published
    return DiTLatents(to_diffusers(dit), vae, scheduler)


def count_layers(model, sample, steps, depth):
    """sample(progress=...), and the layers of `model` that ran meanwhile: bool [steps, depth, 2], the first step first.

    Hooks count the first linear layer of attention and MLP, ours and diffusers'. Hooks on the layers themselves would
    count calls that are answered from a cache.
    """
    import re

    import torch

    ran, step = torch.zeros(steps, depth, 2, dtype=torch.bool), -1

    def steps_of(iterable):
        nonlocal step
        for item in iterable:
            step += 1
            yield item

    def count(l, k, *_):
        ran[step, l, k] = True

    handles = []
    for name, module in model.named_modules():
        found = re.search(r"blocks\.(\d+)\.(?:(attn1\.to_q|attn\.qkv)|(ff\.net\.0\.proj|mlp\.fc1))$", name)
        if found:
            handles.append(module.register_forward_hook(partial(count, int(found[1]), int(bool(found[3])))))
    try:
        return sample(progress=steps_of), ran
    finally:
        for handle in handles:
            handle.remove()
