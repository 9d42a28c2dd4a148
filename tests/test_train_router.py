"""train_router.py as a user types it, one process and two."""

import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_refused, call, random_dit, run
from PIL import Image

from router import Router
from train_router import center_crop


@pytest.fixture
def train(model_folder, image_folder, tmp_path):
    """Trains a router of six steps on the small model, in an empty folder."""

    def start(*flags, processes=None):
        common = ["--ckpt", model_folder, "--data-path", image_folder, "--num-sampling-steps", 6, "--num-workers", 0]
        common += ["--global-batch-size", 4, "--device", "cpu", "--lr", 0.05, "--log-every", 2]
        return run("train_router.py", *common, *flags, cwd=tmp_path, processes=processes, WANDB_SILENT="true")

    return start


def initial(seed=0):
    torch.manual_seed(seed)
    return Router(6, 3)


def adam_steps(saved):
    """{row: how many updates AdamW counted for it}."""
    return {row: int(state["step"]) for row, state in saved["opt"]["state"].items()}


def test_one_process_trains_checkpoints_and_numbers_its_runs(train, model_folder, tmp_path):
    result = train("--max-steps", 5, "--ckpt-every", 2)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "results" / "000-tiny" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["0000002.pt", "0000004.pt", "0000005.pt"]
    assert re.search(
        r"^update 4 epoch 0: loss \S+ mse \S+ l1 \S+ scores above 0.1: \d+/18 \S+ images/s$", result.stdout, re.M
    )

    saved = torch.load(folder / "0000005.pt", weights_only=True)
    counts = adam_steps(saved)
    assert sum(counts.values()) == 5
    assert set(counts) <= set(Router.trained_steps(6))
    for i, row in enumerate(initial().routers):
        moved = not torch.equal(saved["routers"][f"{i}.prob"], row.prob.detach())
        assert moved == (i in counts)
    assert saved["args"]["lr"] == 0.05
    assert Router.load(folder / "0000005.pt").schedule(0.1).steps == 6

    assert train("--max-steps", 1).returncode == 0
    assert (tmp_path / "results" / "001-tiny").is_dir()
    sampled = run(
        "sample.py",
        "--ckpt",
        model_folder,
        "--num-sampling-steps",
        6,
        "--accelerate-method",
        "dynamiclayer",
        "--path",
        folder / "0000005.pt",
        "--repeats",
        1,
        "--out",
        "x.png",
        cwd=tmp_path,
    )
    assert sampled.returncode == 0, sampled.stderr


def test_a_run_continues_from_its_checkpoint(train, tmp_path):
    assert train("--max-steps", 3).returncode == 0
    first = tmp_path / "results" / "000-tiny" / "checkpoints" / "0000003.pt"
    assert_refused(train("--max-steps", 3, "--resume", first), "has 3 updates already", "--max-steps")
    result = train("--max-steps", 5, "--resume", first)
    assert result.returncode == 0, result.stderr
    before, after = (
        torch.load(path, weights_only=True)
        for path in (first, tmp_path / "results" / "001-tiny" / "checkpoints" / "0000005.pt")
    )
    assert sum(adam_steps(before).values()) == 3 and sum(adam_steps(after).values()) == 5
    for i in range(6):
        moved = not torch.equal(before["routers"][f"{i}.prob"], after["routers"][f"{i}.prob"])
        assert moved == (adam_steps(before).get(i) != adam_steps(after).get(i))
    Router(6, 3).save(tmp_path / "bare.pt")
    assert_refused(train("--resume", tmp_path / "bare.pt"), "cannot be continued")


