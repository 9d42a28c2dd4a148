"""The benchmark of the sampling loop: its reference computes what ours does, and its record holds every row."""

import json
import re

import pytest
import torch
from conftest import call, random_dit

import sampling
from benchmarks.original import original_latents
from diffusion import create_diffusion
from router import Router

PROGRAM = "benchmarks/latency.py"


@pytest.mark.parametrize("threshold", [None, 0.5, 1.0])
def test_the_original_samples_the_same_latents(threshold):
    dit, diffusion = random_dit(), create_diffusion(6)
    torch.manual_seed(1)
    schedule = None if threshold is None else Router(6, 3).schedule(threshold)
    z, y = torch.randn(3, 4, 4, 4), torch.tensor([0, 3, 3])
    ours = sampling.sample_latents(dit, diffusion, z, y, 2.0, schedule)
    theirs = original_latents(dit, diffusion, z, y, 2.0, schedule)
    assert (theirs - ours).abs().max() < 1e-5 * ours.abs().max()


def test_a_record_holds_every_row(model_folder, tmp_path, capfd):
    record = tmp_path / "latency-tiny.json"
    flags = ["--ckpt", model_folder, "--path", model_folder / "router4.pt", "--thres", 0.5, "--device", "cpu"]
    flags += ["--num-sampling-steps", 4, "--images", 2, "--repeats", 2, "--reference", "--modes", "eager"]
    result = call(PROGRAM, *flags, "--record", record, capfd=capfd)
    assert result.returncode == 0, result.stderr
    rows = {(row["schedule"], row["mode"], row["dtype"]): row for row in json.loads(record.read_text())["rows"]}
    kinds = ("eager", "fp32"), ("eager", "bf16"), ("reference", "fp32")
    assert rows.keys() == {(schedule, *kind) for schedule in ("full", "router") for kind in kinds}
    bound = Router.load(model_folder / "router4.pt").schedule(0.5).speedup_bound(random_dit().multiply_adds())
    for (schedule, mode, dtype), row in rows.items():
        cached, full = schedule == "router", rows["full", mode, dtype]
        assert len(row["seconds"]) == 2 and row["rate"] > 0 and row["first"] > 0
        assert row["bound_against_full"] == (bound if cached else 1)
        assert row["multiply_adds"] == pytest.approx(full["multiply_adds"] / row["bound_against_full"])
        # Four tokens of 24 numbers, two slots in each of three blocks, two images with guidance.
        assert row["cache_bytes"] == cached * 4 * 24 * 6 * 4 * (2 if dtype == "bf16" else 4)
        assert (row["against_reference"] == 1) == (mode == "reference") and (row["against_full"] == 1) != cached
        assert row["error"] == 0 if (mode, dtype) == ("eager", "fp32") else 0 < row["error"] < 0.1
    assert len([line for line in result.stdout.splitlines() if line.startswith("|")]) == 2 + len(rows)


@pytest.mark.parametrize("steps", [2, 4])
def test_a_profile_shares_the_time_of_a_full_and_a_cached_step(steps, model_folder, tmp_path, capfd):
    torch.manual_seed(0)
    Router(steps, 3).save(tmp_path / "r.pt")
    flags = ["--ckpt", model_folder, "--path", tmp_path / "r.pt", "--thres", 0.5, "--device", "cpu", "--profile"]
    result = call(PROGRAM, *flags, "--num-sampling-steps", steps, capfd=capfd)
    assert result.returncode == 0, result.stderr
    head, _, *rows = result.stdout.strip().splitlines()
    assert "a full step (6 layers run)" in head and re.search(r"a cached step \([0-5] run\)", head)
    shares = [[float(share) for share in re.findall(r"\((\d+)%\)", row)] for row in rows]
    for column in zip(*shares):
        assert sum(column) == pytest.approx(100, abs=4)
    assert shares[0][0] > 0  # matrix products of the full step
