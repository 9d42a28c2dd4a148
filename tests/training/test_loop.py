"""loop.py: Weights & Biases must neither stop a training nor lose it."""

import os
from pathlib import Path

import psutil
import pytest
import wandb
from conftest import assert_refused, call, start

from training import trainer

FLAGS = "--num-sampling-steps 6 --num-workers 0 --global-batch-size 4 --draws-per-step 2 --device cpu --log-every 1"


@pytest.fixture
def train(model_folder, image_folder, tmp_path, monkeypatch, capfd):
    """Trains with --wandb in an empty folder, with only the given WANDB_ variables; returns the result."""
    monkeypatch.chdir(tmp_path)
    flags = ["--ckpt", model_folder, "--data-path", image_folder, *FLAGS.split(), "--max-steps", 3, "--wandb"]

    def train(**variables):
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            monkeypatch.delenv(name)
        paths = {"HOME": tmp_path, "NETRC": tmp_path / "no", "WANDB_CONFIG_DIR": tmp_path, "WANDB_SILENT": "true"}
        for name, value in (paths | variables).items():
            monkeypatch.setenv(name, str(value))
        wandb.teardown()  # so that it reads the environment again
        try:
            return call("train_router.py", *flags, capfd=capfd)
        finally:
            wandb.teardown()

    return train


@pytest.mark.parametrize(
    "variables, words",
    [
        (dict(WANDB_MODE="bogus"), ["WANDB_MODE is 'bogus'", "online, offline or disabled"]),
        (dict(WANDB_MODE="Online "), ["WANDB_MODE is 'Online '", "online, offline or disabled"]),
        (dict(WANDB_MODE="false"), ["WANDB_MODE is 'false'"]),
        (dict(WANDB_BASE_URL="nonsense"), ["base_url", "--wandb"]),
        (dict(WANDB_RUN_ID="a/b"), ["Run ID", "--wandb"]),
        (dict(WANDB_PROJECT="a/b#c"), ["project name", "--wandb"]),
        (dict(WANDB_RESUME="perhaps"), ["resume", "--wandb"]),
        (dict(WANDB_INIT_TIMEOUT="soon"), ["init_timeout", "--wandb"]),
    ],
)
def test_a_wrong_variable_is_refused_in_one_line_before_anything_is_written(variables, words, train):
    assert_refused(train(**variables), "train_router.py: error: ", *words)
    assert not Path("results").exists()


@pytest.mark.parametrize("mode", ["", "dryrun", "offline"])
def test_without_an_account_the_run_is_offline(mode, train):
    result = train(WANDB_MODE=mode)
    assert result.returncode == 0 and result.stderr == ""
    (folder,) = Path("results/000-tiny/wandb").glob("offline-run-*")
    assert f"offline; send it with: wandb sync {folder}\n" in result.stdout


def test_a_disabled_run_writes_nothing(train):
    result = train(WANDB_MODE="disabled")
    assert result.returncode == 0 and "Weights & Biases" not in result.stdout + result.stderr
    assert not Path("results/000-tiny/wandb").exists()


def test_a_wrong_key_is_named_and_the_run_is_offline(model_folder, image_folder, tmp_path):
    """In a process of its own, since wandb keeps what it knows of an account."""
    flags = ["--ckpt", model_folder, "--data-path", image_folder, *FLAGS.split(), "--max-steps", 3, "--wandb"]
    places = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "no"), "WANDB_CONFIG_DIR": str(tmp_path)}
    with start("train_router.py", *flags, cwd=tmp_path, WANDB_API_KEY="abc", **places) as process:
        out, err = process.communicate(300)
    assert process.returncode == 0 and "API key must have 40+ characters, has 3.): logging offline" in out, err
    assert list(tmp_path.glob("results/000-tiny/wandb/offline-run-*"))


def test_a_training_goes_on_if_the_process_of_wandb_is_killed(train, monkeypatch):
    report = trainer.Trainer.report

    def kill_wandb(self):
        for child in psutil.Process().children(recursive=True):
            if "wandb" in child.name():
                child.kill()
                child.wait()
        return report(self)

    monkeypatch.setattr(trainer.Trainer, "report", kill_wandb)
    result = train()
    assert result.returncode == 0 and "router: results/000-tiny/checkpoints/0000003.pt" in result.stdout
    warnings = [line for line in result.stderr.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "goes on without it" in warnings[0] and "Traceback" not in result.stderr


@pytest.mark.parametrize("method", ["log", "finish"])
def test_a_training_goes_on_if_wandb_fails(method, train, monkeypatch):
    def fail(*_, **__):
        raise OSError("Network is unreachable\nmore")

    monkeypatch.setattr(wandb.Run, method, fail)
    result = train()
    assert result.returncode == 0 and "router: results/000-tiny/checkpoints/0000003.pt" in result.stdout
    assert result.stderr.count("Weights & Biases has failed (Network is unreachable)") == 1
