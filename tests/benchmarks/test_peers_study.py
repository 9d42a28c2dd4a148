"""What the study of DBCache compares, with a plan of ours in the place of DBCache and a tiny model."""

import pytest
import torch

from benchmarks import peer_setups, peers, peers_study, table
from benchmarks.peers import Row
from schedule import Schedule

STEPS = 4


@pytest.fixture
def study(exportable_folder, monkeypatch):
    """A Study of five samples by a tiny model; its "dbcache" is plain reuse at every second step."""
    monkeypatch.setattr(table, "MODEL", str(exportable_folder))
    monkeypatch.setattr(peers, "AT_ONCE", 3)
    monkeypatch.setattr(peers_study, "STEPS", STEPS)
    plan = Schedule.every_nth(STEPS, 3, 2)
    monkeypatch.setattr(peer_setups, "dbcache", lambda pipe, steps, **_: peer_setups.ours(pipe, steps, plan))
    return peers_study.Study(5)


def latents_of_row(study, **how):
    return study.sampler(Row("x", "plain", STEPS, **how))[1](study.noise(0, study.samples))


def test_a_run_changes_what_it_says(study):
    full = study.latents("full", STEPS)
    assert torch.allclose(full, latents_of_row(study), atol=1e-5)
    scaled = study.latents("full", STEPS, noise=lambda t: 0.9 if t <= 500 else 1.0)
    assert torch.allclose(scaled, latents_of_row(study, noise=(0.9, 0.5)), atol=1e-5)
    weak = study.latents("full", STEPS, guidance=lambda t: 0.75)
    assert torch.allclose(weak, latents_of_row(study, guidance=(1.5, 0, 1)), atol=1e-5)
    early = study.latents("full", STEPS, interval=(0.3, 1))
    assert torch.allclose(early, latents_of_row(study, guidance=(2.0, 0.3, 1)), atol=1e-5)
    for other in (scaled, weak, early):
        assert (other - full).abs().max() > 1e-3


def test_steps_are_compared_on_the_same_input(study):
    steps, ran = study.compare_steps()
    assert [step["timestep"] for step in steps] == [500, 0]  # of 750, 500, 250 and 0
    assert ran.flatten(1).all(1).tolist() == [True, False, True, False]
    for step in steps:
        assert 1e-4 < step["error"] < 1 and all(step[name] != 1 for name in ("guidance", "noise", "image"))
        # A ratio is a projection, so it differs from 1 by at most the relative error.
        assert abs(step["noise"] - 1) <= step["error"] + 1e-6


def test_all_runs_are_judged_and_shown(study, monkeypatch):
    metrics = dict.fromkeys(("fid", "sfid", "inception_score", "precision", "recall"), 0.5)
    monkeypatch.setattr(table, "judge", lambda npz: {"metrics": metrics, "class_accuracy": 0.25})
    monkeypatch.setattr(peers_study, "Study", lambda samples: study)
    record = peers_study.measure(peers_study.parse_args(["--samples", "5"]))
    runs = record["runs"]
    full, dbcache = runs["full"], runs["DBCache"]
    assert record["ran"] == [1, 0, 1, 0] and len(runs) == 22 and full["variance"] != dbcache["variance"]
    for name, run in runs.items():
        if "latents times" in name:  # the standard deviation of the other
            other = full if name.startswith("DBCache") else dbcache
            assert run["variance"] == pytest.approx(other["variance"], rel=1e-4)
    text = peers_study.tables([record])
    assert "| 500 |" in text and text.count("| 25.0% |") == 22
    restored, noisy = (
        runs[f"DBCache, {end}"]
        for end in ("latents with mean and std of the full run", "noise divided by these ratios")
    )
    assert len({run["variance"] for run in (dbcache, restored, noisy)}) == 3
