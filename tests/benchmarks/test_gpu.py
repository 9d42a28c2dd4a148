"""gpu.sh and its checks: every step leaves a line and its log, whatever happens to the others."""

import json
import os
import subprocess
import tarfile

import pytest
import torch
from conftest import ROOT, assert_refused, call

from benchmarks import gpu_checks
from benchmarks.common import RESULTS
from router import Router
from schedule import Schedule

# Stands in for Python: it has no GPU, and the step "speed" fails.
PYTHON = """#!/bin/sh
case "$*" in -c*) exit 1;; *speed*) echo "no such unit"; exit 3;; esac
echo "ran $2"
"""


def run(tmp_path, **environment):
    """Run gpu.sh with the stand-in: the texts of its summary by the name of the step, and the folder."""
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(PYTHON)
    python.chmod(0o755)
    subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh", out],
        env=os.environ | {"PYTHON": str(python)} | environment,
        check=True,
        timeout=120,
    )
    lines = (out / "summary.txt").read_text().splitlines()
    return dict(line.split(": ", 1) for line in lines if ": " in line), out


def test_every_step_leaves_a_line_and_its_log(tmp_path):
    steps, out = run(tmp_path, BUDGET="95")
    assert sorted(path.name for path in out.iterdir()) == ["gpu.tgz", "summary.txt"]
    assert steps["plans"].startswith("ok, ") and steps["profile"].endswith("s: ran benchmarks.latency")
    assert steps["speed"].startswith("FAILED with code 3") and steps["speed"].endswith("no such unit")
    assert steps["latency-20"].startswith("SKIPPED, needs 130 s and ")
    assert steps["deterministic"].startswith("FAILED with code 1")  # the stand-in prints no hash
    with tarfile.open(out / "gpu.tgz") as archive:
        logs = {name.split("/")[1] for name in archive.getnames() if name.startswith("logs/")}
    assert logs == {f"{name}.log" for name, text in steps.items() if not text.startswith("SKIPPED")}


def test_some_steps_run_alone(tmp_path):
    steps, _ = run(tmp_path, ONLY="gelu fp8 vae")
    assert list(steps) == ["plans", "gelu", "fp8", "vae"]
    assert steps["gelu"] == "SKIPPED, needs a GPU" and steps["fp8"].endswith("ran benchmarks.latency")


def test_plans_as_fast_as_the_released_routers_take_their_place(tmp_path):
    gpu_checks.make_plans(tmp_path, 12)
    for steps in (20, 50):
        router, every3 = (Schedule.load(tmp_path / f"{name}{steps}.json") for name in ("router", "every3-"))
        assert router.steps == every3.steps == steps and router.depth == 12 and every3.order == 2
        assert router.cached_share() == pytest.approx(gpu_checks.REUSED[steps], abs=1 / (steps * 24))
        decided = (~router.compute).flatten(1).any(1).nonzero()[:, 0].tolist()
        assert decided == list(Router.trained_steps(steps))
    counts = json.loads((RESULTS / "xl2-ddim20-cpu.json").read_text())["layers_run_per_step"]
    assert gpu_checks.REUSED[20] == pytest.approx(1 - sum(counts) / (20 * 56), abs=1e-4)


def test_the_targets_are_judged_by_the_best_way_to_run(tmp_path, capfd):
    def row(schedule, mode, dtype, share, reference, full=1.0, bound=1.0):
        figures = {"share_of_matrix_product": share, "against_reference": reference}
        figures |= {"against_full": full, "bound_against_full": bound}
        return {"schedule": schedule, "mode": mode, "dtype": dtype, **figures}

    rows = [
        row("full", "reference", "tf32", 0.9, 1.0),
        row("full", "eager", "tf32", 0.7, 2.0),
        row("full", "graphs", "bf16", 0.59, 4.1),
        row("router20", "graphs", "bf16", 0.5, 3.9, 1.2, 1.25),
        row("every3-20", "graphs", "bf16", 0.4, 5.0, 2.5, 2.7),
    ]
    rows.append(row("full", "graphs+gelu", "bf16", 0.55, 4.0) | {"against_plain": 1.08})
    (tmp_path / "latency-x.json").write_text(json.dumps({"rows": rows}))
    gpu_checks.targets(tmp_path)
    assert capfd.readouterr().out.splitlines() == [
        "latency-x:",
        "  full: 0.590 share of the rate of plain products, bf16 (graphs, bf16), goal 0.6: MISSED",
        "  full: 4.100 times the reference (graphs, bf16), goal 4: met",
        "  full: 1.080 times as fast as without the switch (graphs+gelu)",
        "  router20: 3.900 times the reference (graphs, bf16), goal 4: MISSED",
        "  router20: 0.960 of its bound (graphs, bf16), goal 0.97: MISSED",
        "  every3-20: 5.000 times the reference (graphs, bf16), goal 4: met",
        "  every3-20: 0.926 of its bound (graphs, bf16), goal 0.9: met",
    ]


def test_a_check_that_fails_is_recorded_and_does_not_stop_the_others(tmp_path, monkeypatch, capfd):
    def fails(device):
        raise RuntimeError("no kernel")

    checks = {
        "vae": fails,
        "speed": lambda device: {"device": str(device)},
        "metrics": lambda device: {"faults": ["x"]},
    }
    monkeypatch.setattr(gpu_checks, "CHECKS", checks)
    record = tmp_path / "r.json"
    result = call("benchmarks/gpu_checks.py", *checks, "--device", "cpu", "--record", record, capfd=capfd)
    assert_refused(result, "vae, metrics failed")
    figures = json.loads(record.read_text())
    assert "RuntimeError: no kernel" in figures["vae"]["faults"] and figures["speed"]["device"] == "cpu"
    assert_refused(call("benchmarks/gpu_checks.py", "spede", capfd=capfd), "spede: no such check")


@pytest.mark.slow
def test_the_agreement_with_the_cpu_is_judged(monkeypatch):
    monkeypatch.setattr(gpu_checks, "TOLERANCES", {"fp32": 1e-4, "bf16": 1e-5, "bf16 gelu": 0, "bf16 fp8": 0.1})
    found = gpu_checks.agreement(torch.device("cpu"))
    assert [(row["dtype"], row["plan"]) for row in found["rows"]][:3] == [
        ("fp32", plan) for plan in ("full", "router", "learned")
    ]
    assert all(row["error"] == 0 and row["graphs_equal_eager"] for row in found["rows"][:3])
    assert found["faults"] == found["rows"][3:6]  # bf16 rounds more than this tolerance allows
    assert [row["dtype"] for row in found["rows"][6:]] == ["bf16 fp8"] * 3  # a CPU has no GELU in a product
    for bf16, fp8 in zip(found["rows"][3:6], found["rows"][6:]):
        assert bf16["error"] < fp8["error"]
