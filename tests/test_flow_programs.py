"""The programs on a small flow model: samplers, guidance in an interval, routers, plans, files of the other process."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import SIZES, assert_refused, call, random_dit
from safetensors.torch import save_file

import sampling
from diffusion import FlowMatching, create_diffusion
from models import Guidance
from pretrained.loading import load_dit, load_vae
from pretrained.spec import model_spec
from router import Router, router_loss
from schedule import Schedule
from training.plan_table import Trajectory
from training.policies import make_schedule

STEPS, SCALE = 4, 2.0


@pytest.fixture
def flow_folder(model_folder, tmp_path, monkeypatch):
    """A model folder of a flow with random weights, in the present folder; its t reaches the model as 10 t."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, "flow")
    config = {"model": SIZES | {"learn_sigma": False}, "image_size": 8, "vae": "vae", "cfg_scale": SCALE}
    (tmp_path / "flow" / "config.json").write_text(json.dumps(config | {"process": "flow", "time_scale": 10}))
    save_file(random_dit(learn_sigma=False).state_dict(), tmp_path / "flow" / "dit.safetensors")
    return "flow"


@pytest.fixture
def program(flow_folder, capfd):
    def program(name, *flags, code=0):
        result = call(f"{name}.py", "--ckpt", flow_folder, "--device", "cpu", *flags, capfd=capfd)
        assert result.returncode == code, result.stderr
        return result

    return program