@pytest.mark.parametrize("number, workers", [(signal.SIGINT, 1), (signal.SIGTERM, 0)])
def test_a_run_that_is_stopped_saves_first_and_says_how_to_go_on(number, workers, model_folder, image_folder, tmp_path):
    command = [sys.executable, ROOT / "train_router.py", "--ckpt", model_folder, "--data-path", image_folder]
    command += ["--global-batch-size", 4, "--num-workers", workers, "--device", "cpu", "--log-every", 1]
    with subprocess.Popen(
        list(map(str, command)),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        while not process.stdout.readline().startswith("update 3 "):
            assert process.poll() is None
        os.killpg(process.pid, number)  # as a terminal does: its data loading processes get it too
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    path = re.search(r"continue with --resume (\S+)$", out, re.M)[1]
    assert torch.load(tmp_path / path, weights_only=True)["step"] >= 3


def test_two_processes_draw_steps_of_their_own_and_keep_one_router(train, tmp_path):
    result = train("--max-steps", 8, processes=2)
    assert result.returncode == 0, result.stderr
    saved = torch.load(tmp_path / "results" / "000-tiny" / "checkpoints" / "0000008.pt", weights_only=True)
    counts = adam_steps(saved)
    # One draw for both processes would make eight; two draws coincide in a third of the updates.
    assert 8 < sum(counts.values()) <= 16
    for i, row in enumerate(initial().routers):
        moved = not torch.equal(saved["routers"][f"{i}.prob"], row.prob.detach())
        assert moved == (i in counts)


GRADIENTS = """
import sys
sys.path[:0] = sys.argv[1:3]
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from conftest import random_dit
from diffusion import create_diffusion
from router import Router, router_loss
from test_train_router import gradient_inputs
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
router = Router(6, 3)
scores_of = DistributedDataParallel(router, find_unused_parameters=True)
for draws in ((1, 3), (5, 5)):
    router.zero_grad(set_to_none=True)
    i = draws[rank]
    scores = scores_of(i - 1)
    (router_loss(random_dit(), create_diffusion(6), scores, i, *gradient_inputs(rank)).mean() + scores.sum()).backward()
    if rank == 0:
        torch.save([row.prob.grad for row in router.routers], f"{sys.argv[3]}/{draws[0]}{draws[1]}.pt")
"""


def gradient_inputs(rank):
    torch.manual_seed(rank)
    return torch.randn(2, 4, 4, 4), torch.tensor([1, 5]), torch.randn(2, 4, 4, 4)


def test_gradients_are_averaged_over_the_processes_and_absent_for_rows_that_nobody_drew(tmp_path):
    from diffusion import create_diffusion
    from router import router_loss

    (tmp_path / "gradients.py").write_text(GRADIENTS)
    result = run(tmp_path / "gradients.py", ROOT, ROOT / "tests", tmp_path, cwd=tmp_path, processes=2)
    assert result.returncode == 0, result.stderr

    def alone(rank, i):
        router = initial()
        scores = router(i - 1)
        loss = router_loss(random_dit(), create_diffusion(6), scores, i, *gradient_inputs(rank)).mean() + scores.sum()
        loss.backward()
        return router.routers[i - 1].prob.grad

    apart, both = (torch.load(tmp_path / f"{name}.pt") for name in ("13", "55"))
    torch.testing.assert_close(apart[0], alone(0, 1) / 2)
    torch.testing.assert_close(apart[2], alone(1, 3) / 2)
    torch.testing.assert_close(both[4], (alone(0, 5) + alone(1, 5)) / 2)
    assert [g is None for g in apart] == [False, True, False, True, True, True]
    assert [g is None for g in both] == [True, True, True, True, False, True]


def test_a_larger_l1_weight_caches_more(train, tmp_path):
    counts = []
    for run_number, l1 in enumerate((0, 10)):
        assert train("--max-steps", 60, "--l1", l1, "--lr", 0.2).returncode == 0
        path = tmp_path / "results" / f"{run_number:03d}-tiny" / "checkpoints" / "0000060.pt"
        counts.append(int(Router.load(path).schedule(0.1).compute.sum()))
    assert counts[1] < counts[0]


def test_epochs_end_the_training_and_straight_through_and_wandb_work(train, tmp_path):
    result = train("--epochs", 2, "--ste-threshold", 0.1, "--wandb")
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "results" / "000-tiny"
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["0000008.pt"]  # 16 images in batches of 4, twice
    assert list(folder.glob("wandb/offline-run-*"))


def test_the_middle_square_is_cut_and_scaled():
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 30:70] = 200  # exactly the middle square
    image[:, :30], image[:, 70:] = 50, 90
    square = np.asarray(center_crop(Image.fromarray(image), 10))
    assert square.shape == (10, 10, 3)
    assert (square[:, 1:-1] == 200).all()
    same = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    assert np.array_equal(center_crop(same, 8), same)
    assert center_crop(Image.new("L", (9, 31)), 8).size == (8, 8)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--data-path", "no/such"], ["no such folder: no/such"]),
        (["--data-path", "."], ["has no images"]),
        (["--resume", "no.pt"], ["no.pt"]),
        (["--global-batch-size", 17], ["16 images", "--global-batch-size 17"]),
        (["--num-sampling-steps", 1], ["2 to 1000"]),
        (["--num-sampling-steps", 1001], ["1001"]),
        (["--ste-threshold", 2], ["not a number in [0, 1]"]),
        (["--max-steps", 0], ["0"]),
        (["--lr", -1], ["-1 is not a finite number of at least 0"]),
        (["--l1", "abc"], ["abc is not a finite number"]),
        (["--num-workers", -1], ["-1"]),
        (["--ckpt", "no.pt", "--num-classes", 5], ["no.pt"]),
        (["--results-dir", "/proc/results"], ["/proc/results", "--results-dir"]),
        (["--l2", 1], ["--l2"]),
    ],
)
def test_bad_input_is_refused_in_one_line(flags, words, model_folder, image_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    common = [
        "--ckpt",
        model_folder,
        "--data-path",
        image_folder,
        "--device",
        "cpu",
        "--max-steps",
        1,
        "--num-workers",
        0,
    ]
    common += ["--global-batch-size", 4]
    assert_refused(call("train_router.py", *common, *flags, capfd=capfd), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_pictures_and_other_classes_are_refused(workers, model_folder, image_folder, tmp_path, capfd):
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    broken = folder / "class1" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    common = ["--ckpt", model_folder, "--data-path", folder, "--device", "cpu", "--max-steps", 9]
    common += ["--global-batch-size", 16, "--num-workers", workers, "--results-dir", tmp_path / "results"]
    result = call("train_router.py", *common, capfd=capfd)
    assert result.returncode == 1 and f"error: {broken} is no whole picture" in result.stderr.splitlines()[-1]
    shutil.rmtree(folder / "class4")
    assert_refused(call("train_router.py", *common, capfd=capfd), "has 4 classes, the model 5")


def test_a_batch_that_does_not_divide_among_the_processes_is_refused(train):
    result = train("--global-batch-size", 5, "--max-steps", 1, processes=2)
    assert result.returncode != 0
    assert "--global-batch-size 5 does not divide among 2 processes: pass 4" in result.stderr
