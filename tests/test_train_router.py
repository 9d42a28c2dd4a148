"""train_router.py as a user types it, on one process and on several."""

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
from conftest import ROOT, assert_refused, call, fork, plain_images, run, start, start_ranks, torchrun
from PIL import Image

from router import Router
from train_router import parse_args
from training import trainer
from training.batches import draw_steps
from training.presets import PRESETS
from training.run_folder import RunFolder

RUN = Path("results/000-tiny")


@pytest.fixture
def flags(model_folder, image_folder):
    """A router for six steps of the small model, four images per update."""
    common = ["--ckpt", model_folder, "--data-path", image_folder, "--num-sampling-steps", 6, "--num-workers", 0]
    common += ["--global-batch-size", 4, "--draws-per-step", 2, "--device", "cpu", "--lr", 0.05, "--log-every", 2]
    return [*common, "--l1", 1e-3]


@pytest.fixture
def extraction(model_folder, image_folder):
    """Flags that encode the images and stop."""
    return ["--ckpt", model_folder, "--data-path", image_folder, "--device", "cpu", "--extract-latents", "latents"]


@pytest.fixture
def train(flags, tmp_path, monkeypatch, capfd):
    """Train in an empty folder, in this process or as `fork` or `run` do."""
    monkeypatch.chdir(tmp_path)

    def train(*more, by=None, code=0, **how):
        how = dict(cwd=tmp_path, **how) if by else dict(capfd=capfd)
        result = (by or call)("train_router.py", *flags, *more, **how)
        assert result.returncode == code, result.stderr
        return result

    return train


def read(folder=RUN):
    return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)


def logits(folder=RUN):
    return torch.stack(list(read(folder)["routers"].values()))


def metrics(folder=RUN):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def last_update(folder=RUN):
    return read(folder)["step"] if (folder / "checkpoints" / "last.pt").exists() else -1


def wait_for(condition, process):
    end = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def has_logged():
    return (RUN / "metrics.jsonl").exists() and len(metrics()) > 1


def test_a_training_writes_its_folder_and_the_command_to_sample_with_it(train, capfd):
    result = train("--max-steps", 5, "--ckpt-every", 2, "--keep", 2)
    names = ["args.json", "checkpoints", "metrics.jsonl", "router.gif", "router.png"]
    assert sorted(p.name for p in RUN.iterdir() if p.name != ".lock") == names
    kept = ["0000004.png", "0000004.pt", "0000005.png", "0000005.pt", "last.pt"]
    assert sorted(p.name for p in (RUN / "checkpoints").iterdir()) == kept
    assert re.search(
        r"^update 4 epoch 0: loss \S+ mse \S+ l1 \S+ x 1.00e-03 cached \d+/18 \(\S+% of all\) \S+ G multiply-adds "
        r"bound 1\.\d+ \S+ images/s \S+ GiB$",
        result.stdout,
        re.M,
    )
    lines, saved = metrics(), read()
    assert [line["step"] for line in lines] == [2, 4, 5]
    drawn = [[(0, 2, 4)[k] for k in draw_steps(0, update, 2, 3)] for update in range(5)]
    counts = {row: n for row in (0, 2, 4) if (n := sum(row in rows for rows in drawn))}
    assert lines[-1]["updates_per_row"] == {str(row): n for row, n in counts.items()}
    assert {row: int(state["step"]) for row, state in saved["opt"]["state"].items()} == counts
    torch.manual_seed(0)
    for i, row in enumerate(Router(6, 3).routers):
        assert torch.equal(saved["routers"][f"{i}.prob"], row.prob.detach()) == (i not in counts)
    schedule = Router.load(RUN / "checkpoints" / "0000005.pt").schedule(0.1)
    assert lines[-1]["cached"] == int((~schedule.compute).sum()) == 18 - lines[-1]["non_zero"]

    command = shlex.split(re.search(r"^sample with it: python (.*)$", result.stdout, re.M)[1])
    sampled = call(*command, "--repeats", 1, "--out", "x.png", capfd=capfd)
    assert sampled.returncode == 0 and Image.open("x.png").size[0] > 8, sampled.stderr


