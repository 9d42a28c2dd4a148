"""A policy in diffusers' DiTPipeline, against our own sampler, and the demo."""

import functools
import gc
import json
import math
import re
import warnings
import weakref

import diffusers
import pytest
import torch
from conftest import assert_refused, call, random_vae
from diffusers import DDIMScheduler, DiTPipeline
from safetensors.torch import save_file
from small_models import difference, fixed_dit, load, random_transformer, refusal, same

import sampling
from diffusion import create_diffusion
from models import Guidance
from pretrained.diffusers_layout import to_diffusers
from pretrained.diffusers_pipeline import accelerate, load_pipeline
from router import Router
from runtime import devices
from schedule import Schedule
from training.policies import make_schedule

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array"),  # of diffusers, with NumPy 2
    pytest.mark.filterwarnings("ignore:the schedule skips nothing"),
]
LABELS = [1, 999]
SINGLE = ["DDIM", "DPMSolverMultistep", "EulerDiscrete", "UniPCMultistep"]  # that call the model once a step


@pytest.fixture
def pipe():
    return random_pipeline()


def random_pipeline(**config):
    transformer = random_transformer(num_embeds_ada_norm=1000, **config)
    return make_pipeline(transformer, random_vae(channels=transformer.config.in_channels))


def make_pipeline(transformer, vae):
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)  # as published
    return quiet(DiTPipeline(transformer, vae, scheduler))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe, guidance_scale=4.0, steps=20, labels=LABELS):
    """The latents that the pipeline decodes, for `labels` from the noise of seed 0."""
    decoded = []
    decode = pipe.vae.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.vae, "decode", lambda latents: decoded.append(latents) or decode(latents))
        pipe(labels, guidance_scale, torch.Generator().manual_seed(0), steps, output_type="pt")
    return decoded[0] * pipe.vae.config.scaling_factor


def our_latents(dit, guidance_scale, labels, schedule=None):
    """The same by our sampler, with 20 steps."""
    z = torch.randn(len(labels), dit.in_channels, 4, 4, generator=torch.Generator().manual_seed(0))
    return sampling.sample_latents(dit, create_diffusion("ddim20"), z, torch.tensor(labels), guidance_scale, schedule)


def use(pipe, scheduler):
    pipe.scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(pipe.scheduler.config)


def random_schedule(steps=20):
    return Router(steps, 3, torch.Generator().manual_seed(0)).schedule(0.5)


def save_model_folder(folder, **entries):
    """A model folder of ours that diffusers can run: five classes, and the fixed positions."""
    sizes = dict(input_size=4, hidden_size=24, depth=3, num_heads=2, num_classes=5)
    config = {"model": sizes, "image_size": 8, "class_names": list("abcde"), "vae": "vae"}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | entries))
    save_file(fixed_dit().state_dict(), folder / "dit.safetensors")
    random_vae().save_pretrained(folder / "vae")
    return folder


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
    accelerate(pipe, random_schedule(steps), noise_scale=(0.9, 0.5))
    diffusion = create_diffusion(f"ddim{steps}", noise_scale=(0.9, 0.5))
    scaled = sampling.sample_latents(dit, diffusion, *inputs[2:], random_schedule(steps))
    assert difference(latents_of(pipe, guidance_scale, steps), scaled) < 1e-5
    assert difference(scaled, routed) > 1e-3
    scaled = latents_of(pipe, guidance_scale, steps)
    accelerate(pipe, random_schedule(steps), noise_scale=0.9)
    everywhere = latents_of(pipe, guidance_scale, steps)
    accelerate(pipe, random_schedule(steps), noise_scale=(0.9, 1))
    assert torch.equal(latents_of(pipe, guidance_scale, steps), everywhere) and not torch.equal(scaled, everywhere)


