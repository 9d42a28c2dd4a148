"""What the benchmarks share, the tables of the committed records, and sampling beside busy loops."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, assert_refused, call

from benchmarks import busy, common, records
from runtime.errors import UserError
from runtime.files import check_writable
from runtime.records import write_record

SHOWN = ["train_step", "assembly", "scaling", "extraction", "metrics_speed", "tutorial", "busy", "flow", "evaluators"]
SHOWN += ["startup", "peers_study"]
DOCUMENTS = [ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")]


def test_a_function_runs_in_another_process_and_its_errors_come_back(capfd):
    # Functions that the other process has without importing this file.
    assert common.run_alone(os.getpid) != os.getpid()
    with pytest.raises(UserError, match="killed.*memory"):
        common.run_alone(signal.raise_signal, signal.SIGKILL)
    with pytest.raises(UserError, match="cannot write.*LICENSE"):
        common.run_alone(check_writable, ROOT / "LICENSE" / "below")
    assert capfd.readouterr().err == ""


def test_a_command_that_fails_is_named_and_its_output_shown(capfd):
    with pytest.raises(UserError, match="exit code 3.*sys.exit"):
        common.run_command(sys.executable, "-c", "import sys; print('seen'); sys.exit(3)")
    assert capfd.readouterr().err == "seen\n"
    assert common.run_command(sys.executable, "-c", "import os; print(os.environ['A'])", A="b") == "b\n"


def test_a_record_made_without_git_takes_its_commit_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("COMMIT", raising=False)
    path = tmp_path / "record.json"
    for commit in (None, "1234567"):
        if commit:
            monkeypatch.setenv("COMMIT", commit)
        write_record(path, {}, torch.device("cpu"), {})
        assert json.loads(path.read_text())["commit"] == commit
    shown = json.loads((common.RESULTS / "fashion-ddim20-cpu.json").read_text()) | {"commit": None}
    assert records.cells(shown)["commit"] == "unknown"


# The documents show only parts of the tables of latency and precision.
@pytest.mark.parametrize("name", ["records", "latency", "precision", *SHOWN])
def test_the_tables_of_the_committed_records_are_those_of_the_documents(name, capfd):
    printed = records.table() if name == "records" else call(f"benchmarks/{name}.py", "--table", capfd=capfd).stdout
    tables = re.findall(r"(?:^\|.*\|$\n?)+", printed, re.M)
    shown = "".join(path.read_text() for path in DOCUMENTS)
    for table in tables:
        assert len({line.count(" | ") for line in table.splitlines()}) == 1
        assert name in ("latency", "precision") or table.strip() in shown
    assert tables


@pytest.mark.parametrize("name", [*SHOWN, "latency", "precision", "table"])
def test_help_answers_without_torch(name):
    program = f"import sys, benchmarks.{name} as program\ntry: program.parse_args(['--help'])\n"
    program += "finally: print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.stdout.startswith("usage:") and result.stdout.endswith("False\n"), result.stderr


def test_wrong_flags_are_refused_in_one_line(capfd):
    assert_refused(call("benchmarks/train_step.py", "--record", "r.txt", capfd=capfd), ".json")
    assert_refused(call("benchmarks/table.py", "--rows", "ddim-50,x", capfd=capfd), "'x' is none of")
    assert_refused(call("benchmarks/latency.py", "--profile", capfd=capfd), "--path")


def test_sampling_is_timed_beside_busy_loops_for_each_spin_count(tmp_path, monkeypatch, capfd):
    loops = []

    class Loop(subprocess.Popen):
        def __init__(self, command):
            super().__init__(command)
            loops.append(self)

    def sample(*command, GOMP_SPINCOUNT):
        running = sum(loop.poll() is None for loop in loops)
        return f"...\nSampling time: {running + int(GOMP_SPINCOUNT) / 1e6:.3f}±0.000\n"

    monkeypatch.setattr(busy, "Popen", Loop)
    monkeypatch.setattr(common, "run_command", sample)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    result = call("benchmarks/busy.py", "--repeats", 2, "--record", tmp_path / "busy-x.json", capfd=capfd)
    assert result.returncode == 0, result.stderr
    assert len(loops) == 18 and all(loop.poll() == -signal.SIGKILL for loop in loops)
    seconds = json.loads((tmp_path / "busy-x.json").read_text())["seconds"]
    assert seconds["300000"] == {"0": [0.3, 0.3], "1": [1.3, 1.3], "2": [2.3, 2.3]}
    assert "| 1,000 (ours) | 0.00 | 1.00 | 2.00 |" in call("benchmarks/busy.py", "--table", capfd=capfd).stdout
