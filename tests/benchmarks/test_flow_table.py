"""The table of the flow model: what it makes again, its times, and what it prints."""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import SIZES, call, random_dit
from safetensors.torch import save_file

from benchmarks import common, flow, table
from schedule import Schedule


@pytest.fixture
def small(model_folder, tmp_path, monkeypatch):
    """A tiny flow model with a plan for four steps, and three rows."""
    folder = tmp_path / "flow"
    shutil.copytree(model_folder, folder)
    config = {"model": SIZES, "image_size": 8, "vae": "vae", "cfg_scale": 2.0, "process": "flow"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_dit(learn_sigma=False).state_dict(), folder / "dit.safetensors")
    Schedule(Schedule.every_nth(4, 3, 2).compute, process="flow-euler").save(folder / "Euler4_2x.json")
    rows = {"euler-4": ("euler", 4, None), "heun-4": ("heun", 4, None), "learned-2x-4": ("euler", 4, "2x")}
    for name, value in {"MODEL": str(folder), "ROWS": rows, "BATCH": 5, "REPEATS": 2}.items():
        monkeypatch.setattr(flow, name, value)
    monkeypatch.setattr(common, "ROOT", tmp_path)  # records of a trial lie below it
    return folder


def show(*flags, capfd):
    result = call("benchmarks/flow.py", "--samples", 12, "--processes", 1, *flags, capfd=capfd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_rows_are_made_once_for_each_model_and_printed_beside_the_dit(small, monkeypatch, capfd):
    made = []

    def sample(flags, seed, processes):
        made.append(" ".join(flags))
        return len(made)

    def judge(number):
        metrics = {"inception_score": 5.0, "fid": float(number), "sfid": 2.0, "precision": 0.5, "recall": 0.25}
        return {"images": 12, "metrics": metrics, "class_accuracy": 0.75}

    monkeypatch.setattr(table, "sample", sample)
    monkeypatch.setattr(table, "judge", judge)
    out = show("--rows", "euler-4", "learned-2x-4", capfd=capfd)
    assert [re.search(r"--sampler (\w+)", flags)[1] for flags in made] == ["euler", "euler"]
    assert made[1].endswith(f"--accelerate-method schedule --path {small}/Euler4_2x.json") and "--path" not in made[0]
    assert "| DiT, ddim-50 | 50 |  |  |  | 1.270 |" in out  # its committed record
    assert "| euler-4 | 4 |  |  |  | 1.000 | 5.000 | 75.00% |" in out and "heun" not in out
    show(capfd=capfd)
    assert len(made) == 3 and "heun" in made[2]
    save_file(random_dit(1, learn_sigma=False).state_dict(), small / "dit.safetensors")
    show(capfd=capfd)
    assert len(made) == 6


def test_times_are_beside_their_bounds(small, capfd):
    out = show("--timing", capfd=capfd)
    assert "euler-4" not in out  # no quality yet
    timing = json.loads((small.parent / "samples" / "flow-12" / "results" / "timing.json").read_text())
    rows = timing["rows"]
    assert list(rows) == list(flow.ROWS) and {len(row["seconds"]) for row in rows.values()} == {2}
    assert rows["euler-4"]["speedup"] == rows["euler-4"]["bound"] == 1.0 and 1 < rows["learned-2x-4"]["bound"] < 2
    assert rows["learned-2x-4"]["speedup"] == np.median(
        [a / b for a, b in zip(rows["euler-4"]["seconds"], rows["learned-2x-4"]["seconds"])]
    )


def test_the_shipped_rows_are_flags_that_the_program_takes():
    import sample_ddp

    for name in flow.ROWS:
        args = sample_ddp.parse_args(flow.flags_of(name, flow.parse_args([])))
        assert (args.sampler, args.num_fid_samples) == (flow.ROWS[name][0], 5000)