@pytest.mark.parametrize("cfg_channels", [3, 4, None])
@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
def test_a_model_of_ours_samples_the_same_in_a_pipeline_whatever_its_classes_and_guided_channels(
    cfg_channels, guidance_scale
):
    dit, labels = fixed_dit(num_classes=5), [1, 4]
    pipe = make_pipeline(to_diffusers(dit, cfg_channels), random_vae())
    guidance = Guidance(guidance_scale, cfg_channels or 4)
    schedule = random_schedule().with_order(2)
    plain, routed = (our_latents(dit, guidance, labels, plan) for plan in (None, schedule))
    assert difference(latents_of(pipe, guidance_scale, labels=labels), plain) < 1e-5
    accelerate(pipe, schedule)
    assert difference(latents_of(pipe, guidance_scale, labels=labels), routed) < 1e-5
    other = 4 if cfg_channels == 3 else 3
    accelerate(pipe, schedule, cfg_channels=other)
    as_other = our_latents(dit, Guidance(guidance_scale, other), labels, schedule)
    assert difference(latents_of(pipe, guidance_scale, labels=labels), as_other) < 1e-5
    assert guidance_scale == 1 or difference(as_other, routed) > 1e-2


def test_a_pipeline_guides_no_batch_that_is_not_guided(pipe):
    labels = [1, 1000]  # the second image is one without a class
    plain = latents_of(pipe, 1.0, labels=labels)
    accelerate(pipe, Schedule.full(20, 3), cfg_channels=3)
    assert difference(latents_of(pipe, 1.0, labels=labels), plain) < 1e-5


@pytest.mark.parametrize("labels", [[1], [0, 1, 2, 3, 4]])
def test_an_odd_batch_without_guidance_runs_whatever_channels_are_guided(labels):
    dit = fixed_dit(num_classes=5)
    pipe = make_pipeline(to_diffusers(dit, 3), random_vae())
    plain = our_latents(dit, 1.0, labels)
    assert difference(latents_of(pipe, 1.0, labels=labels), plain) < 1e-5
    accelerate(pipe, Schedule.full(20, 3))
    assert difference(latents_of(pipe, 1.0, labels=labels), plain) < 1e-5


@pytest.mark.parametrize("channels", [0, 5, 2.5, "3"])
def test_channels_that_the_model_has_not_are_refused(pipe, channels):
    with pytest.raises(ValueError, match=f"^cfg_channels {channels!r} is no whole number from 1 to 4, [^\n]*$"):
        accelerate(pipe, random_schedule(), cfg_channels=channels)


def test_noise_scales_that_the_command_line_refuses_are_refused(pipe):
    for scale, text in {
        (3, 1): "3 1",
        (-0.98, 1): "-0.98 1",
        (0.98, 2): "0.98 2",
        (0.98, 0): "0.98 0",
        (0.98, 0.5, 1): "0.98 0.5 1",
        (math.nan, 1): "nan 1",
        (0.98, math.nan): "0.98 nan",
        (): "",
        0.4: "0.4",
    }.items():
        with pytest.raises(ValueError, match=f"^noise_scale {text}: pass a factor from 0.5 to 2[^\n]*$"):
            accelerate(pipe, random_schedule(), noise_scale=scale)
    assert type(pipe.transformer).__name__ == "DiTTransformer2DModel"


def test_each_call_caches_as_the_first_did(pipe):
    ran = []
    with accelerate(pipe, "fora", interval=3, forecast=2) as acceleration:
        for block in pipe.transformer.dit.blocks:
            block.attn.qkv.register_forward_hook(lambda *_: ran.append("attention"))
            block.mlp.fc1.register_forward_hook(lambda *_: ran.append("mlp"))
        first = latents_of(pipe)
        assert len(ran) == 2 * 3 * 7  # steps 0, 3, ... 18
        # A call that is interrupted leaves nothing behind.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipe.scheduler, "step", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                latents_of(pipe)
        ran.clear()
        assert torch.equal(latents_of(pipe), first)
        assert len(ran) == 2 * 3 * 7
        ran.clear()
        latents_of(pipe, steps=7)  # a policy by name serves any number of steps
        assert len(ran) == 2 * 3 * 3 and acceleration.schedule.steps == 7


