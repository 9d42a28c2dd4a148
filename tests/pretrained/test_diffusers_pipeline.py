"""A schedule in diffusers' DiTPipeline, against our own sampler, and the demo."""

import gc
import weakref

import pytest
import torch
from conftest import call, random_vae
from diffusers import DDIMScheduler, DiTPipeline, DPMSolverMultistepScheduler, HeunDiscreteScheduler
from small_models import difference, load, random_transformer

import sampling
from diffusion import create_diffusion
from pretrained.diffusers_pipeline import accelerate
from router import Router
from schedule import Schedule

LABELS = [1, 999]


@pytest.fixture
def pipe():
    return random_pipeline()


def random_pipeline(**config):
    transformer = random_transformer(num_embeds_ada_norm=1000, **config)
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)  # as published
    pipe = DiTPipeline(transformer, random_vae(channels=transformer.config.in_channels), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe, guidance_scale=4.0, steps=20):
    """The latents that the pipeline decodes, for LABELS from the noise of seed 0."""
    decoded = []
    decode = pipe.vae.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.vae, "decode", lambda latents: decoded.append(latents) or decode(latents))
        pipe(LABELS, guidance_scale, torch.Generator().manual_seed(0), steps, output_type="pt")
    return decoded[0] * pipe.vae.config.scaling_factor


def random_schedule(steps=20):
    return Router(steps, 3, torch.Generator().manual_seed(0)).schedule(0.5)


# With three channels both samplers guide all; with four, ours leaves the last channel unguided.
@pytest.mark.parametrize(("channels", "guidance_scale"), [(3, 4.0), (4, 1.0)])
@pytest.mark.parametrize("steps", [20, 10])
def test_a_pipeline_samples_the_same_as_our_sampler_from_its_folder(tmp_path, channels, guidance_scale, steps):
    pipe = random_pipeline(in_channels=channels, out_channels=2 * channels)
    pipe.save_pretrained(tmp_path)
    dit, diffusion = load(tmp_path), create_diffusion(f"ddim{steps}")
    z = torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    inputs = dit, diffusion, z, torch.tensor(LABELS), guidance_scale
    plain = sampling.sample_latents(*inputs)
    assert difference(latents_of(pipe, guidance_scale, steps), plain) < 1e-5
    accelerate(pipe, random_schedule(steps))
    routed = sampling.sample_latents(*inputs, random_schedule(steps))
    assert difference(latents_of(pipe, guidance_scale, steps), routed) < 1e-5
    assert difference(routed, plain) > 1e-2


def test_each_call_starts_anew(pipe):
    transformer, plain = pipe.transformer, latents_of(pipe)
    accelerate(pipe, random_schedule())
    first = latents_of(pipe)
    assert torch.equal(latents_of(pipe), first)
    # A call that is interrupted leaves nothing behind.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.scheduler, "step", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            latents_of(pipe)
    assert torch.equal(latents_of(pipe), first)
    pipe.transformer = transformer
    assert torch.equal(latents_of(pipe), plain)


@pytest.mark.filterwarnings("ignore:__array__")  # of diffusers
def test_a_schedule_that_does_not_fit_the_pipeline_is_refused(pipe):
    with pytest.raises(ValueError, match="12 blocks, the pipeline's model has 3"):
        accelerate(pipe, Schedule.full(20, 12))
    accelerate(pipe, random_schedule())
    with pytest.raises(ValueError, match="schedule is for 20 steps, the pipeline runs 10: pass num_inference_steps=20"):
        latents_of(pipe, steps=10)
    latents = latents_of(pipe)
    with pytest.raises(ValueError, match="all steps"):  # called more often than there are steps
        pipe.transformer(latents, torch.zeros(2), torch.tensor(LABELS))
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert latents_of(pipe).isfinite().all()
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)  # calls the model twice per step
    with pytest.raises(ValueError, match="HeunDiscreteScheduler calls the model 2 times a step"):
        latents_of(pipe)


def test_weights_are_shared_half_precision_stays_and_the_cache_ends_with_the_call(pipe):
    pipe.to(torch.bfloat16)
    before = pipe.transformer.transformer_blocks[1].ff.net[2].weight
    accelerate(pipe, random_schedule())
    assert pipe.transformer.dit.blocks[1].mlp.fc2.weight.data_ptr() == before.data_ptr()
    slots, empty_cache = [], pipe.transformer.dit.empty_cache
    pipe.transformer.dit.empty_cache = lambda order: slots.append(empty_cache(order)) or slots[-1]
    assert pipe.dtype == pipe.transformer.dtype == latents_of(pipe).dtype == torch.bfloat16
    output = weakref.ref(slots.pop()[0][0])
    gc.collect()
    assert output() is None


def test_the_demo_makes_a_picture(tmp_path, capfd):
    result = call("demo/diffusers_pipeline.py", "--tiny", "--out", tmp_path / "x.png", capfd=capfd)
    assert result.returncode == 0, result.stderr
    assert "(full)" in result.stdout and "(router)" in result.stdout and (tmp_path / "x.png").exists()
