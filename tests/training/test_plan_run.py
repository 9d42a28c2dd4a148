"""train_router.py --target-speedup as a user types it, on a small model."""

import json
import re
import shlex
import shutil

import pytest
import torch
from conftest import assert_refused, call
from PIL import Image

from diffusion import create_diffusion
from pretrained.loading import load_dit
from pretrained.spec import model_spec
from runtime.errors import UserError
from sampling import sample_latents
from schedule import Schedule
from training import plan_run, plan_table
from training.run_folder import RunFolder

STEPS = 8
RUN = "results/000-tiny"


@pytest.fixture
def learn(model_folder, tmp_path, monkeypatch, capfd):
    """Learn plans in an empty folder; few samples at once, so that a table has several parts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan_table, "MEMORY", 3_000_000)

    def learn(*more, code=0):
        flags = ["--ckpt", model_folder, "--num-sampling-steps", STEPS, "--device", "cpu"]
        result = call("train_router.py", *flags, *more, capfd=capfd)
        assert result.returncode == code, result
        return result

    return learn


def error(model_folder, plan, purpose, count):
    """The error of a plan on the samples of one purpose, sampled as sample.py does."""
    dit, diffusion = load_dit(model_spec(ckpt=str(model_folder)), torch.device("cpu")), create_diffusion(STEPS)
    z, y = plan_run.draw(dit, 0, purpose, 0, count, count)
    ends = [sample_latents(dit, diffusion, z, y, 2.0, schedule) for schedule in (None, plan)]
    return (ends[0] - ends[1]).square().mean().item()


def test_plans_are_as_fast_as_asked_and_printed_with_their_errors(learn, model_folder, capfd):
    result = learn("--target-speedup", 2, 1.3)
    dit = load_dit(model_spec(ckpt=str(model_folder)), torch.device("cpu"))
    every_nth = [Schedule.every_nth(STEPS, 3, n).with_order(2) for n in range(1, 9)]
    bounds = [plan.speedup_bound(dit.multiply_adds()) for plan in every_nth]
    lines = re.findall(r"^(\S+): speed-up at most (\S+), error (\S+) on 64 held-out.*: (.*)$", result.stdout, re.M)
    assert [line[0] for line in lines] == [f"{RUN}/DDIM8_1.3x.json", f"{RUN}/DDIM8_2x.json"]
    for target, (path, speedup, held_out, others) in zip((1.3, 2), lines):
        plan, picture = Schedule.load(path), Image.open(path.replace(".json", ".png"))
        assert (plan.steps, plan.depth, plan.order) == (STEPS, 3, 2) and picture.size[0] > 100
        bound = plan.speedup_bound(dit.multiply_adds())
        assert bound >= target and speedup == f"{bound:.3f}"
        assert float(held_out) == pytest.approx(error(model_folder, plan, "held-out", 64), rel=0.01)
        faster = next(n for n in range(8) if bounds[n] >= target)
        expected = []
        for n in dict.fromkeys([max(faster - 1, 1), faster]):
            expected += [error(model_folder, every_nth[n], "held-out", 64), bounds[n]]
        assert [float(x) for x in re.findall(r"[\d.]+(?:e[+-]\d+)?", others)] == pytest.approx(expected, rel=0.01)
        chosen, uniform = (error(model_folder, p, "choice", 64) for p in (plan, every_nth[faster]))
        assert chosen <= uniform * 1.0001

    commands = [shlex.split(line) for line in re.findall(r"^sample with it: python (.*)$", result.stdout, re.M)]
    assert [command[-1] for command in commands] == [line[0] for line in lines]
    for command in commands:
        sampled = call(*command, "--repeats", 1, "--out", "x.png", capfd=capfd)
        assert sampled.returncode == 0 and Image.open("x.png").size[0] > 8, sampled.stderr


@pytest.mark.parametrize(("order", "dtype"), [(0, "fp32"), (1, "bf16")])
def test_plans_of_other_orders_and_precision_without_guidance(learn, order, dtype):
    learn("--target-speedup", 1.5, "--forecast", order, "--cfg-scale", 1, "--dtype", dtype)
    assert Schedule.load(f"{RUN}/DDIM8_1.5x.json").order == order


def test_two_steps_are_enough(learn):
    learn("--target-speedup", 1.2, "--num-sampling-steps", 2)
    assert not Schedule.load(f"{RUN}/DDIM2_1.2x.json").compute[0].all()


def test_a_far_target_is_approached_in_steps_from_the_nearest_plan_below(dit, monkeypatch):
    aims = []

    def next_plan(search, plan, aim, number, key):
        aims.append((round(search.speedup(plan), 3), aim))
        return search.every_nth(2)

    monkeypatch.setattr(plan_run.Search, "round", next_plan)
    monkeypatch.setattr(plan_run.Search, "error", lambda *_: 0.0)
    monkeypatch.setattr(plan_run, "LARGEST_STEP", 1.1)
    search = plan_run.Search(plan_run.Problem(dit, create_diffusion(50), 1.5, 2, 0), {}, lambda: None)
    of_nth = {n: search.speedup(search.every_nth(n)) for n in range(2, 10)}
    target = of_nth[4] * 0.999  # every third step is below
    search.learn(target)
    start, far = of_nth[3], target / of_nth[3]
    assert 1.1 < far < 1.1**2
    assert [aim for _, aim in aims] == pytest.approx([start * far**0.5, target, target])
    assert aims[0][0] == round(start, 3)
    aims.clear()
    search.learn(of_nth[2] * 0.9)  # nothing but the full run is below: from every second step
    assert aims[0] == (round(of_nth[2], 3), of_nth[2] * 0.9) and len(aims) == 2
    aims.clear()
    search.learn(of_nth[3] * 0.99, last=search.every_nth(2))
    assert aims[0][0] == round(of_nth[2], 3)


def test_a_model_that_diverges_is_refused_in_one_line(dit):
    dit.pos_embed.fill_(torch.inf)
    problem = plan_run.Problem(dit, create_diffusion(4), 1.5, 2, 0)
    with pytest.raises(UserError, match="not finite"):
        problem.errors("choice", 2, Schedule.every_nth(4, 3, 2))


def test_a_search_that_diverges_ends_in_one_line(learn, monkeypatch):
    assert_refused(learn("--target-speedup", 1.5, "--cfg-scale", 1e38, code=1), "not finite")

    def diverging(*arguments):
        return compute(*arguments) * float("nan")

    compute = plan_run.error_table
    monkeypatch.setattr(plan_run, "error_table", diverging)
    assert_refused(learn("--target-speedup", 1.5, code=1), "gradients", "not finite", "--cfg-scale")


@pytest.mark.parametrize("resume", [RUN, "auto"])
def test_an_interrupted_search_continues_and_ends_as_an_uninterrupted_one(learn, monkeypatch, resume):
    flags = ["--target-speedup", 1.5]
    calls, compute = [], plan_run.error_table

    def counted(*arguments):
        calls.append(arguments[3])
        if len(calls) == stop:
            raise KeyboardInterrupt
        return compute(*arguments)

    monkeypatch.setattr(plan_run, "error_table", counted)
    stop = None
    learn(*flags, "--results-dir", "whole")
    total = len(calls)
    assert total >= 6  # two rounds of three parts or more
    expected = open("whole/000-tiny/DDIM8_1.5x.json").read()
    for stop in (2, total - 2):
        calls.clear()
        result = learn(*flags, *(["--resume", resume] if stop > 2 else []), code=130)
        assert f"--resume {RUN}" in result.stderr
    shutil.copytree(RUN, "copy/000-tiny")
    stop = None
    calls.clear()
    learn(*flags, "--resume", "copy/000-tiny/checkpoints/search.pt")
    assert open("copy/000-tiny/DDIM8_1.5x.json").read() == expected
    assert len(calls) == total - 1 - (total - 3)  # one part was known, then all but three were computed
    stop = 2
    calls.clear()
    learn(*flags, 1.2, "--resume", resume, code=130)  # another target comes first: what is known is not for its table
    assert torch.load(f"{RUN}/checkpoints/search.pt")["state"]["table"]["around"].startswith("1.2x, round 1")
    stop = None
    calls.clear()
    learn(*flags, "--resume", resume)
    assert open(f"{RUN}/DDIM8_1.5x.json").read() == expected
    assert len(calls) == total / 2  # the first round was known


def test_a_search_with_other_flags_is_refused_or_begins_anew(learn):
    learn("--target-speedup", 1.3)
    assert_refused(learn("--target-speedup", 1.3, "--forecast", 1, "--resume", RUN, code=1), "--forecast 2")
    assert "so a new one starts" in learn("--target-speedup", 1.3, "--global-seed", 1, "--resume", "auto").stdout
    assert json.loads(open("results/001-tiny/args.json").read())["args"]["global_seed"] == 1
    assert_refused(learn("--target-speedup", 1.3, "--resume", "nowhere", code=1), "nowhere")


def test_auto_refuses_a_search_in_use_and_skips_those_of_others(learn, monkeypatch):
    monkeypatch.setattr(RunFolder, "PATIENCE", 0.1)
    for seed in (0, 1):
        learn("--target-speedup", 1.3, "--global-seed", seed)
    flags, locks = ["--target-speedup", 1.3, "--resume", "auto"], [RunFolder("results/001-tiny")]
    assert "000-tiny" in learn(*flags).stdout
    assert_refused(learn(*flags, "--global-seed", 1, code=1), "results/001-tiny is in use")
    del locks


@pytest.mark.parametrize("change", [{"determining": 3}, {"state": 5}])
def test_a_damaged_search_is_refused_by_its_name_and_skipped_by_auto(learn, change):
    learn("--target-speedup", 1.3)
    path = f"{RUN}/checkpoints/search.pt"
    torch.save(torch.load(path) | change, path)
    flags = ["--target-speedup", 1.3, "--resume"]
    assert_refused(learn(*flags, RUN, code=1), f"{path} is no search to continue: name a folder")
    out = learn(*flags, "auto").stdout
    assert out.startswith(f"note: {RUN} is skipped: {path} is no search") and "001-tiny" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--target-speedup", 0.5], ["0.5 is not a number of at least 1"]),
        (["--target-speedup", 2, "nan"], ["nan is not a number"]),
        (["--target-speedup", 2, 50], ["--target-speedup 50 is beyond", "pass at most"]),
        (["--target-speedup", 2, "--data-path", "x", "--wandb"], ["leave out --data-path, --wandb"]),
        (["--target-speedup", 2, "--preset", "fashion-20"], ["leave out --preset"]),
        (["--target-speedup", 2, "--compile", "--vae", "mse"], ["leave out --compile, --vae"]),
        (["--target-speedup", 2, "--max-steps", 9, "--lr", 0.1, "--thres", 0.5], ["leave out --thres, --lr, --max-"]),
        (["--cfg-scale", 1, "--data-path", "x"], ["--cfg-scale is for plans: add --target-speedup"]),
    ],
)
def test_wrong_flags_are_refused_in_one_line(learn, flags, words):
    result = learn(*flags, code=1 if 50 in flags else 2)
    assert_refused(result, *words)


def test_several_processes_are_refused_in_one_line(learn, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert_refused(learn("--target-speedup", 2, code=2), "one process", "without torchrun")
