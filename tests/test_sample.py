"""sample.py as a user types it."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, assert_refused, call, run
from PIL import Image

from pretrained.loading import load_dit
from pretrained.spec import model_spec
from router import Router
from schedule import Schedule
from training.smoothcache import layer_changes

METHOD = ["--accelerate-method", "dynamiclayer"]
SCHEDULE = ["--accelerate-method", "schedule"]
FORA = ["--accelerate-method", "fora", "--interval"]


PLAN = {"steps": 4, "depth": 3, "order": 0, "rows": ["1", "0", "1", "0"]}
# Mistakes in a schedule file that somebody wrote by hand.
PLANS = {
    "digit": {"rows": ["1", "0", "1", "2"]},
    "width": {"rows": ["1", "11 00", "1", "0"]},
    "rows": {"rows": ["1", "0"]},
    "first": {"rows": ["0", "1", "1", "1"]},
    "order": {"order": 3},
    "typo": {"oder": 2},
    "depth": {"depth": 7},
    "steps": {"steps": 6, "rows": ["1"] * 6},
    "list": [1, 2],
}


@pytest.fixture
def sample(model_folder, tmp_path, monkeypatch, capfd):
    """Runs sample.py on the small model, four DDIM steps, in an empty folder; in this process, or one of its `own`."""
    monkeypatch.chdir(tmp_path)

    def start(*flags, ckpt=model_folder, steps=4, own=False):
        flags = [*(["--ckpt", ckpt] if ckpt else []), *flags]
        flags = ["--num-sampling-steps", steps, "--repeats", 1, "--device", "cpu", *flags]
        return run("sample.py", *flags, cwd=tmp_path) if own else call("sample.py", *flags, capfd=capfd)

    return start


def pixels(path):
    return np.asarray(Image.open(path))


def test_the_baseline_writes_its_picture_and_time(sample, tmp_path):
    result = sample("--ddim-sample", own=True)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^Sampling time: \d+\.\d{3}±0\.000$", result.stdout, re.M)
    assert [p.name for p in tmp_path.iterdir()] == ["Sample_NFE4_Method_full.png"]
    assert "Classes: a, b, c, d, e\n" in result.stdout
    # five classes of 8 pixels, enlarged to 96, in rows of four, two pixels between
    assert pixels(tmp_path / "Sample_NFE4_Method_full.png").shape == (2 * 98 + 2, 4 * 98 + 2, 3)


def test_the_router_is_used_and_the_same_seed_gives_the_same_picture(sample, model_folder, tmp_path):
    router = [*METHOD, "--path", model_folder / "router4.pt", "--ddim-sample"]
    for name, flags in {"a": [], "b": [], "seed": ["--seed", 1], "all": ["--thres", 0], "none": ["--thres", 1]}.items():
        result = sample(*router, "--thres", 0.5, "--out", f"{name}.png", *flags)
        assert result.returncode == 0, result.stderr
    assert "cached" in result.stdout and "so the speed-up is at most" in result.stdout
    assert sample("--ddim-sample", "--out", "full.png").returncode == 0
    a, b, seed, everything, nothing, full = (
        pixels(tmp_path / f"{name}.png") for name in ("a", "b", "seed", "all", "none", "full")
    )
    assert np.array_equal(a, b)
    assert np.array_equal(everything, full)
    for other in (seed, nothing, full):
        assert not np.array_equal(a, other)


def test_compare_prints_both_times_the_ratio_the_bound_and_the_psnr(sample, model_folder, tmp_path):
    path = model_folder / "router4.pt"
    flags = ["--path", path, "--thres", 0.5, "--compare", "--repeats", 2, "--record", "r.json"]
    result = sample(*METHOD, *flags, "--ddim-sample")
    assert result.returncode == 0, result.stderr
    for line in (
        r"^Sampling time: \d+\.\d{3}±\d+\.\d{3} \(full\)$",
        r"^Sampling time: \d+\.\d{3}±\d+\.\d{3} \(router\)$",
        r"^Speed-up: \d+\.\d{3}, \d+\.\d% of the bound \d\.\d{3}$",
        r"^G multiply-adds/s: ",
        r"^PSNR of the images with and without the router: \d+\.\d\d dB$",
    ):
        assert re.search(line, result.stdout, re.M), (line, result.stdout)
    bound = float(re.search(r"of the bound (\S+)", result.stdout)[1])
    costs = load_dit(model_spec(ckpt=str(model_folder)), "cpu").multiply_adds()
    assert bound == pytest.approx(Router.load(path).schedule(0.5).speedup_bound(costs), abs=6e-4)
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["flags"]["path"] == str(path) and record["torch"] == torch.__version__ and record["batch"] == 10
    assert record["layers_run_per_step"] == Router.load(path).schedule(0.5).compute.sum((1, 2)).tolist()
    pairs = zip(record["seconds"]["full"], record["seconds"]["router"])
    assert record["speedup"] == pytest.approx(np.median([full / router for full, router in pairs]))
    # without the router above, with it below
    assert pixels(tmp_path / "Sample_NFE4_Method_dynamiclayer.png").shape == (2 * 98 + 2, 5 * 98 + 2, 3)


def test_the_bound_and_the_rates_count_the_rows_that_ran_under_guidance_in_an_interval(sample, model_folder, tmp_path):
    """Only t = 0 is guided; the step before it, whose outputs it reuses, runs all rows for it too."""
    result = sample(*FORA, 2, "--ddim-sample", "--cfg-interval", 0, 0.2, "--compare", "--record", "r.json")
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "r.json").read_text())
    costs = load_dit(model_spec(ckpt=str(model_folder)), "cpu").multiply_adds()
    full, reused = costs["fixed"] + 3 * sum(costs["layer"]), costs["fixed"]
    work = {"full": 5 * (full + full + full + 2 * full), "schedule": 5 * (full + reused + 2 * full + 2 * reused)}
    assert record["bound"] == pytest.approx(work["full"] / work["schedule"]) and record["batch"] == 10
    rates = record["g_multiply_adds_per_second"]
    for name, (seconds,) in record["seconds"].items():
        assert rates[name] == pytest.approx(work[name] / seconds / 1e9)


def test_a_schedule_file_is_run_and_compared(sample, model_folder, tmp_path):
    """The router's plan as a file gives the router's picture; other plans give others."""
    Router.load(model_folder / "router4.pt").schedule(0.5).save(tmp_path / "same.pt")
    Schedule.full(4, 3).save(tmp_path / "full.pt")
    result = sample(*METHOD, "--path", model_folder / "router4.pt", "--thres", 0.5, "--compare", "--out", "router.png")
    assert result.returncode == 0, result.stderr
    for name in ("same", "full"):
        flags = ["--path", f"{name}.pt", "--compare", "--out", f"{name}.png", "--record", f"{name}.json"]
        result = sample(*SCHEDULE, *flags, "--ddim-sample")
        assert result.returncode == 0, result.stderr
        for line in (
            r"^Sampling time: \d+\.\d{3}±0\.000 \(schedule\)$",
            rf"^Picture: {name}.png \(above without the schedule, below with it\)$",
            r"^G multiply-adds/s: \d+\.\d full, \d+\.\d schedule; ",
            r"^PSNR of the images with and without the schedule: ",
        ):
            assert re.search(line, result.stdout, re.M), (line, result.stdout)
        assert "router" not in result.stdout
        assert list(json.loads((tmp_path / f"{name}.json").read_text())["seconds"]) == ["full", "schedule"]
    assert np.array_equal(pixels(tmp_path / "same.png"), pixels(tmp_path / "router.png"))
    assert "inf dB" in result.stdout and json.loads((tmp_path / "full.json").read_text())["psnr_db"] is None
    result = sample(*SCHEDULE, "--path", "same.pt", "--ddim-sample")
    assert result.returncode == 0 and (tmp_path / "Sample_NFE4_Method_schedule.png").exists()


@pytest.mark.parametrize(
    "method, flags, plan",
    [
        ("fora", ["--interval", 2], Schedule.every_nth(4, 3, 2)),
        ("random", ["--cached", 0.25], Schedule.random_layers(4, 3, [0, 2], 6, 0)),
        ("first", ["--cached", 0.25], Schedule.first_blocks(4, 3, [0, 2], 6)),
        ("last", ["--cached", 0.25], Schedule.last_blocks(4, 3, [0, 2], 6)),
        ("smoothcache", ["--alpha", 1e9], Schedule.every_nth(4, 3, 4)),
    ],
)
def test_a_policy_by_its_name_is_run_and_written(sample, tmp_path, method, flags, plan):
    """The picture is that of its schedule in a file, of the forecast that was asked for."""
    for order in (0, 2):
        plan.with_order(order).save(tmp_path / "plan.json")
        assert sample(*SCHEDULE, "--path", "plan.json", "--out", "plan.png").returncode == 0
        forecast = ["--forecast", order] if order else []
        result = sample("--accelerate-method", method, *flags, *forecast, "--save-schedule", "saved.json")
        assert result.returncode == 0 and "Schedule: saved.json\n" in result.stdout, result.stderr
        assert np.array_equal(pixels(tmp_path / f"Sample_NFE4_Method_{method}.png"), pixels(tmp_path / "plan.png"))
        assert (tmp_path / "saved.json").read_text() == (tmp_path / "plan.json").read_text()
    result = sample("--accelerate-method", method, *flags, "--compare", "--record", "r.json")
    assert result.returncode == 0, result.stderr
    assert "(above without the schedule, below with it)" in result.stdout and "full, " in result.stdout
    assert json.loads((tmp_path / "r.json").read_text())["layers_run_per_step"] == plan.compute.sum((1, 2)).tolist()


def test_a_router_and_a_schedule_file_with_forecasts(sample, model_folder, tmp_path):
    """In five steps, so that the first step that reuses has two outputs to forecast from."""
    path = model_folder / "router5.pt"
    router = [*METHOD, "--path", path, "--thres", 0.5, "--out", "r.png"]
    pictures = []
    for order in (0, 1, 2):
        assert sample(*router, "--forecast", order, "--save-schedule", f"{order}.json", steps=5).returncode == 0
        pictures.append(pixels(tmp_path / "r.png"))
        schedule = Schedule.load(tmp_path / f"{order}.json")
        assert schedule.order == order
        assert torch.equal(schedule.compute, Router.load(path).schedule(0.5).compute)
    for flags, expected in (([], 2), (["--forecast", 0], 0), (["--forecast", 1], 1)):
        assert sample(*SCHEDULE, "--path", "2.json", *flags, "--out", "s.png", steps=5).returncode == 0
        assert np.array_equal(pixels(tmp_path / "s.png"), pictures[expected])
    assert not np.array_equal(pictures[0], pictures[2])


def test_smoothcache_measures_with_the_guidance_of_the_sampler(sample, model_folder, tmp_path):
    spec = model_spec(ckpt=str(model_folder))
    dit = load_dit(spec, "cpu")
    guided, plain = layer_changes(dit, 4, 3.0), layer_changes(dit, 4, 1.0)
    alpha = (guided[2, 0, 0] + plain[2, 0, 0]).item() / 2  # decides whether the second step runs attention
    flags = ["--accelerate-method", "smoothcache", "--alpha", alpha, "--save-schedule", "s.json"]
    for scale, changes in ((3, guided), (1, plain)):
        assert sample(*flags, "--cfg-scale", scale).returncode == 0
        saved = Schedule.load(tmp_path / "s.json")
        assert torch.equal(saved.compute, Schedule.by_change(changes, 3, alpha).compute)
        assert bool(saved.compute[2, 0, 0]) == bool(changes[2, 0, 0] >= alpha)
    assert guided[2, 0, 0] != plain[2, 0, 0]


def test_ddim_is_the_default_sampler(sample, tmp_path):
    result = sample("--class-labels", 1, 2, "--out", "neither.png")
    assert "sampling with DDIM" in result.stdout
    result = sample("--class-labels", 1, 2, "--out", "ddim.png", "--ddim-sample")
    assert "sampling with DDIM" not in result.stdout
    assert np.array_equal(pixels(tmp_path / "neither.png"), pixels(tmp_path / "ddim.png"))


def test_ancestral_sampling_and_odd_steps(sample, model_folder, tmp_path):
    flags = ["--p-sample", *METHOD, "--path", model_folder / "router5.pt", "--out", "p.png"]
    assert sample(*flags, steps=5).returncode == 0
    first = pixels(tmp_path / "p.png")
    assert sample(*flags, steps=5).returncode == 0
    assert np.array_equal(first, pixels(tmp_path / "p.png"))


def test_random_weights_time_a_model_without_its_files(sample, tmp_path):
    Router(4, 12).save(tmp_path / "r.pt")
    flags = ["--model", "DiT-S/8", "--random-weights", "--class-labels", 1, "--compare", *METHOD, "--path", "r.pt"]
    result = sample(*flags, "--thres", 0.5, ckpt=None)
    assert result.returncode == 0, result.stderr
    assert "Random weights from seed 0: timing only" in result.stdout
    assert re.search(r"^PSNR of the latents with and without the router: \d", result.stdout, re.M)
    assert [p.name for p in tmp_path.iterdir()] == ["r.pt"]
    result = sample(*flags, "--thres", 0.5, "--out", "/proc/none/x.png", ckpt=None)
    assert result.returncode == 0, result.stderr  # what is not written may have any name
    assert_refused(sample(*flags, ckpt="none.pt"), "--random-weights draws the weights: leave out --ckpt")


def test_a_plan_is_not_replaced_by_a_record(sample, model_folder, tmp_path):
    shutil.copy(model_folder / "router4.pt", tmp_path / "r.pt")
    flags = [*METHOD, "--path", "r.pt", "--compare", "--save-schedule", "plan.json", "--record"]
    for path in ("plan.json", "./plan.json"):
        assert_refused(sample(*flags, path), "--save-schedule plan.json is the file of --record too")
    assert [path.name for path in tmp_path.iterdir()] == ["r.pt"]


@pytest.mark.parametrize("program", ["sample.py", "sample_ddp.py", "train_router.py", "evaluator.py", "download.py"])
def test_help_imports_no_heavy_library(program, tmp_path):
    for name in ("torch", "numpy", "diffusers", "matplotlib", "huggingface_hub"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported')")
    result = run(program, "--help", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0 and result.stdout.startswith(f"usage: {program}"), result.stderr


# Libraries that take seconds to import, and are needed only by some flags, or by nothing.
HEAVY = "diffusers transformers accelerate timm torchvision scipy tensorflow wandb"
COMPILER = "torch._dynamo torch._inductor sympy"  # optimisers of torch import it too
TRAINING = "--data-path IMAGES --num-sampling-steps 4 --max-steps 1 --num-workers 0 --global-batch-size 8 --l1 0.1"
SMALL = "--ddim-sample --num-sampling-steps 4 --device cpu --cfg-scale 1"


@pytest.mark.parametrize(
    "program, flags, more",
    [
        ("sample", f"{SMALL} --compare --repeats 1 --accelerate-method fora --interval 2", f"{COMPILER} matplotlib"),
        pytest.param(
            "sample_ddp",
            f"{SMALL} --num-fid-samples 2 --sample-dir sets",
            f"{COMPILER} matplotlib",
            marks=pytest.mark.slow,
        ),
        pytest.param("train_router", TRAINING, "", marks=pytest.mark.slow),
        ("evaluator", "a.npz b.npz --metrics fid,precision,kid --device cpu", f"{COMPILER} matplotlib diffusion"),
    ],
)
def test_a_run_imports_no_library_that_it_does_not_need(program, flags, more, model_folder, image_folder, tmp_path):
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", np.random.default_rng(0).standard_normal((9, 3)))
    if program != "evaluator":
        flags = f"{flags} --ckpt {model_folder}".replace("IMAGES", str(image_folder))
    code = f"import sys, {program} as p; sys.argv[0] = '{program}.py'; p.main(p.parse_args({flags.split()!r}))"
    code += f"; print('imported:', *(name for name in {f'{HEAVY} {more}'.split()!r} if name in sys.modules))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "imported:"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--thres", "1.5"], "1.5 is not a number in [0, 1]"),
        (METHOD, "--accelerate-method dynamiclayer needs its file: add --path"),
        (SCHEDULE, "--accelerate-method schedule needs its file: add --path"),
        (["--path", "x.pt"], "--accelerate-method"),
        (["--compare"], "--compare needs a router"),
        (["--save-schedule", "s.json"], "--save-schedule needs a router or schedule: add --accelerate-method"),
        ([*FORA, "2", "--save-schedule", "s.pt"], "s.pt does not end in .json"),
        (FORA[:2], "--accelerate-method fora needs its interval: add --interval"),
        (
            ["--accelerate-method", "smoothcache"],
            "--accelerate-method smoothcache needs its largest change: add --alpha",
        ),
        (["--accelerate-method", "first"], "--accelerate-method first needs its share: add --cached"),
        (["--interval", "2"], "--interval needs its method: add --accelerate-method fora"),
        ([*FORA, "2", "--path", "x.pt"], "--path is no setting of fora: leave it out, or pass --accelerate-method dyn"),
        ([*METHOD, "--path", "x.pt", "--alpha", "1"], "--alpha is no setting of dynamiclayer"),
        (["--forecast", "2"], "--forecast needs a method that reuses outputs: add --accelerate-method"),
        ([*FORA, "2", "--forecast", "3"], "invalid choice: 3"),
        ([*FORA, "0"], "0 is not a whole number of at least 1"),
        ([*FORA, "9", "--num-sampling-steps", "8"], "--interval 9 is more than the 8 steps: pass at most 8"),
        (["--accelerate-method", "smoothcache", "--alpha", "0"], "0 is not a finite number above 0"),
        (["--accelerate-method", "smoothcache", "--alpha", "nan"], "nan is not a finite number above 0"),
        (["--accelerate-method", "last", "--cached", "0.6"], "0.6 is not a number in (0, 0.5]"),
        (
            ["--accelerate-method", "last", "--cached", "0.43", "--num-sampling-steps", "7"],
            "--cached 0.43 is too much: 3 of 7 steps can reuse, so at most 0.428",
        ),
        (["--record", "x.json"], "--record"),
        (["--thres", "0.5"], "--thres is about the scores of a router: leave it out, or pass --accelerate-method dyn"),
        ([*FORA, "2", "--thres", "0.5"], "--thres is about the scores of a router"),
        (
            ["--noise-scale", "0.9", "2"],
            "--noise-scale 0.9 2: pass a factor from 0.5 to 2, and at most one",
        ),
        (["--noise-scale", "0.9", "0.5", "1"], "--noise-scale 0.9 0.5 1: pass a factor"),
        (["--noise-scale", "0.4"], "--noise-scale 0.4: pass a factor"),
        (["--seed", "-1"], "2**32"),
        (["--cfg-scale", "nan"], "finite"),
        (["--device", "meta"], "meta"),
        (["--num-sampling-steps", "1001"], "1001"),
        (["--num-sampling-steps", "0"], "0"),
        (["--frobnicate"], "--frobnicate"),
        (["--ddim-sample", "--p-sample"], "--p-sample"),
        (["--vae", "vq"], "vq"),
        (["--ckpt", "no/such/folder"], "no such file: no/such/folder"),
        (["--model", "DiT-Z/2"], "DiT-Z/2"),
        (["--device", "cuda:99"], "cuda:99"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(flags, words, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert_refused(call("sample.py", *flags, capfd=capfd), words)
    assert not list(tmp_path.iterdir())


def test_wrong_files_are_refused_in_one_line(model_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Router(4, 7).save(tmp_path / "deep.pt")
    Router(6, 3).save(tmp_path / "long.pt")
    Schedule.full(4, 7).save(tmp_path / "deep-plan.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "deep.pt").read_bytes()[:500])
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(print))
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "fifo.png")
    for name, changes in PLANS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(PLAN | changes if isinstance(changes, dict) else changes))
    for name, mlp in (("lengths", [1, 0]), ("values", [1, 2, 1, 0]), ("first", [0, 1, 1, 1]), ("half", None)):
        (tmp_path / f"smooth-{name}.json").write_text(json.dumps({"attn": [1, 0, 1, 0], "mlp": mlp}))
    (tmp_path / "keep.txt").write_text("mine")
    before = sorted(p.name for p in tmp_path.iterdir())
    for flags, words in (
        ([*METHOD, "--path", "deep.pt"], ["7 blocks", "has 3"]),
        ([*METHOD, "--path", "long.pt"], ["6 steps", "--num-sampling-steps 6"]),
        ([*METHOD, "--path", "cut.pt"], ["cut.pt"]),
        ([*METHOD, "--path", "none.pt"], ["no such file: none.pt"]),
        ([*METHOD, "--path", "empty"], ["empty is a folder: name a file in it"]),
        ([*SCHEDULE, "--path", "empty"], ["empty is a folder: name a file in it"]),
        ([*METHOD, "--path", "pickle.pt"], ["pickle.pt", "was not loaded"]),
        ([*METHOD, "--path", "deep-plan.pt"], ["deep-plan.pt is not a router file"]),
        ([*SCHEDULE, "--path", "deep-plan.pt"], ["7 blocks", "has 3"]),
        ([*SCHEDULE, "--path", "deep.pt"], ["deep.pt is not a schedule file", "--accelerate-method dynamiclayer"]),
        ([*METHOD, "--path", "digit.json"], ["digit.json is no router file", "--accelerate-method schedule"]),
        ([*SCHEDULE, "--path", "digit.json"], ["digit.json is not a schedule file: row 4 is '2'", "6 digits"]),
        ([*SCHEDULE, "--path", "width.json"], ["row 2 is '11 00'", "6 digits 1 and 0", "3 blocks"]),
        ([*SCHEDULE, "--path", "rows.json"], ["it has 2 rows for 4 steps"]),
        ([*SCHEDULE, "--path", "first.json"], ["step 3 runs first and must run every layer"]),
        ([*SCHEDULE, "--path", "order.json"], ["order 3 is none of 0 (reuse), 1 and 2"]),
        ([*SCHEDULE, "--path", "typo.json"], ["its keys are steps, depth, order, process and rows; unknown: oder"]),
        ([*SCHEDULE, "--path", "depth.json"], ["depth.json is for 7 blocks, the model has 3"]),
        ([*SCHEDULE, "--path", "steps.json"], ["steps.json is for 6 steps", "--num-sampling-steps 6"]),
        ([*SCHEDULE, "--path", "list.json"], ["it holds no JSON object"]),
        ([*SCHEDULE, "--path", "smooth-lengths.json"], ['"attn" has 4 steps and "mlp" has 2']),
        ([*SCHEDULE, "--path", "smooth-values.json"], ['"attn" and "mlp" must be lists of 1 (compute) and 0 (reuse)']),
        ([*SCHEDULE, "--path", "smooth-half.json"], ['"attn" has 4 steps and "mlp" has 0']),
        ([*SCHEDULE, "--path", "smooth-first.json"], ["step 3 runs first and must run every layer"]),
        ([*FORA, 2, "--save-schedule", "/proc/s.json"], ["/proc/s.json"]),
        (["--class-labels", 0, 5], ["class label 5", "0 to 4"]),
        (["--class-labels", -1], ["class label -1"]),
        (["--out", "keep.txt"], ["keep.txt", ".png"]),
        (["--out", "empty"], ["empty"]),
        (["--out", "keep.txt/x.png"], ["keep.txt"]),
        (["--out", "/proc/x.png"], ["/proc/x.png"]),
        (["--out", "fifo.png"], ["fifo.png", "not a file"]),
        ([*METHOD, "--path", "deep.pt", "--compare", "--record", "deep.pt"], ["deep.pt", ".json"]),
        (["--ckpt", "empty"], ["empty", "config.json"]),
        (["--ckpt", "cut.pt"], ["cut.pt"]),
        (["--ckpt", "pickle.pt"], ["pickle.pt", "was not loaded"]),
        (["--ckpt", "deep.pt"], ["deep.pt", "state dict"]),
        (["--ckpt", "gone.pt"], ["gone.pt"]),
    ):
        common = ["--num-sampling-steps", 4, "--device", "cpu", "--ckpt", model_folder]
        assert_refused(call("sample.py", *common, *flags, capfd=capfd), *words)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert (tmp_path / "keep.txt").read_text() == "mine"


def test_refusals_as_a_user_meets_them(sample, model_folder, tmp_path):
    """One of each program exit, in processes of their own: argparse, a damaged folder, weights of another model."""
    assert_refused(run("sample.py", "--frobnicate", cwd=tmp_path), "--frobnicate")
    shutil.copytree(model_folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "dit.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_refused(sample(ckpt=tmp_path / "cut", own=True), "dit.safetensors")
    torch.save({"x": torch.zeros(1)}, tmp_path / "wrong.pt")
    assert_refused(sample("--model", "DiT-S/8", ckpt=tmp_path / "wrong.pt"), "does not fit")


def test_released_files_that_cannot_be_fetched_name_their_url(tmp_path):
    result = run(
        "sample.py", *METHOD, "--path", "ckpt/DDIM20_router.pt", cwd=tmp_path, https_proxy="http://127.0.0.1:9"
    )
    if (ROOT / "ckpt" / "DDIM20_router.pt").exists():
        pytest.skip("the released router was fetched into ckpt/")
    assert result.returncode == 1
    assert "https://raw.githubusercontent.com" in result.stderr and "put it at" in result.stderr
    assert "Traceback" not in result.stderr


def test_lower_precision_and_compiled_blocks_change_the_picture_little(sample, model_folder, tmp_path):
    router = [*METHOD, "--path", model_folder / "router4.pt", "--thres", 0.5, "--ddim-sample", "--out"]
    for name, flags in {"fp32": [], "bf16": ["--dtype", "bf16"], "compiled": ["--compile"]}.items():
        result = sample(*router, f"{name}.png", *flags)
        assert result.returncode == 0, result.stderr
    fp32, bf16, compiled = (pixels(tmp_path / f"{name}.png").astype(int) for name in ("fp32", "bf16", "compiled"))
    assert abs(compiled - fp32).max() <= 1
    assert 0 < abs(bf16 - fp32).mean() < 8


def test_an_experimental_switch_is_printed_and_recorded(sample, model_folder, tmp_path):
    flags = [*METHOD, "--path", model_folder / "router4.pt", "--thres", 0.5, "--compare", "--dtype", "bf16", "--record"]
    result = sample(*flags, "r.json", "--out", "fp8.png", "--experimental", "fp8")
    assert result.returncode == 0 and "Experimental, measured on no GPU yet: fp8\n" in result.stdout, result.stderr
    assert json.loads((tmp_path / "r.json").read_text())["flags"]["experimental"] == ["fp8"]
    plain = sample(*flags, "plain.json", "--out", "plain.png")
    assert plain.returncode == 0 and "Experimental" not in plain.stdout
    difference = abs(pixels(tmp_path / "fp8.png").astype(int) - pixels(tmp_path / "plain.png").astype(int))
    assert 0 < difference.mean() < 5


@pytest.mark.parametrize(
    "flags, code, words",
    [
        (["fp8"], 2, "--experimental fp8 rounds the inputs of products in bf16: add --dtype bf16"),
        (["fp8", "gelu", "--dtype", "bf16"], 2, "--experimental fp8 replaces the product that gelu changes"),
        (["autotune"], 2, "--experimental autotune chooses among compiled kernels: add --compile"),
        (["vae-fp16", "--dtype", "fp16"], 2, "--experimental vae-fp16 is for a transformer in bf16"),
        (["vae-fp16", "--dtype", "bf16", "--random-weights"], 2, "leave it or --random-weights out"),
        (["fast"], 2, "invalid choice: 'fast'"),
        (["gelu"], 1, "--experimental gelu needs a CUDA device and this is cpu: leave it out"),
        (["vae-fp16", "--dtype", "bf16"], 1, "--experimental vae-fp16 needs a CUDA device and this is cpu"),
    ],
)
def test_an_experimental_switch_that_cannot_work_is_refused(sample, tmp_path, flags, code, words):
    result = sample("--experimental", *flags)
    assert_refused(result, words)
    assert result.returncode == code and not list(tmp_path.iterdir())


def test_cuda_graphs_are_refused_without_a_gpu(sample, tmp_path):
    assert_refused(sample("--cuda-graphs"), "--cuda-graphs needs a CUDA device", "cpu", "leave it out")
    assert list(tmp_path.iterdir()) == []