def reference(sampler, z, y, schedule=None, scale=SCALE, interval=(0, 1), channels=3, noise=None):
    """The final latents, by the formulas alone: guidance on velocities, and the steps of each sampler."""
    dit, n = load_dit(model_spec(ckpt="flow"), "cpu"), STEPS
    cache = dit.empty_cache(schedule.order) if schedule else None

    def velocity(x, t, i):
        rows, labels = torch.cat([x, x]), torch.cat([y, torch.full_like(y, 5)])
        v = dit(rows, torch.full((len(labels),), 10 * t), labels, schedule and schedule.rows()[i], cache)
        cond, null = v.chunk(2)
        guided = torch.cat([(null + scale * (cond - null))[:, :channels], cond[:, channels:]], dim=1)
        return guided if interval[0] <= t <= interval[1] else cond

    x = z
    if sampler == "euler":
        for k in range(n):
            x = x - velocity(x, 1 - k / n, n - 1 - k) / n
    elif sampler == "heun":
        for k in range(n // 2):
            t, h = 1 - 2 * k / n, 2 / n
            first = velocity(x, t, n - 1 - 2 * k)
            x = x - h / 2 * (first + velocity(x - h * first, t - h, n - 2 - 2 * k))
    else:
        times = [*np.linspace(1, 0.04, n).tolist(), 0.0]
        for k, (t, after) in enumerate(zip(times, times[1:])):
            v = velocity(x, t, n - 1 - k)
            x = x - (t - after) * (v - t * (-(x + (1 - t) * v) / t))  # score = -E[noise] / t
            x = x + (2 * t * (t - after)) ** 0.5 * noise[k] if after else x
    return x


def inputs(n=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, 4, 4, generator=generator), torch.arange(n), torch.randn(STEPS, n, 4, 4, 4)


@pytest.mark.parametrize("plan", [None, "reuse", "forecast"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
@pytest.mark.parametrize("guidance", [Guidance(SCALE), Guidance(1.8, 4, (0.1, 0.7)), Guidance(1.8, 3, (0.3, 1))])
def test_sampling_a_flow_follows_the_formulas(flow_folder, plan, sampler, guidance):
    spec, (z, y, noise) = model_spec(ckpt=flow_folder), inputs()
    schedule = plan and Schedule.every_nth(STEPS, 3, 2).with_order(2 * (plan == "forecast"))
    drawn = iter(noise)
    latents = sampling.sample_latents(
        load_dit(spec, "cpu"),
        spec.make_process(STEPS, sampler),
        z,
        y,
        guidance,
        schedule,
        randn_like=lambda x: next(drawn).repeat(2, 1, 1, 1),
    )
    how = dict(scale=float(guidance), channels=guidance.channels, interval=guidance.interval, noise=noise)
    expected = reference(sampler, z, y, schedule, **how)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_the_recorded_trajectory_of_the_sde_draws_its_noise_in_order(flow_folder):
    spec, (z, y, noise) = model_spec(ckpt=flow_folder), inputs()
    how = load_dit(spec, "cpu"), spec.make_process(STEPS, "sde"), SCALE
    drawn = [iter(noise), iter(noise)]
    recorded = sampling.CudaGraphSampler(*how)(z, y, lambda x: next(drawn[0]).repeat(2, 1, 1, 1))
    plain = sampling.sample_latents(*how[:2], z, y, SCALE, randn_like=lambda x: next(drawn[1]).repeat(2, 1, 1, 1))
    assert torch.equal(recorded, plain)


@pytest.mark.parametrize(
    "order, interval, rows",
    [
        (None, (0.3, 0.6), [3, 3, 6, 6, 3]),  # of t = 1, 0.8, 0.6, 0.4 and 0.2
        (0, (0.3, 0.6), [3, 3, 6, 6, 3]),  # the third step computes all
        (0, (0.3, 0.4), [3, 3, 6, 6, 3]),  # the fourth reuses outputs of the third
        (1, (0.3, 0.4), [6, 6, 6, 6, 3]),  # and forecasts from the first too
        (0, (0, 0.2), [3, 3, 3, 3, 6]),
        (0, (0, 1), [6, 6, 6, 6, 6]),
        (0, (0.5, 0.55), [3, 3, 3, 3, 3]),
    ],
)
def test_outside_the_interval_the_model_runs_once_unless_a_guided_step_reuses_its_output(
    flow_folder, monkeypatch, order, interval, rows
):
    spec, (z, y, _) = model_spec(ckpt=flow_folder), inputs()
    dit, seen = load_dit(spec, "cpu"), []
    denoise = dit.denoise
    monkeypatch.setattr(dit, "denoise", lambda x, *args: seen.append(len(x)) or denoise(x, *args))
    plan = None if order is None else Schedule.every_nth(5, 3, 2).with_order(order)
    sampling.sample_latents(dit, spec.make_process(5), z, y, Guidance(SCALE, 3, interval), plan)
    assert seen == rows


def test_a_dit_can_be_guided_in_an_interval_too(model_folder):
    dit, (z, y, _) = load_dit(model_spec(ckpt=str(model_folder)), "cpu"), inputs()
    diffusion, guided, plain = create_diffusion(STEPS), [], []
    for interval in ((0, 1), (0, 0.5), (0.5, 1), (0.999, 1), (0.9991, 1)):  # of timesteps 0, 333, 666, 999 of 1000
        guided.append(sampling.sample_latents(dit, diffusion, z, y, Guidance(3.0, 3, interval)))
    plain = sampling.sample_latents(dit, diffusion, z, y, 3.0)
    none = sampling.sample_latents(dit, diffusion, z, y, 1.0)
    assert torch.equal(guided[0], plain) and torch.allclose(guided[4], none, atol=1e-5)
    for other in guided[1:4]:
        assert not torch.allclose(other, plain, atol=1e-3) and not torch.allclose(other, none, atol=1e-3)


def test_sample_py_runs_every_sampler_and_policy(program, tmp_path):
    for flags in (
        [],
        ["--sampler", "heun", "--accelerate-method", "fora", "--interval", 2],
        ["--sampler", "sde", "--accelerate-method", "smoothcache", "--alpha", 0.5],
        ["--sampler", "euler", "--cfg-channels", "all", "--cfg-interval", 0, 0.7],
    ):
        result = program("sample", "--num-sampling-steps", STEPS, "--repeats", 1, "--out", "a.png", *flags)
        assert ("No sampler flag: sampling with Euler" in result.stdout) == (not flags)
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--p-sample"], "flow is a flow model and cannot be sampled with ddpm: pass --sampler euler or heun or sde"),
        (["--ddim-sample"], "cannot be sampled with ddim"),
        (["--sampler", "heun", "--num-sampling-steps", 5], "cannot make 5 calls: pass an even number"),
        (["--cfg-interval", 0.7, 0.2], "--cfg-interval 0.7 0.2 is empty"),
        (["--cfg-interval", 0.01, 0.02], "no time of the 4 steps lies in --cfg-interval 0.01 0.02"),
        (["--cfg-interval", 0.2, 0.7, "--cfg-scale", 1], "--cfg-interval is about guidance, and --cfg-scale 1 is none"),
        (["--cfg-channels", 2, "--cfg-scale", 1], "--cfg-channels is about guidance, and --cfg-scale 1 is none"),
        (["--noise-scale", 0.9], "flow is a flow model, which predicts no noise: leave out --noise-scale"),
        (["--cfg-channels", 0], "0 is not a whole number of at least 1"),
        (
            ["--accelerate-method", "schedule", "--path", "ddim.json"],
            "ddim.json was made for the process diffusion and",
        ),
        (["--accelerate-method", "dynamiclayer", "--path", "flow/router4.pt"], "made for the process diffusion"),
        (
            ["--sampler", "heun", "--accelerate-method", "schedule", "--path", "euler.json"],
            "flow-euler and the sampler",
        ),
    ],
)
@pytest.mark.parametrize("name", ["sample", "sample_ddp"])
def test_what_does_not_fit_a_flow_is_refused(flow_folder, capfd, name, flags, words):
    plan = Schedule.every_nth(STEPS, 3, 2)
    plan.save("ddim.json")
    Schedule(plan.compute, process="flow-euler").save("euler.json")
    common = ["--ckpt", flow_folder, "--device", "cpu", "--num-sampling-steps", STEPS]
    assert_refused(call(f"{name}.py", *common, *flags, capfd=capfd), words)


def test_what_is_of_a_flow_does_not_fit_a_dit(flow_folder, model_folder, capfd):
    Schedule(Schedule.every_nth(STEPS, 3, 2).compute, process="flow-euler").save("euler.json")
    Router(STEPS, 3, process="flow-euler").save("router.pt")
    for flags, words in (
        (
            ["--sampler", "heun"],
            "tiny is a DiT of diffusion and cannot be sampled with heun: pass --sampler ddim or ddpm",
        ),
        (["--accelerate-method", "schedule", "--path", "euler.json"], "euler.json was made for the process flow-euler"),
        (
            ["--accelerate-method", "dynamiclayer", "--path", "router.pt"],
            "router.pt was made for the process flow-euler",
        ),
    ):
        common = ["--ckpt", model_folder, "--device", "cpu", "--num-sampling-steps", STEPS]
        assert_refused(call("sample.py", *common, *flags, capfd=capfd), words)


@pytest.mark.parametrize("suffix", ["json", "pt"])
def test_a_file_keeps_its_process_and_those_without_are_of_diffusion(tmp_path, suffix):
    plan, path = Schedule(Schedule.every_nth(STEPS, 3, 2).compute, 2, "flow-sde"), tmp_path / f"plan.{suffix}"
    plan.save(path)
    assert Schedule.load(path).process == "flow-sde" and Schedule.load(path).order == 2
    Schedule(plan.compute).save(path)
    assert Schedule.load(path).process == "diffusion" and b"process" not in path.read_bytes()
    for process in ("diffusion", "flow-euler"):
        Router(STEPS, 3, process=process).save(tmp_path / "r.pt")
        router = Router.load(tmp_path / "r.pt")
        assert (router.process, router.schedule(0.5).process) == (process, process)
        assert ("process" in torch.load(tmp_path / "r.pt")) == (process != "diffusion")
    made = make_schedule("fora", STEPS, 3, interval=2, diffusion=FlowMatching(STEPS))
    assert made.process == "flow-euler" and torch.equal(made.compute, plan.compute)


def test_a_set_says_how_it_was_made_and_continues(program, tmp_path):
    flags = ["--num-sampling-steps", STEPS, "--num-fid-samples", 6, "--sample-dir", "s", "--cfg-interval", 0, 0.7]
    program("sample_ddp", *flags, "--cfg-channels", "all", "--balanced-labels")
    (path,) = (tmp_path / "s").glob("*.npz")
    assert path.name.startswith("flow-size-8-cfg-2.0-channels-4-times-0.0-0.7-seed-0-euler-4-balanced")
    with np.load(path) as arrays:
        images, manifest = arrays["arr_0"], json.loads(str(arrays["manifest"]))
    assert {
        "sampler": "euler",
        "steps": STEPS,
        "cfg_channels": 4,
        "cfg_interval": [0.0, 0.7],
    }.items() <= manifest.items()
    again = program("sample_ddp", *flags, "--cfg-channels", 4, "--balanced-labels")
    assert "is there already and complete" in again.stdout
    config = tmp_path / "flow" / "config.json"
    before = config.read_text()
    config.write_text(before.replace('"time_scale": 10', '"time_scale": 11'))  # the same weights, another model
    refused = program("sample_ddp", *flags, "--cfg-channels", "all", "--balanced-labels", code=1)
    assert_refused(refused, "made with other settings: model was")
    config.write_text(before)

    stream = [np.random.default_rng([3, 0, number]) for number in range(6)]
    z = torch.stack(
        [(s.integers(5), torch.from_numpy(s.standard_normal((4, 4, 4), dtype=np.float32)))[1] for s in stream]
    )
    latents = reference("euler", z, torch.arange(6) % 5, interval=(0, 0.7), channels=4)
    expected = sampling.decode(load_vae(model_spec(ckpt="flow"), "cpu"), latents).numpy()
    assert np.abs(images.astype(int) - expected).max() <= 1


def test_a_router_for_a_flow_is_trained_and_sampled(program, image_folder):
    flags = ["--data-path", image_folder, "--num-sampling-steps", STEPS, "--global-batch-size", 4, "--max-steps", 2]
    result = program("train_router", *flags, "--draws-per-step", 2, "--num-workers", 0)
    assert "--sampler euler --accelerate-method dynamiclayer" in result.stdout
    path = "results/000-flow/checkpoints/last.pt"
    assert Router.load(path).process == "flow-euler"
    flags = ["--num-sampling-steps", STEPS, "--repeats", 1, "--accelerate-method", "dynamiclayer", "--path", path]
    program("sample", *flags, "--sampler", "euler")


def test_the_loss_of_a_router_for_a_flow_starts_on_the_path(flow_folder):
    """With scores of 0 the student is the model with every layer reused, after one step of Euler."""
    spec, (z, y, _) = model_spec(ckpt=flow_folder), inputs()
    dit, x_start = load_dit(spec, "cpu"), torch.randn(3, 4, 4, 4)
    loss = router_loss(dit, FlowMatching(STEPS, time_scale=10), torch.zeros(3, 2), 1, x_start, y, z)
    cache, t = dit.empty_cache(), torch.full((3,), 5.0)  # i = 1 has t = 0.5
    x = 0.5 * x_start + 0.5 * z
    x = x - dit(x, t, y, cache=cache) / STEPS
    teacher, student = dit(x, t / 2, y), dit(x, t / 2, y, [(False, False)] * 3, cache)
    torch.testing.assert_close(loss, (teacher - student).square().flatten(1).mean(1), rtol=1e-4, atol=1e-6)


def test_plans_for_a_flow_are_learned_for_its_guidance_and_sampled(program):
    flags = ["--num-sampling-steps", 8, "--target-speedup", 1.3, "--cfg-interval", 0, 0.6, "--cfg-channels", 4]
    result = program("train_router", *flags)
    path = "results/000-flow/Euler8_1.3x.json"
    assert Schedule.load(path).process == "flow-euler"
    words = "--sampler euler --cfg-scale 2 --cfg-channels 4 --cfg-interval 0.0 0.6 --accelerate-method schedule --path"
    assert f"{words} {path}" in result.stdout
    program("sample", "--num-sampling-steps", 8, "--repeats", 1, "--accelerate-method", "schedule", "--path", path)
    resume = ["--resume", "results/000-flow"]
    assert_refused(
        program("train_router", *flags[:-2], *resume, code=1), "searched with --cfg-channels 4: pass the same"
    )
    program("train_router", *flags[:4], "--results-dir", "plain")
    refused = program("train_router", *flags, "--resume", "plain/000-flow", code=1)
    assert_refused(refused, "searched without --cfg-channels")


def test_the_steps_of_the_plan_table_are_those_of_sampling(flow_folder):
    spec, (z, y, _) = model_spec(ckpt=flow_folder), inputs()
    dit, process, guidance = load_dit(spec, "cpu"), spec.make_process(STEPS), Guidance(SCALE, 4, (0.3, 0.8))
    path, x = Trajectory(dit, process, y, guidance), z
    with torch.no_grad():
        for e in range(STEPS):
            x = path.step(x, e, lambda n, run: run())
    torch.testing.assert_close(x, sampling.sample_latents(dit, process, z, y, guidance), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "entry, words",
    [
        ({"process": "sde"}, "process 'sde' is not diffusion or flow"),
        ({"time_scale": 0}, "time_scale 0 is not a number above 0"),
        ({"time_scale": "1000"}, "time_scale '1000' is not a number above 0"),
        ({"time_scale": True}, "time_scale True is not a number above 0"),
        ({"cfg_channels": "all"}, "cfg_channels 'all' is not a whole number from 1 to 4"),
        ({"cfg_channels": 5}, "cfg_channels 5 is not a whole number from 1 to 4, the channels of the model"),
        ({"cfg_interval": [0.7, 0.2]}, "cfg_interval [0.7, 0.2] is not two rising numbers"),
        ({"cfg_interval": 1}, "TypeError"),
    ],
)
def test_a_wrong_entry_of_a_model_folder_is_refused(flow_folder, tmp_path, capfd, entry, words):
    path = tmp_path / "flow" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entry))
    assert_refused(call("sample.py", "--ckpt", "flow", "--device", "cpu", capfd=capfd), words, "config.json")


def test_a_model_folder_recommends_guidance_and_flags_win(flow_folder, tmp_path):
    path = tmp_path / "flow" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cfg_channels": 4, "cfg_interval": [0, 0.7]}))
    spec = model_spec(ckpt="flow")
    recommended, chosen = spec.guidance(None, 4.0), spec.guidance(1.8, 4.0, 2, [0.1, 1])
    assert (recommended, recommended.channels, recommended.interval) == (SCALE, 4, (0, 0.7))
    assert (chosen, chosen.channels, chosen.interval) == (1.8, 2, (0.1, 1))
    assert spec.guidance(None, 4.0, "all").channels == 4