def state_of(pipe):
    """Everything that an acceleration could leave behind."""
    model = pipe.transformer
    modules = {name: (type(module), sorted(vars(module))) for name, module in model.named_modules()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    weights = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    return id(model), modules, hooks, weights, dict(pipe.config), sorted(vars(pipe))


def test_nothing_is_left_after_disable_or_a_with_block(pipe):
    before, plain = state_of(pipe), latents_of(pipe)
    first = accelerate(pipe, random_schedule())
    routed = latents_of(pipe)
    assert difference(routed, plain) > 1e-2
    with accelerate(pipe, "fora", interval=2):
        assert not torch.equal(latents_of(pipe), routed)
    assert torch.equal(latents_of(pipe), routed)  # a block leaves the pipeline as it found it
    accelerate(pipe, "fora", interval=2).disable()  # `disable` without any policy
    assert state_of(pipe) == before and torch.equal(latents_of(pipe), plain)
    first.disable()
    with pytest.raises(ZeroDivisionError), accelerate(pipe, random_schedule()):
        raise ZeroDivisionError
    assert state_of(pipe) == before


def test_a_block_can_be_entered_again(pipe):
    before, plain = state_of(pipe), latents_of(pipe)
    acceleration = accelerate(pipe, random_schedule())
    with acceleration:
        routed = latents_of(pipe)
    assert difference(routed, plain) > 1e-2
    pipe.to(torch.bfloat16)
    with acceleration:
        assert latents_of(pipe).dtype == pipe.transformer.dtype == torch.bfloat16
    pipe.to(torch.float32)
    with acceleration:  # the weights were rounded
        assert difference(latents_of(pipe), plain) > 1e-2
    acceleration.disable()
    with accelerate(pipe, "fora", interval=2) as other:
        model = pipe.transformer
        with acceleration:
            assert pipe.transformer is not model
        assert pipe.transformer is model
    with other:
        assert pipe.transformer is model
    assert state_of(pipe)[:3] == before[:3]  # moved weights lie elsewhere


def test_a_pipeline_is_saved_with_its_own_transformer(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "plain", variant="fp16")
    with accelerate(pipe, "fora", interval=2), accelerate(pipe, "fora", interval=3):
        for folder in ("first", "again"):
            pipe.save_pretrained(tmp_path / folder, variant="fp16")
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        pipe.save_pretrained(tmp_path / "compiled", variant="fp16")
        pipe.to(torch.bfloat16)
        pipe.save_pretrained(tmp_path / "moved")
    files = contents(tmp_path / "plain")
    assert len(files) == 6
    assert all(contents(tmp_path / folder) == files for folder in ("first", "again", "compiled"))
    again = DiTPipeline.from_pretrained(tmp_path / "moved").to(torch.bfloat16)
    assert same(again.transformer.state_dict(), pipe.transformer.state_dict())


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_pipeline_that_was_moved_meanwhile_works_after_disable(pipe):
    acceleration = accelerate(pipe, random_schedule())
    pipe.to(torch.bfloat16)
    acceleration.disable()
    assert latents_of(pipe).dtype == pipe.transformer.dtype == torch.bfloat16


def test_names_and_files_mean_what_they_mean_on_the_command_line(pipe, tmp_path):
    router, plan = tmp_path / "router.pt", tmp_path / "plan.json"
    Router(20, 3, torch.Generator().manual_seed(0)).save(router)
    random_schedule().with_order(1).save(plan)
    random_schedule().save(old := tmp_path / "plan.pt")
    cases = {
        ("dynamiclayer", "path", router): dict(threshold=0.5, forecast=2),
        ("schedule", "path", plan): {},
        ("fora", "interval", 4): dict(forecast=1),
        ("random", "cached", 0.3): {},
        ("first", "cached", 0.3): {},
        ("last", "cached", 0.3): {},
        ("smoothcache", "alpha", 0.5): dict(cfg_scale=4.0),
    }
    for (method, setting, value), more in cases.items():
        settings = {setting: value} | more
        with accelerate(pipe, method, **settings) as acceleration:
            latents_of(pipe)
            if method == "smoothcache":
                settings |= {"dit": pipe.transformer.dit}
        expected = make_schedule(method, 20, 3, **settings)
        assert acceleration.schedule.sha256() == expected.sha256() and expected.cached_share() > 0.1, method
    for file in (router, str(plan), old):  # alone: what it holds tells what it is
        with accelerate(pipe, file, forecast=1, **({"threshold": 0.5} if file == router else {})) as acceleration:
            assert acceleration.schedule.sha256() == random_schedule().with_order(1).sha256()


def test_the_summary_says_what_was_skipped_the_bound_and_the_time(pipe, capsys):
    acceleration = accelerate(pipe, "fora", interval=3, forecast=2)
    assert acceleration.seconds is None and "was not called yet" in acceleration.summary()
    latents_of(pipe)
    assert capsys.readouterr() == ("", "")  # nothing is printed
    bound = Schedule.every_nth(20, 3, 3).speedup_bound(pipe.transformer.dit.multiply_adds())
    words = "fora, interval 3, forecast 2: 65.0% of the layer calls of 20 steps skipped, so the speed-up is at most"
    assert (
        f"{words} {bound:.3f}" in acceleration.summary()
        and f"took {acceleration.seconds:.3f} s" in acceleration.summary()
    )
    assert acceleration.seconds > 0
    for scale, words in {
        (0.97, 0.5): ", noise_scale (0.97, 0.5)",
        0.97: ", noise_scale (0.97, 1.0)",
        (1, 0.5): "",
    }.items():
        acceleration = accelerate(pipe, "fora", interval=3, noise_scale=scale)
        assert acceleration.summary().startswith(f"fora, interval 3{words}: ")


def test_a_plan_that_skips_nothing_is_warned_of(pipe, tmp_path):
    Router(20, 3).save(router := tmp_path / "router.pt")
    full = Schedule.full(20, 3)
    full.save(plan := tmp_path / "plan.json")
    for policy, name, settings in (
        ("fora", "fora", {"interval": 1}),
        ("dynamiclayer", router, {"path": router, "threshold": 0}),
        (router, router, {"threshold": 0}),
        ("schedule", plan, {"path": plan}),
        (plan, plan, {}),
        (full, "the schedule", {}),
    ):
        text = re.escape(f"{name} skips nothing in 20 steps: change its setting, or pass another policy")
        with pytest.warns(UserWarning, match=f"^{text}$"):
            accelerate(pipe, policy, **settings)
            latents_of(pipe)


def test_what_does_not_fit_is_refused_in_one_line(pipe, tmp_path):
    router = tmp_path / "router.pt"
    Router(20, 3).save(router)
    torch.save(torch.ones(4), tmp_path / "bare.pt")
    flow = tmp_path / "flow.json"
    Schedule(torch.ones(20, 3, 2, dtype=torch.bool), process="flow-euler").save(flow)
    for policy, words in {
        Schedule.full(20, 12): "12 blocks, the pipeline's model has 3",
        "forra": "forra is neither a policy (dynamiclayer, schedule, fora,",
        str(tmp_path / "none.json"): "no such file",
        str(tmp_path / "bare.pt"): "bare.pt is not a router file",
        flow: "flow-euler, and a DiTPipeline runs diffusion",
    }.items():
        assert words in refusal(accelerate, pipe, policy)
    for policy, settings in {
        "fora": {},
        "schedule": {},
        router: {"interval": 3},
        random_schedule(): {"threshold": 0.5},
        "random": {"interval": 3},
    }.items():
        with pytest.raises(TypeError, match="interval|path|threshold|cached"):
            accelerate(pipe, policy, **settings)
    for settings in ({"interval": 0}, {"interval": 3, "forecast": 3}):
        with pytest.raises(ValueError):
            accelerate(pipe, "fora", **settings)
    with pytest.raises(TypeError, match="^interval 2.5 is no whole number$"):
        accelerate(pipe, "fora", interval=2.5)
    assert type(pipe.transformer).__name__ == "DiTTransformer2DModel"  # a refusal changes nothing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.transformer, "_hf_hook", "as after pipe.enable_model_cpu_offload()", raising=False)
        assert "accelerate it before it is offloaded" in refusal(accelerate, pipe, random_schedule())

    accelerate(pipe, "fora", interval=30)
    assert "interval 30 is more than the 20 steps: pass at most 20" in refusal(latents_of, pipe)
    for policy in (random_schedule(), router):
        accelerate(pipe, policy)
        text = refusal(latents_of, pipe, steps=10)
        assert "is for 20 steps, the pipeline runs 10: pass num_inference_steps=20" in text
        latents = latents_of(pipe)
        # called more often than there are steps
        assert "all steps" in refusal(pipe.transformer, latents, torch.zeros(2), torch.tensor(LABELS))


@pytest.mark.filterwarnings("ignore:EulerDiscreteScheduler")
@pytest.mark.parametrize("scheduler", SINGLE)
def test_schedulers_with_one_call_a_step_work_as_without_a_plan(pipe, scheduler):
    use(pipe, scheduler)
    plain = latents_of(pipe)
    with accelerate(pipe, Schedule.full(20, 3)):
        assert difference(latents_of(pipe), plain) < 1e-4
    with accelerate(pipe, random_schedule(), forecast=1) as acceleration:
        outputs = []
        pipe.transformer.register_forward_hook(lambda model, args, output: outputs.append(output.sample))
        routed = latents_of(pipe)
    assert difference(routed, plain) > 1e-2 and len(outputs) == acceleration.schedule.steps
    # The same with the layers of the plan, by hand.
    dit, cache, rows = load_as_dit(pipe), None, []

    def forward(x, timestep, class_labels):
        nonlocal cache
        if not rows:
            rows.extend(acceleration.schedule.rows())
            cache = dit.empty_cache(1)
        output = dit(x, timestep, class_labels, rows.pop(), cache)
        return diffusers.models.modeling_outputs.Transformer2DModelOutput(sample=output)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.transformer, "forward", forward)
        assert difference(routed, latents_of(pipe)) < 1e-4


