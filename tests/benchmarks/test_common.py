"""What the benchmarks share, the tables of the committed records, and sampling beside busy loops."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, assert_refused, call

from benchmarks import busy, common, records
from runtime.errors import UserError
from runtime.files import check_writable

SHOWN = ["train_step", "assembly", "scaling", "extraction", "metrics_speed", "tutorial", "busy"]
DOCUMENTS = [ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")]


def test_a_function_runs_in_another_process_and_its_errors_come_back(tmp_path, capfd):
    # Functions that the other process has without importing this file.
    assert common.run_alone(os.getpid) != os.getpid()
    (tmp_path / "file").touch()
    for error, words, *command in (
        (UserError, "killed.*memory", signal.raise_signal, signal.SIGKILL),
        (UserError, "cannot write.*file", check_writable, tmp_path / "file" / "below"),
        (ValueError, "invalid literal", int, "x"),
    ):
        with pytest.raises(error, match=words):
            common.run_alone(*command)
    assert capfd.readouterr().err == ""


def test_a_command_that_fails_is_named_and_its_output_shown(capfd):
    with pytest.raises(UserError, match="exit code 3.*sys.exit"):
        common.run_command(sys.executable, "-c", "import sys; print('seen'); sys.exit(3)")
    assert capfd.readouterr().err == "seen\n"
    assert common.run_command(sys.executable, "-c", "import os; print(os.environ['A'])", A="b") == "b\n"


def test_functions_are_timed_in_turn_after_a_warm_up():
    calls = []
    seconds = common.time_in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2)
    assert calls == ["a", "b"] * 3 and [len(some) for some in seconds.values()] == [2, 2]
    assert common.median_ratio([1, 9, 4], [2, 3, 4]) == 1


# The documents show only parts of the tables of latency and precision; `busy` has no record yet.
@pytest.mark.parametrize("name", ["records", "latency", "precision", *SHOWN])
def test_the_tables_of_the_committed_records_are_those_of_the_documents(name, capfd):
    if name == "records":
        printed = records.table()
    else:
        result = call(f"benchmarks/{name}.py", "--table", capfd=capfd)
        assert result.returncode == 0 or "no record" in result.stderr
        printed = result.stdout
    tables = re.findall(r"(?:^\|.*\|$\n?)+", printed, re.M)
    shown = "".join(path.read_text() for path in DOCUMENTS)
    for table in tables:
        assert len({line.count(" | ") for line in table.splitlines()}) == 1
        assert name in ("latency", "precision") or table.strip() in shown
    assert tables or name == "busy"


@pytest.mark.parametrize("name", [*SHOWN, "latency", "precision", "table"])
def test_help_answers_without_torch(name):
    program = f"import sys, benchmarks.{name} as program\ntry: program.parse_args(['--help'])\n"
    program += "finally: print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.stdout.startswith("usage:") and result.stdout.endswith("False\n"), result.stderr


@pytest.mark.parametrize(
    "name, flags, words",
    [
        ("train_step", ["--record", "r.txt"], ".json"),
        ("table", ["--rows", "ddim-50,x"], "'x' is none of"),
        ("latency", ["--profile"], "--path"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(name, flags, words, capfd):
    assert_refused(call(f"benchmarks/{name}.py", *flags, capfd=capfd), words)


def test_sampling_is_timed_beside_busy_loops_for_each_spin_count(tmp_path, monkeypatch, capfd):
    runs, loops = [], []

    class Loop(subprocess.Popen):
        def __init__(self, command):
            super().__init__(command)
            loops.append(self)

    def sample(*command, GOMP_SPINCOUNT):
        running = sum(loop.poll() is None for loop in loops)
        runs.append((int(GOMP_SPINCOUNT), running))
        return f"...\nSampling time: {running + int(GOMP_SPINCOUNT) / 1e6:.3f}±0.000\n"

    monkeypatch.setattr(busy, "Popen", Loop)
    monkeypatch.setattr(common, "run_command", sample)
    result = call("benchmarks/busy.py", "--repeats", 2, "--record", tmp_path / "busy-x.json", capfd=capfd)
    assert result.returncode == 0, result.stderr
    assert runs == [(spin_count, count) for count in (0, 1, 2) for spin_count in (300000, 1000, 0)] * 2
    assert len(loops) == 18 and all(loop.poll() == -signal.SIGKILL for loop in loops)
    seconds = json.loads((tmp_path / "busy-x.json").read_text())["seconds"]
    assert seconds["300000"] == {"0": [0.3, 0.3], "1": [1.3, 1.3], "2": [2.3, 2.3]}
    assert "| 1,000 (ours) | 0.00 | 1.00 | 2.00 |" in result.stdout
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    assert call("benchmarks/busy.py", "--table", capfd=capfd).stdout.strip() in result.stdout
