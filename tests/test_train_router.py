"""train_router.py as a user types it, one process and several."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_refused, call, fork, plain_images, run, start, torchrun
from PIL import Image

from router import Router
from train_router import parse_args
from training.batches import draw_steps


@pytest.fixture
def flags(model_folder, image_folder):
    """A router of six steps on the small model, four images an update."""
    common = ["--ckpt", model_folder, "--data-path", image_folder, "--num-sampling-steps", 6, "--num-workers", 0]
    common += ["--global-batch-size", 4, "--draws-per-step", 2, "--device", "cpu", "--lr", 0.05, "--log-every", 2]
    return [*common, "--l1", 1e-3]


@pytest.fixture
def train(flags, tmp_path, monkeypatch, capfd):
    """Trains in an empty folder: in this process, or as `fork` or `run` do."""
    monkeypatch.chdir(tmp_path)

    def train(*more, by=None, **how):
        if by:
            return by("train_router.py", *flags, *more, cwd=tmp_path, **how)
        return call("train_router.py", *flags, *more, capfd=capfd)

    return train


def read(folder, name="last.pt"):
    return torch.load(folder / "checkpoints" / name, weights_only=True)


def logits(folder, name="last.pt"):
    return torch.stack(list(read(folder, name)["routers"].values()))


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_process_trains_logs_draws_and_says_how_to_sample(train, model_folder, tmp_path):
    result = train("--max-steps", 5, "--ckpt-every", 2, "--keep", 2, "--wandb", by=run, WANDB_SILENT="true")
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "results" / "000-tiny"
    assert sorted(p.name for p in folder.iterdir() if p.name not in (".lock", "wandb")) == [
        "args.json",
        "checkpoints",
        "metrics.jsonl",
        "router.gif",
        "router.png",
    ]
    kept = ["0000004.png", "0000004.pt", "0000005.png", "0000005.pt", "last.pt"]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == kept
    assert "processes: 1\n" in result.stdout
    assert re.search(
        r"^update 4 epoch 0: loss \S+ mse \S+ l1 \S+ x 1.00e-03 cached \d+/18 \(\S+% of all\) \S+ G multiply-adds "
        r"bound 1\.\d+ \S+ images/s \S+ GiB$",
        result.stdout,
        re.M,
    )
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [2, 4, 5]
    drawn = [[(0, 2, 4)[k] for k in draw_steps(0, update, 2, 3)] for update in range(5)]
    counts = {row: sum(row in rows for rows in drawn) for row in (0, 2, 4)}
    assert lines[-1]["updates_per_row"] == {str(row): n for row, n in counts.items() if n}
    assert lines[0]["draws_per_step"] == {str(r): sum(drawn[:2], []).count(r) for r in sorted(set(sum(drawn[:2], [])))}

    saved = read(folder)
    assert {row: int(state["step"]) for row, state in saved["opt"]["state"].items()} == {
        row: n for row, n in counts.items() if n
    }
    torch.manual_seed(0)
    start = Router(6, 3)
    for i, row in enumerate(start.routers):
        moved = not torch.equal(saved["routers"][f"{i}.prob"], row.prob.detach())
        assert moved == (counts.get(i, 0) > 0)
    schedule = Router.load(folder / "checkpoints" / "0000005.pt").schedule(0.1)
    assert lines[-1]["cached"] == int((~schedule.compute).sum())
    assert lines[-1]["cached_share"] == pytest.approx(schedule.cached_share())
    assert lines[-1]["non_zero"] + lines[-1]["cached"] == 18

    # Weights & Biases went offline by itself and left its files.
    assert list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert list(folder.glob("wandb/offline-run-*/files/media/images/heatmap_*.png"))
    sync = re.search(r"send it with: wandb sync (\S+)$", result.stdout, re.M)[1]
    assert (tmp_path / sync).is_dir()

    command = shlex.split(re.search(r"^sample with it: python (.*)$", result.stdout, re.M)[1])
    sampled = run(*command, "--repeats", 1, "--out", "x.png", cwd=tmp_path)
    assert sampled.returncode == 0, sampled.stderr
    assert Image.open(tmp_path / "x.png").size[0] > 8


def test_epochs_end_the_training_and_straight_through_and_bf16_run(train, tmp_path):
    result = train("--epochs", 1, "--ste-threshold", 0.1, "--dtype", "bf16", "--grad-checkpointing")
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "results" / "000-tiny"
    assert read(folder)["step"] == 4  # 16 images in batches of 4
    assert "sample with it" in result.stdout and (folder / "router.gif").exists()
    more = train("--epochs", 2, "--ste-threshold", 0.1, "--dtype", "bf16", "--resume", "auto")
    assert more.returncode == 0 and read(folder)["step"] == 8, more.stderr


def test_compiled_blocks_make_the_same_router(train, tmp_path):
    for more in ([], ["--compile"]):
        result = train("--max-steps", 2, *more)
        assert result.returncode == 0, result.stderr
    plain, compiled = (logits(tmp_path / "results" / f"{k:03d}-tiny") for k in (0, 1))
    assert (plain - compiled).abs().max() < 1e-4


def test_one_two_and_four_processes_make_the_same_router(train, flags, tmp_path):
    """Two draws an update: one process runs both, of two each has one, of four two share one."""
    for processes in (1, 2, 4):
        result = train("--max-steps", 1, by=fork, processes=processes)
        assert result.returncode == 0, result.stderr
        if processes > 1:
            bytes_said = int(re.search(r"exchanging at most (\S+) bytes an update", result.stdout)[1].replace(",", ""))
            assert (
                metrics(tmp_path / "results" / f"{1 if processes == 2 else 2:03d}-tiny")[0]["reduced_bytes"]
                <= bytes_said
            )
            assert bytes_said == 4 * (2 * 6 + 2 + 2)
    one, two, four = (tmp_path / "results" / f"{k:03d}-tiny" for k in range(3))
    for other in (two, four):
        assert (logits(one) - logits(other)).abs().max() < 1e-6
        moments = [read(folder)["opt"]["state"] for folder in (one, other)]
        assert moments[0].keys() == moments[1].keys()
        for row, state in moments[0].items():
            torch.testing.assert_close(state["exp_avg"], moments[1][row]["exp_avg"], rtol=1e-4, atol=1e-9)


def test_two_hundred_updates_on_one_and_two_processes_end_with_the_same_schedule(train, tmp_path):
    for processes in (1, 2):
        result = train("--max-steps", 200, "--log-every", 200, "--l1", 0.5, by=fork, processes=processes)
        assert result.returncode == 0, result.stderr
    one, two = (Router.load(tmp_path / "results" / f"{k:03d}-tiny" / "checkpoints" / "last.pt") for k in (0, 1))
    assert torch.equal(one.schedule(0.1).compute, two.schedule(0.1).compute)
    assert 0 < one.schedule(0.1).cached_share() < 0.5
    assert (one.scores() - two.scores()).abs().max() < 1e-2


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def last_step(folder):
    try:
        return read(folder)["step"]
    except FileNotFoundError:
        return -1


def test_a_run_that_is_killed_ten_times_ends_with_the_router_of_an_unbroken_one(train, flags, tmp_path):
    more = ["--max-steps", 400, "--ckpt-every", 10, "--log-every", 10, "--keep", 2, "--target-cached", 0.3]
    assert train(*more, "--results-dir", "whole", by=fork).returncode == 0
    random.seed(0)
    steps, killed = 0, 0
    folder = tmp_path / "results" / "000-tiny"
    for k in range(10):
        with start("train_router.py", *flags, *more, "--resume", "auto", cwd=tmp_path) as process:
            if k % 5:
                wait_for(lambda: last_step(folder) > steps, process)  # noqa: B023
                time.sleep(random.uniform(0, 0.15))
            else:
                time.sleep(random.uniform(0.3, 3))  # while it starts, or soon after
            killed += process.poll() is None
            os.killpg(process.pid, signal.SIGKILL)
        steps = last_step(folder)
    assert killed == 10 and 0 < steps < 400
    result = train(*more, "--resume", "auto", by=fork)
    assert result.returncode == 0, result.stderr
    assert f"continues at update {steps}" in result.stdout
    whole = tmp_path / "whole" / "000-tiny"
    assert torch.equal(logits(folder), logits(whole))
    for row, state in read(whole)["opt"]["state"].items():
        assert all(torch.equal(value, read(folder)["opt"]["state"][row][name]) for name, value in state.items())
    timeless = [
        [{k: v for k, v in line.items() if k not in ("images_per_second", "memory_bytes")} for line in metrics(f)]
        for f in (folder, whole)
    ]
    assert timeless[0] == timeless[1]
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["000-tiny"]
    assert not list(folder.glob("checkpoints/.*.part"))
    # The same command once more: there is nothing left to do.
    again = train(*more, "--resume", "auto", by=fork)
    assert again.returncode == 0 and "sample with it" in again.stdout, again.stderr


@pytest.mark.parametrize("number, workers", [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 0)])
def test_a_run_that_is_stopped_saves_first_and_goes_on_in_its_folder(number, workers, train, flags, tmp_path):
    folder = tmp_path / "results" / "000-tiny"
    more = ["--num-workers", workers, "--ckpt-every", 100000]
    with start("train_router.py", *flags, *more, cwd=tmp_path) as process:
        wait_for(lambda: (folder / "metrics.jsonl").exists() and len(metrics(folder)) > 1, process)
        os.killpg(process.pid, number)  # as a terminal does: its data loading processes get it too
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    step = read(folder)["step"]
    assert step >= 4 and f"checkpoints/{step:07d}.pt; continue with the same command and --resume" in out
    result = train("--max-steps", step + 2, "--resume", folder, "--lr", 0.02)
    assert result.returncode == 0, result.stderr
    assert f"continues at update {step}" in result.stdout and "note: --lr was 0.05 in that run, now" in result.stdout
    assert read(folder)["step"] == step + 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("processes", [None, 2])
def test_a_gpu_trains_the_router_of_a_cpu(processes, train, tmp_path):
    if processes and torch.cuda.device_count() < processes:
        pytest.skip("one GPU")
    for device in ("cpu", "cuda"):
        more = ["--max-steps", 4, "--dtype", "fp32", "--device", device, "--results-dir", device]
        result = train(*more, by=run, processes=processes)
        assert result.returncode == 0, result.stderr
    on_cpu, on_gpu = (logits(tmp_path / device / "000-tiny") for device in ("cpu", "cuda"))
    torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=1e-2)
    assert (on_gpu - on_cpu).norm() < 1e-3 * on_cpu.norm()


def test_a_resumed_run_is_the_same_run_of_weights_and_biases(train, tmp_path):
    for steps in (2, 4):
        result = train("--max-steps", steps, "--wandb", "--resume", "auto", by=run, WANDB_SILENT="true")
        assert result.returncode == 0, result.stderr
    folders = list((tmp_path / "results" / "000-tiny" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and len({folder.name.rpartition("-")[2] for folder in folders}) == 1


def workers_of(process):
    """The pids of torchrun's two processes."""
    found = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "train_router"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_that_is_stopped_leaves_a_checkpoint(number, flags, tmp_path):
    folder = tmp_path / "results" / "000-tiny"
    more = ["--num-workers", 1, "--ckpt-every", 100000]
    with start("train_router.py", *flags, *more, cwd=tmp_path, launcher=torchrun(2)) as process:
        wait_for(lambda: (folder / "metrics.jsonl").exists() and len(metrics(folder)) > 1, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert read(folder)["step"] >= 4
    assert "train_router.py: interrupted" in err and "continue with the same command" in out


def test_torchrun_restarts_a_killed_process_and_the_router_is_that_of_an_unbroken_run(train, flags, tmp_path):
    more = ["--max-steps", 60, "--ckpt-every", 4]
    assert train(*more, "--results-dir", "whole", by=fork, processes=2).returncode == 0
    # A finished run of the same flags is not what the restart must find.
    shutil.copytree(tmp_path / "whole", tmp_path / "results")
    folder = tmp_path / "results" / "001-tiny"
    launcher = [*torchrun(2), "--max-restarts", "1"]
    with start("train_router.py", *flags, *more, cwd=tmp_path, launcher=launcher) as process:
        wait_for(lambda: last_step(folder) >= 8, process)
        os.kill(workers_of(process)[-1], signal.SIGKILL)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert re.search(r"continues at update \d+", out)
    assert torch.equal(logits(folder), logits(tmp_path / "whole" / "000-tiny"))
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == ["000-tiny", "001-tiny"]


def test_latents_made_by_two_processes_train_the_router_that_images_train(train, flags, tmp_path):
    extracted = train("--extract-latents", "latents", by=fork, processes=2)
    assert extracted.returncode == 0, extracted.stderr
    assert "train with --latents latents" in extracted.stdout
    assert not (tmp_path / "results").exists()
    at = flags.index("--data-path")
    without = flags[:at] + flags[at + 2 :]
    assert train("--max-steps", 6).returncode == 0
    result = fork("train_router.py", *without, "--latents", "latents", "--max-steps", 6, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    images, latents = (metrics(tmp_path / "results" / f"{k:03d}-tiny")[-1] for k in (0, 1))
    assert latents["mse"] == pytest.approx(images["mse"], rel=1e-2) and latents["epoch"] == images["epoch"] == 1
    # Adam's steps are about as long as the learning rate, whatever the gradient's size.
    assert (logits(tmp_path / "results" / "000-tiny") - logits(tmp_path / "results" / "001-tiny")).abs().max() < 0.02


def test_a_target_is_reached_and_a_larger_l1_weight_caches_more(train, tmp_path):
    shares = []
    for k, more in enumerate((["--l1", 0], ["--l1", 10], ["--l1", 1e-5, "--target-cached", 0.25])):
        result = train("--max-steps", 300, "--lr", 0.2, "--log-every", 100, *more)
        assert result.returncode == 0, result.stderr
        lines = metrics(tmp_path / "results" / f"{k:03d}-tiny")
        shares.append(lines[-1]["cached_share"])
    assert shares[0] < shares[2] < shares[1]
    # One layer is 1/36 of all: the target of 9 layers is met exactly or missed by one.
    assert abs(shares[2] - 0.25) <= 1 / 36 + 1e-6
    assert len({line["l1_weight"] for line in lines}) == 3


def test_a_damaged_image_is_named_and_more_than_one_percent_are_refused(
    flags, model_folder, image_folder, tmp_path, capfd
):
    folder = tmp_path / "images"
    plain_images(folder, 120)
    broken = folder / "class1" / "001.png"
    broken.write_bytes(b"no picture")
    common = [*flags, "--data-path", folder, "--results-dir", tmp_path / "results", "--epochs", 1]
    for workers in (0, 1):
        result = call("train_router.py", *common, "--num-workers", workers, capfd=capfd)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count(f"skipped {broken}") == 1
        assert metrics(tmp_path / "results" / f"{workers:03d}-tiny")[-1]["skipped_images"] == 1
        assert torch.equal(*[logits(tmp_path / "results" / f"{k:03d}-tiny") for k in (0, workers)])
    (folder / "class2" / "002.png").write_bytes(b"")
    result = call("train_router.py", *common, capfd=capfd)
    assert result.returncode == 1 and "2 of 120 images cannot be read, more than 1 %" in result.stderr.splitlines()[-1]
    # Who replaces them can go on.
    for name in ("class1/001.png", "class2/002.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    result = call("train_router.py", *common, "--resume", tmp_path / "results" / "002-tiny", capfd=capfd)
    assert result.returncode == 0, result.stderr
    shutil.rmtree(folder / "class4")
    assert_refused(call("train_router.py", *common, capfd=capfd), "has 4 classes, the model 5")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(flags, tmp_path, monkeypatch, capfd):
    from training import trainer

    calls = []

    def sometimes_nan(*args):
        calls.append(args)
        return updates_loss(*args) * (float("nan") if len(calls) == 12 else 1)

    updates_loss = trainer.router_loss
    monkeypatch.setattr(trainer, "router_loss", sometimes_nan)
    results = tmp_path / "results"
    result = call("train_router.py", *flags, "--ckpt-every", 4, "--max-steps", 8, "--results-dir", results, capfd=capfd)
    assert result.returncode == 1
    # Two draws an update: the twelfth call is the sixth update's second.
    assert "the loss of draw 1, step " in result.stderr.splitlines()[-1]
    assert ", in update 6 is not finite (nan)" in result.stderr.splitlines()[-1]
    saved = read(results / "000-tiny")
    assert saved["step"] == 5 and all(row.isfinite().all() for row in saved["routers"].values())


@pytest.mark.parametrize(
    "more, words",
    [
        (["--data-path", "no/such"], ["no such folder: no/such"]),
        (["--data-path", "."], ["has no images"]),
        (["--resume", "no.pt"], ["no.pt"]),
        (["--global-batch-size", 18], ["16 images", "--global-batch-size 18"]),
        (
            ["--global-batch-size", 5],
            ["5 does not divide among --draws-per-step 2", "pass --global-batch-size 6", "1, 5"],
        ),
        (["--num-sampling-steps", 1], ["2 to 1000"]),
        (["--num-sampling-steps", 1001], ["1001"]),
        (["--ste-threshold", 2], ["not a number in [0, 1]"]),
        (["--target-cached", 0.6], ["0.6 is not a number in (0, 0.5]"]),
        (["--target-cached", 0.45, "--num-sampling-steps", 5], ["0.45", "0.400"]),
        (["--max-steps", 0], ["0"]),
        (["--lr", -1], ["-1 is not a finite number of at least 0"]),
        (["--l1", "abc"], ["abc is not a finite number"]),
        (["--l1", 0, "--target-cached", 0.2], ["--target-cached", "--l1"]),
        (["--thres", 0, "--target-cached", 0.2], ["--thres 0", "0.01 to 0.99"]),
        (["--num-workers", -1], ["-1"]),
        (["--keep", 0], ["0"]),
        (["--preset", "xl3"], ["xl2-20"]),
        (["--latents", "here"], ["--data-path", "--latents"]),
        (["--extract-latents", "here", "--latents", "there"], ["--extract-latents needs --data-path"]),
        (["--ckpt", "no.pt", "--num-classes", 5], ["no.pt"]),
        (["--results-dir", "/proc/results"], ["/proc/results", "--results-dir"]),
        (["--extract-latents", "/proc/latents"], ["/proc/latents"]),
        (["--extract-latents", "/proc/version"], ["/proc/version is no folder"]),
        (["--l2", 1], ["--l2"]),
    ],
)
def test_bad_input_is_refused_in_one_line(more, words, flags, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert_refused(call("train_router.py", *flags, *more, capfd=capfd), *words)
    assert not list(tmp_path.iterdir())


def test_a_router_of_another_model_or_step_count_is_not_continued(flags, model_folder, tmp_path, monkeypatch, capfd):
    from safetensors.torch import load_file, save_file

    monkeypatch.chdir(tmp_path)
    assert call("train_router.py", *flags, "--max-steps", 1, capfd=capfd).returncode == 0
    resume = ["--resume", "results/000-tiny"]
    other = tmp_path / "other" / "tiny"
    shutil.copytree(model_folder, other)
    weights = load_file(other / "dit.safetensors")
    save_file(weights | {"x_embedder.proj.bias": weights["x_embedder.proj.bias"] + 1}, other / "dit.safetensors")
    for more, words in (
        (["--num-sampling-steps", 4], ["for 6 steps, not 4", "--num-sampling-steps 6"]),
        (["--ckpt", other], ["another model"]),
        (["--max-steps", 1], ["has 1 updates already, of 1", "--max-steps"]),
        (["--resume", "results"], ["last.pt"]),
    ):
        result = call("train_router.py", *flags, *resume, *more, capfd=capfd)
        assert_refused(result, *words)
    assert [p.name for p in Path("results").iterdir()] == ["000-tiny"]


def test_a_batch_that_does_not_divide_among_the_processes_is_refused_once(train):
    result = train("--global-batch-size", 6, "--max-steps", 1, by=run, processes=4)
    assert result.returncode != 0
    assert result.stderr.count("--global-batch-size 6 does not divide among 4 processes: pass 8") == 1


def test_presets_set_the_published_numbers_and_a_flag_that_is_given_wins():
    args = parse_args(["--preset", "xl2-512-50", "--data-path", "x"])
    published = dict(model="DiT-XL/2", image_size=512, num_sampling_steps=50, l1=5e-6, lr=1e-3, thres=0.9)
    published |= dict(max_steps=40000, global_batch_size=64, draws_per_step=8)
    assert {name: getattr(args, name) for name in published} == published
    args = parse_args(["--preset", "l2-20", "--data-path", "x", "--lr", "0.5", "--max-steps", "7"])
    assert (args.model, args.l1, args.lr, args.max_steps, args.num_sampling_steps) == ("DiT-L/2", 5e-6, 0.5, 7, 20)
    assert parse_args(["--preset", "fashion-20"]).data_path == "demo/data/train"
    latents = parse_args(["--preset", "fashion-20", "--latents", "x"])
    assert latents.data_path is None and latents.latents == "x"
    help_text = subprocess.run([sys.executable, ROOT / "train_router.py", "--help"], capture_output=True, text=True)
    from training.presets import PRESETS

    for name in PRESETS:
        assert re.search(rf"^  {name} .*\n {{14}}\S", help_text.stdout, re.M)