def load_as_dit(pipe):
    from pretrained.diffusers_layout import dit_from_transformer

    return dit_from_transformer(pipe.transformer)


@pytest.mark.parametrize("scheduler", ["HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "PNDM"])
def test_schedulers_with_several_calls_a_step_are_refused(pipe, scheduler):
    accelerate(pipe, random_schedule())
    use(pipe, scheduler)  # after accelerating
    calls = "29 times in 20 steps" if scheduler == "PNDM" else "2 times a step"
    text = f"{scheduler}Scheduler calls the model {calls}, and a plan needs one call a step: set pipe.scheduler to"
    assert text in (message := refusal(latents_of, pipe)) and "Euler" not in message
    if scheduler != "PNDM":  # its timesteps must be set to show it
        assert text in refusal(accelerate, pipe, random_schedule())


@pytest.mark.parametrize("scheduler", SINGLE)
def test_a_scheduler_whose_first_noise_the_pipeline_does_not_scale_is_warned_of(pipe, scheduler):
    acceleration = accelerate(pipe, random_schedule())
    use(pipe, scheduler)
    found = []
    for do in (lambda: latents_of(pipe), acceleration.disable, lambda: accelerate(pipe, random_schedule())):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            do()
        found.append([str(warning.message) for warning in caught if "init_noise_sigma" in str(warning.message)])
    # diffusers' own picture is wrong: its first noise should have the deviation init_noise_sigma, and has 1.
    wrong = pipe.scheduler.init_noise_sigma != 1
    assert wrong == (scheduler == "EulerDiscrete")
    assert [len(texts) for texts in found] == [wrong, 0, wrong]
    assert all(
        text.startswith("EulerDiscreteScheduler needs") and "\n" not in text for texts in found for text in texts
    )


@pytest.mark.parametrize("when", ["before", "after", "before, in place", "after, in place"])
def test_it_works_under_torch_compile_which_compiles_the_blocks(pipe, when, monkeypatch):
    monkeypatch.setattr(devices, "compile_blocks", functools.partial(devices.compile_blocks, backend="eager"))
    with accelerate(pipe, "fora", interval=3, forecast=2):
        plain = latents_of(pipe)

    def compile_it():
        torch._dynamo.reset()
        if "place" in when:
            pipe.transformer.compile(backend="eager")
        else:
            pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        torch._dynamo.utils.counters.clear()

    if "before" in when:
        compile_it()
    compiled = pipe.transformer
    acceleration = accelerate(pipe, "fora", interval=3, forecast=2)
    if "after" in when:
        compile_it()
    for _ in range(2):
        assert difference(latents_of(pipe), plain) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # all blocks run, or all are forecast
    acceleration.disable()
    assert pipe.transformer is compiled


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


def test_a_model_folder_becomes_a_pipeline_and_comes_back_from_disk(tmp_path):
    folder = save_model_folder(tmp_path / "model")
    dit, labels = load(folder), [0, 4]
    expected = our_latents(dit, 2.0, labels)
    pipe = quiet(load_pipeline(folder))
    assert difference(latents_of(pipe, 2.0, labels=labels), expected) < 1e-5
    assert pipe.get_label_ids(["b"]) == [1]
    four = quiet(load_pipeline(folder, cfg_channels=4))
    assert difference(latents_of(four, 2.0, labels=labels), our_latents(dit, Guidance(2.0, 4), labels)) < 1e-5

    pipe.save_pretrained(tmp_path / "saved")
    with pytest.raises(IndexError):  # diffusers knows nothing of the null class
        latents_of(quiet(DiTPipeline.from_pretrained(tmp_path / "saved")), 2.0, labels=labels)
    again = quiet(load_pipeline(tmp_path / "saved"))
    assert difference(latents_of(again, 2.0, labels=labels), expected) < 1e-5
    with accelerate(again, random_schedule()):
        assert (
            difference(latents_of(again, 2.0, labels=labels), our_latents(dit, 2.0, labels, random_schedule())) < 1e-5
        )


def test_models_that_no_pipeline_can_run_are_refused(tmp_path):
    flow = save_model_folder(tmp_path / "flow", process="flow")
    assert "flow is a flow model, and a DiTPipeline of diffusers runs diffusion" in refusal(load_pipeline, flow)
    moved = save_model_folder(tmp_path / "moved")
    config = json.loads((moved / "vae" / "config.json").read_text())
    (moved / "vae" / "config.json").write_text(json.dumps(config | {"shift_factor": 0.1}))
    assert "shift_factor" in refusal(load_pipeline, moved)
    save_file(fixed_dit().state_dict() | {"pos_embed": torch.zeros(1, 4, 24)}, moved / "dit.safetensors")
    (moved / "vae" / "config.json").write_text(json.dumps(config))
    assert "moved cannot run in diffusers: the positions" in refusal(load_pipeline, moved)


def test_the_demo_makes_a_picture_and_a_record(tmp_path, capfd):
    result = call("demo/diffusers_pipeline.py", "--tiny", "--out", tmp_path / "x.png", capfd=capfd)
    assert result.returncode == 0, result.stderr
    assert "(full)" in result.stdout and "(fora)" in result.stdout and (tmp_path / "x.png").exists()
    random_schedule(7).save(plan := tmp_path / "plan.json")
    flags = ["--pipeline", save_model_folder(tmp_path / "model"), "--path", plan, "--out", tmp_path / "y.png"]
    flags += ["--scheduler", "dpm++", "--repeats", 2, "--record", tmp_path / "y.json"]
    result = call("demo/diffusers_pipeline.py", *flags, capfd=capfd)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "y.json").read_text())
    assert [len(seconds) for seconds in record["seconds"].values()] == [2, 2] and "7 steps" in record["summary"]
    assert record["flags"]["class_labels"] == [0, 1, 2, 3, 4] and record["psnr_db"] > 0
    # The error is that of the latents of the two pipelines.
    pipe = quiet(load_pipeline(tmp_path / "model"))
    use(pipe, "DPMSolverMultistep")
    latents = [latents_of(pipe, 4.0, 7, [0, 1, 2, 3, 4])]
    accelerate(pipe, plan)
    latents += [latents_of(pipe, 4.0, 7, [0, 1, 2, 3, 4])]
    assert record["error"] == pytest.approx((latents[1] - latents[0]).square().mean().item(), rel=1e-3)


def test_the_demo_refuses_what_it_cannot_do(tmp_path, capfd):
    for flags, words in {
        ("--out", "x.foo", "--pipeline", "nowhere"): "x.foo does not end in a picture format",  # before it loads
        ("--tiny", "--accelerate-method", "fora"): "needs its interval: add --interval",
        ("--tiny", "--interval", 3): "--interval needs its method: add --accelerate-method fora",
        ("--tiny", "--path", "x.json", "--cached", 0.5): "--cached needs its method",
        ("--tiny", "--accelerate-method", "fora", "--interval", 3, "--path", "x.pt"): "--path is no setting of fora",
        ("--tiny", "--path", "x.pt", "--thres", 0.5): "--thres 0.5 is for a router: add --accelerate-method dynamic",
        ("--tiny", "--class-labels", "1000"): "class label 1000",
        ("--tiny", "--path", str(tmp_path / "none.json")): "no such file",
    }.items():
        assert_refused(call("demo/diffusers_pipeline.py", *flags, capfd=capfd), words)
