"""A router in diffusers' DiTPipeline, against our own sampler; the example as a user runs it."""

import gc
import weakref

import pytest
import torch
from conftest import ROOT, random_vae, run
from diffusers import DDIMScheduler, DiTPipeline, DPMSolverMultistepScheduler, HeunDiscreteScheduler
from test_diffusers_layout import fixed_dit, random_transformer

import sampling
from diffusion import create_diffusion
from pretrained.diffusers_layout import to_diffusers
from pretrained.diffusers_pipeline import accelerate
from pretrained.loading import load_dit
from pretrained.spec import model_spec
from router import Router
from schedule import Schedule

LABELS = [1, 999]


def pipeline_of(transformer):
    """A DiTPipeline of the transformer with a random VAE, and the scheduler as published."""
    vae = random_vae(channels=transformer.config.in_channels)
    pipe = DiTPipeline(transformer, vae, DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe, guidance_scale=4.0, steps=20):
    """The latents that the pipeline decodes, for LABELS from the noise of seed 0."""
    decoded = []
    with pytest.MonkeyPatch.context() as patch:
        decode = pipe.vae.decode
        patch.setattr(pipe.vae, "decode", lambda latents: decoded.append(latents) or decode(latents))
        noise = torch.Generator().manual_seed(0)
        pipe(LABELS, guidance_scale, generator=noise, num_inference_steps=steps, output_type="pt")
    return decoded[0] * pipe.vae.config.scaling_factor


def our_latents(dit, guidance_scale=4.0, steps=20, schedule=None):
    """The same by our sampler."""
    shape = len(LABELS), dit.in_channels, dit.input_size, dit.input_size
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    diffusion = create_diffusion(f"ddim{steps}")
    return sampling.sample_latents(dit, diffusion, z, torch.tensor(LABELS), guidance_scale, schedule)


def difference(actual, expected):
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def router_schedule(steps=20, depth=3, seed=0):
    """Of a router with random scores: each even step reuses layers of its own."""
    return Router(steps, depth, torch.Generator().manual_seed(seed)).schedule(0.5)


# With three channels both samplers guide all there are; with four, ours leaves one alone.
@pytest.mark.parametrize(("channels", "guidance_scale"), [(3, 4.0), (4, 1.0)])
@pytest.mark.parametrize("steps", [20, 10])
def test_a_folder_of_diffusers_samples_here_what_its_pipeline_does(tmp_path, channels, guidance_scale, steps):
    transformer = random_transformer(in_channels=channels, out_channels=2 * channels, num_embeds_ada_norm=1000)
    pipe = pipeline_of(transformer)
    pipe.save_pretrained(tmp_path)
    dit = load_dit(model_spec(ckpt=str(tmp_path)), "cpu")
    plain = our_latents(dit, guidance_scale, steps)
    assert difference(latents_of(pipe, guidance_scale, steps), plain) < 1e-5
    schedule = router_schedule(steps)
    accelerate(pipe, schedule)
    routed = our_latents(dit, guidance_scale, steps, schedule)
    assert difference(latents_of(pipe, guidance_scale, steps), routed) < 1e-5
    assert difference(routed, plain) > 1e-2


def test_a_pipeline_of_our_model_samples_what_it_does_here():
    dit = fixed_dit(in_channels=3, num_classes=1000)
    pipe = pipeline_of(to_diffusers(dit))
    assert difference(latents_of(pipe), our_latents(dit)) < 1e-5
    accelerate(pipe, router_schedule())
    assert difference(latents_of(pipe), our_latents(dit, schedule=router_schedule())) < 1e-5


@pytest.fixture
def pipe():
    return pipeline_of(random_transformer(num_embeds_ada_norm=1000))


def test_each_call_starts_anew(pipe):
    transformer, plain = pipe.transformer, latents_of(pipe)
    accelerate(pipe, router_schedule())
    first = latents_of(pipe)
    assert torch.equal(latents_of(pipe), first)
    # One that is interrupted on its way leaves nothing behind.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.scheduler, "step", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            latents_of(pipe)
    assert torch.equal(latents_of(pipe), first)
    accelerate(pipe, router_schedule(10, seed=1))
    assert difference(latents_of(pipe, steps=10), our_latents(pipe.transformer.dit, steps=10)) > 1e-2
    accelerate(pipe, Schedule.full(20, 3))
    assert difference(latents_of(pipe), plain) < 1e-5
    pipe.transformer = transformer
    assert torch.equal(latents_of(pipe), plain)


@pytest.mark.filterwarnings("ignore:__array__")  # of diffusers
def test_another_number_of_steps_is_refused_and_the_next_call_works(pipe):
    accelerate(pipe, router_schedule())
    expected = latents_of(pipe)
    with pytest.raises(ValueError, match="schedule is for 20 steps, the pipeline runs 10: pass num_inference_steps=20"):
        latents_of(pipe, steps=10)
    assert torch.equal(latents_of(pipe), expected)
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)  # which calls the model twice a step
    with pytest.raises(ValueError, match="the pipeline runs 39"):
        latents_of(pipe)


@pytest.mark.filterwarnings("ignore:__array__")  # of diffusers
def test_another_scheduler_may_be_set_afterwards(pipe):
    accelerate(pipe, Schedule.full(20, 3))
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert latents_of(pipe).isfinite().all()


def test_the_model_is_not_called_more_often_than_there_are_steps(pipe):
    accelerate(pipe, router_schedule())
    latents = latents_of(pipe, 1.0)
    with pytest.raises(ValueError, match="all steps"):
        pipe.transformer(latents, torch.zeros(2), torch.tensor(LABELS))


def test_a_schedule_for_another_depth_is_refused(pipe):
    with pytest.raises(ValueError, match="12 blocks, the pipeline's model has 3"):
        accelerate(pipe, Schedule.full(20, 12))


def test_weights_are_shared_and_the_cache_ends_with_the_call(pipe):
    before = pipe.transformer.transformer_blocks[1].ff.net[2].weight
    accelerate(pipe, router_schedule())
    assert pipe.transformer.dit.blocks[1].mlp.fc2.weight.data_ptr() == before.data_ptr()
    slots = []
    empty_cache = pipe.transformer.dit.empty_cache
    pipe.transformer.dit.empty_cache = lambda: slots.append(empty_cache()) or slots[-1]
    latents_of(pipe)
    output = weakref.ref(slots.pop()[0][0])
    gc.collect()
    assert output() is None


def test_a_pipeline_in_half_precision_stays_so(pipe):
    pipe.to(torch.bfloat16)
    accelerate(pipe, router_schedule())
    assert pipe.dtype == pipe.transformer.dtype == latents_of(pipe).dtype == torch.bfloat16


def test_the_example_runs_as_a_user_runs_it(tmp_path):
    result = run("examples/diffusers_pipeline.py", "--tiny", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "(full)" in result.stdout and "(router)" in result.stdout and (tmp_path / "diffusers_pipeline.png").exists()


def test_the_three_lines_are_the_same_everywhere():
    readme, module = ((ROOT / name).read_text() for name in ("docs/guide.md", "dit_pipeline.py"))
    lines = [line.strip() for line in module.splitlines() if line.startswith("    ")][:3]
    assert [line.partition("=")[0].strip() for line in lines][::2] == ["pipe", "images"]
    assert all(line in readme for line in lines)