@pytest.mark.slow
def test_wandb_logs_offline_and_a_resumed_run_is_the_same_run(train):
    for updates in (2, 4):
        more = ["--max-steps", updates, "--wandb", "--resume", "auto"]
        out = train(*more, by=run, WANDB_SILENT="true").stdout
    assert Path(re.search(r"send it with: wandb sync (\S+)$", out, re.M)[1]).is_dir()
    folders = list((RUN / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and len({folder.name.rpartition("-")[2] for folder in folders}) == 1
    for folder in folders:
        assert list(folder.glob("run-*.wandb")) and list(folder.glob("files/media/images/heatmap_*.png"))


def test_epochs_end_the_training_and_straight_through_and_bf16_run(train):
    more = ["--ste-threshold", 0.1, "--dtype", "bf16"]
    result = train("--epochs", 1, "--grad-checkpointing", *more)
    assert last_update() == 4  # 16 images in batches of 4
    assert "sample with it" in result.stdout and (RUN / "router.gif").exists()
    train("--epochs", 2, "--resume", "auto", *more)
    assert last_update() == 8


@pytest.mark.slow
def test_compiled_blocks_train_the_same_router(train):
    for more in ([], ["--compile"]):
        train("--max-steps", 2, *more)
    assert (logits() - logits(RUN.with_name("001-tiny"))).abs().max() < 1e-4


@pytest.mark.parametrize("by, processes", [(run, 2), pytest.param(fork, 4, marks=pytest.mark.slow)])
def test_any_number_of_processes_trains_the_same_router(train, by, processes):
    """Two draws per update: one process makes both, each of two makes one, two of four share one."""
    train("--max-steps", 2, "--results-dir", "one")
    result = train("--max-steps", 2, by=by, processes=processes)
    assert f"processes: {processes}\n" in result.stdout
    assert 0 < metrics()[-1]["reduced_bytes"] <= 4 * (2 * 6 + 2 + 2)
    one = Path("one/000-tiny")
    assert (logits(one) - logits()).abs().max() < 1e-5
    moments = [read(folder)["opt"]["state"] for folder in (one, RUN)]
    assert moments[0].keys() == moments[1].keys()
    for row, state in moments[0].items():
        torch.testing.assert_close(state["exp_avg"], moments[1][row]["exp_avg"], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    "more, different",
    [
        (["--lr", 0.01, "--num-workers", 1], "--lr"),
        (["--wandb"], "--wandb"),
        (["--data-path", "other"], "data"),
    ],
)
def test_processes_with_different_flags_or_files_are_refused(flags, tmp_path, more, different):
    plain_images(tmp_path / "other", 15)
    processes = start_ranks("train_router.py", flags, [*flags, *more], cwd=tmp_path)
    outputs = [process.communicate(600) for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    line = f"process 1 differs from process 0 in {different}: pass the same flags and files"
    assert outputs == [("", f"train_router.py: error: {line}\n"), ("", "")]
    assert os.listdir(tmp_path) == ["other"]


def test_an_extraction_beside_a_training_is_refused(flags, extraction, tmp_path):
    processes = start_ranks("train_router.py", flags, extraction, cwd=tmp_path)
    outputs = [process.communicate(600) for process in processes]
    assert "process 1 differs from process 0 in" in outputs[0][1] and "--extract-latents" in outputs[0][1]
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_with_the_router_of_an_uninterrupted_one(train, flags, tmp_path):
    more = ["--max-steps", 400, "--ckpt-every", 10, "--log-every", 10, "--keep", 2, "--target-cached", 0.3]
    train(*more, "--results-dir", "whole", by=fork)
    random.seed(0)
    updates = 0
    for k in range(10):
        with start("train_router.py", *flags, *more, "--resume", "auto", cwd=tmp_path) as process:
            if k % 5:
                wait_for(lambda least=updates: last_update() > least, process)
                time.sleep(random.uniform(0, 0.15))
            else:
                time.sleep(random.uniform(0.3, 3))  # while it starts, or soon after
            assert process.poll() is None
            os.killpg(process.pid, signal.SIGKILL)
        updates = last_update()
    assert 0 < updates < 400
    assert f"continues at update {updates}" in train(*more, "--resume", "auto", by=fork).stdout
    whole = Path("whole/000-tiny")
    assert torch.equal(logits(), logits(whole))
    for row, state in read(whole)["opt"]["state"].items():
        assert all(torch.equal(value, read()["opt"]["state"][row][name]) for name, value in state.items())
    timed = ("images_per_second", "memory_bytes")
    lines = [[{k: v for k, v in line.items() if k not in timed} for line in metrics(f)] for f in (RUN, whole)]
    assert lines[0] == lines[1]
    assert [p.name for p in Path("results").iterdir()] == ["000-tiny"] and not list(RUN.glob("checkpoints/.*.part"))
    # The same command again has nothing left to do.
    assert "sample with it" in train(*more, "--resume", "auto", by=fork).stdout


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [None, torchrun(2)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_training_saves_first_and_continues_in_its_folder(number, launcher, train, flags, tmp_path):
    more = ["--num-workers", 1, "--ckpt-every", 100000]
    with start("train_router.py", *flags, *more, cwd=tmp_path, launcher=launcher) as process:
        wait_for(has_logged, process)
        if launcher:
            process.send_signal(number)
        else:
            os.killpg(process.pid, number)  # as a terminal does: data loading workers get it too
        out, err = process.communicate(timeout=300)
    assert "train_router.py: interrupted" in err
    assert launcher or (process.returncode == 130 and "Traceback" not in err)
    update = last_update()
    assert update >= 4 and f"checkpoints/{update:07d}.pt; continue with the same command and --resume" in out
    out = train("--max-steps", update + 2, "--resume", RUN, "--lr", 0.02).stdout
    assert f"continues at update {update}" in out and "note: --lr was 0.05 in that run, now" in out
    assert last_update() == update + 2


def test_auto_does_not_train_a_second_time_what_another_process_trains(train, monkeypatch):
    monkeypatch.setattr(RunFolder, "PATIENCE", 0.1)
    train("--max-steps", 1)
    lock = RunFolder(RUN)
    more = ["--max-steps", 1, "--resume", "auto"]
    assert_refused(train(*more, code=1), f"{RUN} is in use: wait for that training")
    assert os.listdir("results") == ["000-tiny"]
    assert "so a new one starts" in train(*more, "--lr", 0.01).stdout  # another training is none of its business
    del lock


def test_auto_continues_the_last_readable_checkpoint_to_the_same_router(train):
    more = ["--max-steps", 4, "--ckpt-every", 2, "--target-cached", 0.3]
    train(*more)
    whole, last = logits(), RUN / "checkpoints" / "last.pt"
    incomplete = {"window": {}, "opt": {}, "identity": {}, "step": -5, "skipped": 3}
    for name, value in incomplete.items():
        torch.save(read() | {name: value}, last)
        (RUN / "checkpoints" / "0000004.pt").unlink()
        assert_refused(train(*more, "--resume", last, code=1), f"{last} is no checkpoint", "incomplete: pass another")
        assert "continues at update 2 of 4" in train(*more, "--resume", "auto").stdout
        assert torch.equal(logits(), whole)
    for path in last.parent.glob("*.pt"):
        path.write_bytes(b"")
    out = train(*more, "--resume", "auto").stdout
    assert out.startswith(f"note: {RUN} is skipped: {last} is empty") and os.listdir("results") != ["000-tiny"]


def test_a_log_with_incomplete_lines_ends_in_an_animation_of_the_others(train):
    train("--max-steps", 2)
    with (RUN / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1}\n{"step": 2, "scores": [[1, 2], [3]]}\n')
    assert "how it developed" in train("--max-steps", 4, "--resume", "auto").stdout
    assert [line["step"] for line in metrics()] == [2, 1, 2, 4]
    assert Image.open(RUN / "router.gif").n_frames == 2


@pytest.mark.parametrize("lr", ["1000", "1e308"])
def test_a_target_with_a_huge_learning_rate_ends_with_a_finite_l1_weight(train, lr):
    train("--target-cached", 0.3, "--lr", lr, "--max-steps", 4)
    assert all(0 < line["l1_weight"] < 1e16 for line in metrics())


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank_and_the_router_is_that_of_an_uninterrupted_run(train, flags, tmp_path):
    more = ["--max-steps", 60, "--ckpt-every", 4]
    train(*more, by=fork, processes=2)
    folder = RUN.with_name("001-tiny")  # the restart must not find the finished run of the same flags
    launcher = [*torchrun(2), "--max-restarts", "1"]
    with start("train_router.py", *flags, *more, cwd=tmp_path, launcher=launcher) as process:
        wait_for(lambda: last_update(folder) >= 8, process)
        ranks = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "train_router"], capture_output=True, text=True)
        os.kill(int(ranks.stdout.split()[-1]), signal.SIGKILL)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and re.search(r"continues at update \d+", out), err
    assert torch.equal(logits(folder), logits())
    assert sorted(p.name for p in Path("results").iterdir()) == ["000-tiny", "001-tiny"]


@pytest.mark.gpu
@pytest.mark.parametrize("processes", [1, 2])
def test_a_gpu_trains_the_router_of_a_cpu(processes, train):
    if torch.cuda.device_count() < processes:
        pytest.skip("one GPU")
    for device in ("cpu", "cuda"):
        more = ["--max-steps", 4, "--dtype", "fp32", "--device", device, "--results-dir", device]
        train(*more, by=run, processes=processes)
    on_cpu, on_gpu = (logits(Path(device) / "000-tiny") for device in ("cpu", "cuda"))
    torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=1e-2)
    assert (on_gpu - on_cpu).norm() < 1e-3 * on_cpu.norm()


def test_latents_extracted_by_two_processes_train_the_router_that_images_train(train, flags, extraction, tmp_path):
    extracted = fork("train_router.py", *extraction, cwd=tmp_path, processes=2)
    assert "train with --latents latents" in extracted.stdout and not Path("results").exists()
    train("--max-steps", 6)
    at = flags.index("--data-path")
    flags[at : at + 2] = "--latents", "latents"
    train("--max-steps", 6)
    other = RUN.with_name("001-tiny")
    images, latents = metrics()[-1], metrics(other)[-1]
    assert latents["mse"] == pytest.approx(images["mse"], rel=1e-2) and latents["epoch"] == images["epoch"] == 1
    # Adam's steps are about as long as the learning rate, whatever the size of the gradient.
    assert (logits() - logits(other)).abs().max() < 0.02


@pytest.mark.slow
def test_a_target_is_reached_and_a_larger_l1_weight_caches_more(train):
    shares = []
    for k, more in enumerate((["--l1", 0], ["--l1", 10], ["--l1", 1e-5, "--target-cached", 0.25])):
        train("--max-steps", 300, "--lr", 0.2, "--log-every", 100, *more)
        lines = metrics(RUN.with_name(f"{k:03d}-tiny"))
        shares.append(lines[-1]["cached_share"])
    assert shares[0] < shares[2] < shares[1]
    # One layer is 1/36 of all: the target of 9 layers is met or missed by one.
    assert abs(shares[2] - 0.25) <= 1 / 36 + 1e-6
    assert len({line["l1_weight"] for line in lines}) == 3


def test_a_damaged_image_is_named_and_more_than_one_percent_are_refused(train, flags):
    folder = Path("images").resolve()
    plain_images(folder, 120)
    broken = [folder / "class1" / "001.png", folder / "class2" / "002.png"]
    broken[0].write_bytes(b"no picture")
    more = ["--data-path", folder, "--epochs", 1]
    for workers in (0, 1):
        result = train(*more, "--num-workers", workers)
        assert result.stdout.count(f"skipped {broken[0]}") == 1
        assert metrics(RUN.with_name(f"{workers:03d}-tiny"))[-1]["skipped_images"] == 1
    assert torch.equal(logits(), logits(RUN.with_name("001-tiny")))
    broken[1].write_bytes(b"")
    error = train(*more, code=1).stderr.splitlines()[-1]
    assert "2 of 120 images cannot be read, more than 1 %" in error
    for path in broken:  # after they are replaced, the training continues
        Image.new("RGB", (8, 8)).save(path)
    train(*more, "--resume", RUN.with_name("002-tiny"))
    shutil.rmtree(folder / "class4")
    assert_refused(train(*more, code=1), "has 4 classes, the model 5")


@pytest.mark.parametrize("program_flags", ["flags", "extraction"])
def test_more_damaged_images_than_allowed_end_the_program_and_its_workers(program_flags, request, tmp_path):
    """Two ranks, whose workers ignore signals: each of them must end."""
    folder = tmp_path / "images"
    plain_images(folder, 60)
    for path in folder.glob("class?/00*.png"):
        path.write_bytes(b"no picture")
    more = [*request.getfixturevalue(program_flags), "--data-path", folder, "--num-workers", 2]
    result = fork("train_router.py", *more, cwd=tmp_path, processes=2)
    assert result.returncode == 1 and "cannot be read, more than 1 %" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_name_that_is_not_utf_8_can_be_printed_logged_and_resumed(train, model_folder):
    """In Latin-1, as on an old disk: of a damaged image and of the model's folder."""
    folder, model = Path("images").resolve(), os.fsdecode(b"caf\xe9")
    plain_images(folder, 120)
    damaged = folder / "class1" / os.fsdecode(b"caf\xe9.png")
    (folder / "class1" / "001.png").rename(damaged)
    damaged.write_bytes(b"no picture")
    shutil.copytree(model_folder, model)
    more = ["--ckpt", model, "--data-path", folder, "--resume", "auto"]
    for epochs in (1, 2):
        result = train(*more, "--epochs", epochs, by=fork)
        assert f"results/000-caf\\udce9/checkpoints/{epochs * 30:07d}.pt" in result.stdout
        assert (r"class1/caf\udce9.png: " in result.stdout) == (epochs == 1)  # named once


def test_a_loss_that_is_not_finite_stops_and_the_last_good_router_is_saved(train, monkeypatch):
    calls, router_loss = [], trainer.router_loss

    def sometimes_nan(*args):
        calls.append(args)
        return router_loss(*args) * (float("nan") if len(calls) == 12 else 1)

    monkeypatch.setattr(trainer, "router_loss", sometimes_nan)
    error = train("--ckpt-every", 4, "--max-steps", 8, code=1).stderr.splitlines()[-1]
    # Two draws per update: the twelfth call is the second draw of update 6.
    assert "the loss of draw 1, step " in error and ", in update 6 is not finite (nan)" in error
    assert last_update() == 5 and logits().isfinite().all()


def test_an_update_that_is_interrupted_half_made_is_not_saved(train, monkeypatch):
    train("--max-steps", 8, "--ckpt-every", 4)
    whole, calls, clamp_ = logits(), [], trainer.Router.clamp_

    def interrupted(router):
        calls.append(router)
        if len(calls) == 6:
            raise KeyboardInterrupt
        clamp_(router)

    monkeypatch.setattr(trainer.Router, "clamp_", interrupted)
    train("--max-steps", 8, "--ckpt-every", 4, code=130)
    again = Path("results/001-tiny")
    assert last_update(again) == 4
    monkeypatch.setattr(trainer.Router, "clamp_", clamp_)
    train("--max-steps", 8, "--resume", again)
    assert torch.equal(logits(again), whole)


@pytest.mark.parametrize(
    "more, words",
    [
        ("--data-path no/such", ["no/such", "No such file"]),
        ("--data-path .", ["has no images"]),
        ("--resume no.pt", ["no.pt"]),
        ("--global-batch-size 18", ["16 images", "--global-batch-size 18"]),
        ("--global-batch-size 5", ["5 does not divide among 2 draws (--draws-per-step)", "pass 6"]),
        ("--num-sampling-steps 1", ["2 to 1000"]),
        ("--ste-threshold 2", ["not a number in [0, 1]"]),
        ("--target-cached 0.6", ["0.6 is not a number in (0, 0.5]"]),
        ("--target-cached 0.45 --num-sampling-steps 5", ["0.45", "0.400"]),
        ("--max-steps 0", ["0"]),
        ("--lr -1", ["-1 is not a finite number of at least 0"]),
        ("--l1 0 --target-cached 0.2", ["--target-cached", "--l1"]),
        ("--thres 0 --target-cached 0.2", ["--thres 0", "0.01 to 0.99"]),
        ("--preset xl3", ["xl2-20"]),
        ("--latents here", ["--data-path", "--latents"]),
        ("--extract-latents here --latents there", ["--extract-latents needs --data-path"]),
        ("--ckpt no.pt --num-classes 5", ["no.pt"]),
        ("--results-dir /proc/results", ["/proc/results", "--results-dir"]),
        ("--l2 1", ["--l2"]),
    ],
)
def test_wrong_flags_are_refused_in_one_line(more, words, train, flags, capfd):
    assert_refused(call("train_router.py", *flags, *more.split(), capfd=capfd), *words)
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    "more, words",
    [
        ("--extract-latents /proc/latents", ["/proc/latents"]),
        ("--extract-latents /proc/version", ["/proc/version is no folder"]),
        ("--resume auto --wandb --target-cached 0.3", ["leave out --target-cached, --resume, --wandb"]),
        ("--lr 5 --compile --max-steps 3 --results-dir x", ["leave out --lr, --max-steps, --compile, --results-dir"]),
        ("--preset fashion-20 --lr 5", ["--extract-latents encodes images and trains no router: leave out --lr ("]),
        ("--ste-threshold 0.1 --forecast 1 --keep 1 --epochs 2", ["--epochs, --ste-threshold, --forecast, --keep"]),
        ("--dtype bf16 --global-seed 1 --thres 0.5 --l1 0", ["leave out --l1, --thres, --global-seed, --dtype"]),
    ],
)
def test_flags_that_an_extraction_does_not_use_are_refused(more, words, extraction, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert_refused(call("train_router.py", *extraction, *more.split(), capfd=capfd), *words)
    assert not list(Path().iterdir())


def test_an_extraction_takes_the_values_of_a_preset():
    more = ["--data-path", "x", "--extract-latents", "latents", "--num-workers", "2", "--vae", "mse"]
    for preset in PRESETS:
        args = parse_args(["--preset", preset, *more])
        assert args.extract_latents == "latents" and args.max_steps == PRESETS[preset][0]["max_steps"]


def test_a_batch_that_does_not_divide_among_the_ranks_is_refused(flags, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "4")
    result = call("train_router.py", *flags, "--global-batch-size", 6, capfd=capfd)
    assert_refused(result, "--global-batch-size 6 does not divide among", "4 processes: pass 8")


def test_a_router_of_another_model_or_step_count_is_not_continued(train, flags, model_folder, capfd):
    from safetensors.torch import load_file, save_file

    train("--max-steps", 1)
    other = Path("other/tiny")
    shutil.copytree(model_folder, other)
    weights = load_file(other / "dit.safetensors")
    save_file(weights | {"x_embedder.proj.bias": weights["x_embedder.proj.bias"] + 1}, other / "dit.safetensors")
    for more, words in (
        (["--num-sampling-steps", 4], ["for 6 steps", "--num-sampling-steps 6"]),
        (["--ckpt", other], ["another model"]),
        (["--max-steps", 1], ["has 1 of 1 updates already", "--max-steps"]),
        (["--resume", "results"], ["last.pt"]),
    ):
        assert_refused(call("train_router.py", *flags, "--resume", RUN, *more, capfd=capfd), *words)
    assert [p.name for p in Path("results").iterdir()] == ["000-tiny"]


def test_presets_set_the_published_values_and_given_flags_win():
    args = parse_args(["--preset", "xl2-512-50", "--data-path", "x"])
    published = dict(model="DiT-XL/2", image_size=512, num_sampling_steps=50, l1=5e-6, lr=1e-3, thres=0.9)
    published |= dict(max_steps=40000, global_batch_size=64, draws_per_step=8)
    assert {name: getattr(args, name) for name in published} == published
    args = parse_args(["--preset", "l2-20", "--data-path", "x", "--lr", "0.5", "--max-steps", "7"])
    assert (args.model, args.l1, args.lr, args.max_steps, args.num_sampling_steps) == ("DiT-L/2", 5e-6, 0.5, 7, 20)
    assert parse_args(["--preset", "fashion-20"]).data_path == "demo/data/train"
    latents = parse_args(["--preset", "fashion-20", "--latents", "x"])
    assert latents.data_path is None and latents.latents == "x"
    shown = subprocess.run([sys.executable, ROOT / "train_router.py", "--help"], capture_output=True, text=True).stdout
    assert all(re.search(rf"^  {name} .*\n {{14}}\S", shown, re.M) for name in PRESETS)
