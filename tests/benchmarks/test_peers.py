"""Ours beside the peers: what is counted, what is made again, and the tables. The peers themselves are stand-ins."""

import json
import re
import shutil
import sys
from functools import partial
from importlib.metadata import PackageNotFoundError
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ROOT, call
from PIL import Image

from benchmarks import peer_setups, peers, table
from benchmarks.peers import Row
from diffusion import create_diffusion
from runtime.errors import UserError
from sampling import sample_latents
from schedule import Schedule

STEPS = 4


@pytest.fixture
def bench(exportable_folder, monkeypatch):
    """A Bench of a tiny model, which runs four steps on three images."""
    shutil.copy(exportable_folder / "router4.pt", exportable_folder / "DDIM4_router.pt")
    monkeypatch.setattr(table, "MODEL", str(exportable_folder))
    monkeypatch.setattr(table, "THRESHOLD", 0.5)  # of a router that was not trained
    monkeypatch.setattr(peers, "COMPARED", 3)
    return peers.Bench()


def test_plain_diffusers_and_plain_ours_are_the_same_run(bench):
    noise, diffusion = bench.noise(0, 3), create_diffusion("ddim4")
    expected = sample_latents(bench.dit, diffusion, noise.z, noise.y, 2.0)
    for row in (Row("ours", "our_sampler", STEPS), Row("diffusers", "plain", STEPS)):
        figures = bench.figures(row)
        assert figures["skipped"] == 0 and figures["ran"] == ["11 11 11"] * 4
        assert figures["psnr_db"] is None or figures["psnr_db"] > peers.PARITY_DB
        assert torch.allclose(bench.count(row)[0], expected, atol=1e-4)
    assert bench.figures(Row("ours", "our_sampler", STEPS, guidance=(1.0, 0, 1)))["error"] > 1e-4


def test_a_row_may_scale_the_predicted_noise(bench):
    rows = [Row("x", setup, STEPS, noise=(0.9, 0.6)) for setup in ("plain", "our_sampler")]
    theirs, ours = (bench.count(row)[0] for row in rows)
    assert torch.allclose(theirs, ours, atol=1e-4) and (ours - bench.full(STEPS)).abs().max() > 0.01


@pytest.mark.parametrize("highest, late", [(1000, 3), (500, 3), (499, 2)])
def test_late_noise_is_what_a_row_removes_of_what_the_full_model_does(bench, highest, late, monkeypatch):
    """A peer that predicts 0.9 of the noise up to a timestep. Of 750, 500, 250 and 0 the last three are late.

    So x falls from the sigma of 500 to 0, through those of 250 and 0; from the higher of the scaled ones at 0.9.
    """

    def less_noise(pipe, steps):
        def scale(model, args, kwargs, output):
            if kwargs["timestep"][0] <= highest:
                output.sample *= 0.9

        pipe.transformer.register_forward_hook(scale, with_kwargs=True)

    monkeypatch.setattr(peer_setups, "less_noise", less_noise, raising=False)
    signal = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    sigma = dict(zip((3, 2), np.sqrt(1 / signal[[500, 250]] - 1)))
    expected = 1 - 0.1 * sigma[late] / sigma[3]
    assert bench.late_noise(Row("x", "less_noise", STEPS)) == pytest.approx(expected)
    assert bench.late_noise(Row("x", "plain", STEPS)) == pytest.approx(1)


@pytest.mark.parametrize("setup", ["our_sampler", "ours"])
def test_the_counted_layers_are_those_of_the_plan(bench, setup):
    for plan, order in (("fora2", 0), ("router-f2", 2)):
        row = Row("x", setup, STEPS, plan=plan)
        schedule = bench.plan(row)
        latents, ran = bench.count(row)
        assert torch.equal(ran, schedule.compute.flip(0)) and schedule.order == order and not ran.all()
        noise = bench.noise(0, 3)
        ours = sample_latents(bench.dit, create_diffusion("ddim4"), noise.z, noise.y, 2.0, schedule)
        assert torch.allclose(latents, ours, atol=1e-4)


def test_caches_of_diffusers_skip_layers_at_each_call(bench):
    """A threshold that everything is below: the first block runs at each step, the others at the first alone."""
    later = {
        ("first_block_cache", 1e9): ["11 00 00"] * 3,
        ("magcache", 1e9): ["00 00 00"] * 3,
    }
    for (setup, threshold), expected in later.items():
        model, sample = bench.sampler(Row("x", setup, STEPS, {"threshold": threshold}))
        for _ in range(2):
            latents, ran = peer_setups.count_layers(model, partial(sample, bench.noise(0, 3)), STEPS, 3)
            rows = [" ".join(f"{a:d}{m:d}" for a, m in step) for step in ran.tolist()]
            assert rows == ["11 11 11", *expected] and latents.isfinite().all()
    figures = bench.figures(Row("x", "taylorseer", STEPS, {"interval": 9, "order": 1}))
    assert figures["ran"] == ["11 11 11"] * 2 + ["00 00 00", "11 11 11"] and figures["error"] > 0


def test_a_row_that_calibrates_is_the_same_each_time(bench, monkeypatch):
    drawn = []

    def calibrating(pipe, steps):
        drawn.append(torch.randn(4).tolist())

    monkeypatch.setattr(peer_setups, "plain", calibrating)
    for _ in range(2):
        bench.sampler(Row("x", "plain", STEPS))
    assert drawn[0] == drawn[1]


def test_dbcache_gets_its_settings(bench, monkeypatch):
    made: list = []
    fake = ModuleType("cache_dit")
    fake.DBCacheConfig = fake.TaylorSeerCalibratorConfig = lambda **settings: settings
    fake.enable_cache = lambda pipe, cache_config, calibrator_config: made.append(
        (pipe, cache_config, calibrator_config)
    )
    monkeypatch.setitem(sys.modules, "cache_dit", fake)
    bench.sampler(Row("x", "dbcache", STEPS, {"threshold": 0.15}))
    bench.sampler(Row("x", "dbcache", STEPS, {"threshold": 0.25, "in_a_row": 2, "order": 1}))
    (first, plain, none), (second, limited, taylor) = made
    assert (plain["residual_diff_threshold"], plain["num_inference_steps"], none) == (0.15, STEPS, None)
    assert limited["max_continuous_cached_steps"] == 2 and taylor == {"taylorseer_order": 1}
    # cache-dit changes the class of a pipeline, and knows DiT by the first letters of its name.
    assert type(first) is not type(second) and type(first).__name__.startswith("DiT")


def test_smoothcache_gets_the_plan_and_is_reset_before_each_call(bench, monkeypatch, capsys):
    class Helper:
        def __init__(self, model, block, layers, schedule):
            made.append((block.__name__, layers, schedule))

        def enable(self):
            made.append("enable")

        def reset_state(self):
            made.append("reset")

    made, fake = [], ModuleType("SmoothCache.smooth_cache_helper")
    fake.SmoothCacheHelper = Helper
    monkeypatch.setitem(sys.modules, "SmoothCache", ModuleType("SmoothCache"))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    compute = torch.ones(STEPS, 3, 2, dtype=torch.bool)
    compute[0, :, 1] = compute[2, :, 0] = False  # the MLP at the last step, attention at the second
    monkeypatch.setattr(table, "plan", lambda row, dit: Schedule(compute))
    _, sample = bench.sampler(Row("x", "smoothcache", STEPS, plan="smoothcache-0.2"))
    for _ in range(2):
        sample(bench.noise(0, 1))
    schedule = {"attn1": [1, 0, 1, 1], "ff": [1, 1, 1, 0]}
    assert made == [("BasicTransformerBlock", ["attn1", "ff"], schedule), "enable", "reset", "reset"]


def test_hicache_forecasts_what_it_decides_to(bench, monkeypatch):
    fake, decisions = ModuleType("hicache_pp"), ["full", "full", "forecast", "full"]
    fake.hicache_init = lambda **settings: {"step": 0, **settings}
    fake.hicache_reset = lambda state: state.update(step=0)
    fake.hicache_decide = lambda state: decisions[state["step"]]
    fake.hicache_update_derivatives = lambda state, output: state.update(last=output)
    fake.hicache_forecast = lambda state: state["last"]
    monkeypatch.setitem(sys.modules, "hicache_pp", fake)
    model, sample = bench.sampler(Row("x", "hicache", STEPS, {"interval": 3}))
    for _ in range(2):
        _, ran = peer_setups.count_layers(model, partial(sample, bench.noise(0, 2)), STEPS, 3)
        assert ran.all(2).all(1).tolist() == [True, True, False, True]


def test_what_a_user_writes_is_counted_in_statements():
    def setup(pipe):
        """A docstring.

        Of three lines.
        """
        # A comment.
        import json

        def inner():
            return dict(
                a=1,
                b=2,
            )

        return inner, json

    assert peer_setups.statements_of_user(setup) == 4
    assert peer_setups.statements_of_user(peer_setups.plain) == 0
    assert peer_setups.statements_of_user(peer_setups.ours) == 2


@pytest.fixture
def stubbed(bench, tmp_path, monkeypatch):
    """The program with three rows, whose images are neither made nor judged: (function to call it, rows made)."""
    rows = (
        Row("diffusers", "plain", STEPS),
        Row("dbcache", "dbcache", STEPS, {"threshold": 0.1}),
        Row("ours-fora2", "our_sampler", STEPS, plan="fora2"),
    )
    made = []

    def figures(self, row):
        made.append(row.name)
        return {"statements": 3, "skipped": 0.5, "ran": [], "error": 0.25, "psnr_db": None, "variance": 1.0}

    def judge(npz):
        metrics = {"inception_score": 5.0, "fid": 4.0 + len(made), "sfid": 2.0, "precision": 0.5, "recall": 0.25}
        return {"images": 7, "metrics": metrics, "class_accuracy": 0.75}

    def version(package):
        if package in peers.PACKAGES.values():
            raise PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(peers, "ROWS", rows)
    monkeypatch.setattr(peers, "FOLDER", str(tmp_path / "samples"))
    monkeypatch.setattr(peers, "REPEATS", 1)
    monkeypatch.setattr(peers.Bench, "figures", figures)
    monkeypatch.setattr(peers.Bench, "save_images", lambda *_: None)
    monkeypatch.setattr(table, "judge", judge)
    monkeypatch.setattr("importlib.metadata.version", version)
    monkeypatch.setattr("benchmarks.peers.Bench.__init__", lambda self: self.__dict__.update(bench.__dict__))
    return made


def program(*flags, capfd):
    result = call("benchmarks/peers.py", "--samples", 7, *flags, capfd=capfd)
    assert result.returncode == 0, result.stderr
    return result


def test_images_of_a_row_are_continued_but_not_those_of_other_settings(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "AT_ONCE", 2)
    monkeypatch.setattr(peers, "SAVED", 4)
    row, path, made_by = Row("x", "our_sampler", STEPS), tmp_path / "new" / "x.npz", {"plan": ""}
    sampled, noise = [], bench.noise

    def draw(first, count):
        if len(sampled) == 3:  # the fourth batch
            sampled.clear()
            raise KeyboardInterrupt
        sampled.append(first)
        return noise(first, count)

    def read():
        with np.load(path) as file:
            return file["arr_0"], file["labels"]

    monkeypatch.setattr(bench, "noise", draw)
    with pytest.raises(KeyboardInterrupt):
        bench.save_images(row, 9, path, made_by)
    assert len(read()[0]) == 4
    bench.save_images(row, 9, path, made_by)
    assert sampled == [4, 6, 8]
    images, labels = read()
    assert labels.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3] and images.shape == (9, 8, 8, 3)
    monkeypatch.setattr(bench, "noise", noise)
    monkeypatch.setattr(peers, "AT_ONCE", 9)
    bench.save_images(row, 9, path, made_by | {"plan": "fora2"})
    assert np.abs(images.astype(int) - read()[0]).max() <= 1  # batches of another size may round differently
    sampled.clear()
    monkeypatch.setattr(bench, "noise", draw)
    bench.save_images(row, 9, path, {"plan": "fora2"})
    assert sampled == []


def test_late_noise_is_measured_once_for_each_row_in_the_pipeline(stubbed, tmp_path, monkeypatch, capfd):
    scaled = Row("scaled", "ours", STEPS, noise=(0.9, 1))
    monkeypatch.setattr(peers, "ROWS", (*peers.ROWS, Row("piped", "ours", STEPS), scaled))
    monkeypatch.setattr(peers.Bench, "late_noise", lambda self, row: stubbed.append(f"noise {row.name}") or 0.75)
    assert "| 4 | ours, in the pipeline | 0.750 | " in program("--quality", capfd=capfd).stdout
    program("--quality", capfd=capfd)
    program("--rows", "piped-4", capfd=capfd)
    assert stubbed.count("noise piped-4") == 1 and len(stubbed) == 5


def test_only_what_is_missing_or_outdated_is_made(stubbed, tmp_path, monkeypatch, capfd):
    results = tmp_path / "samples-7" / "results"
    first = program("--rows", "ours-fora2-4", capfd=capfd)
    assert stubbed == ["ours-fora2-4"] and not (results / "timing.json").exists()
    assert "Missing: diffusers-4, dbcache-4; untimed: ours-fora2-4" in first.stdout
    # A peer that is not installed is named once and its row is left out.
    second = program(capfd=capfd)
    (line,) = [line for line in second.stderr.splitlines() if "Not installed" in line]
    assert "cache-dit, dit-smoothcache, hicache-pp (pip install -r requirements-peers.txt)" in line
    assert stubbed == ["ours-fora2-4", "diffusers-4"]
    timing = json.loads((results / "timing.json").read_text())
    assert set(timing["rows"]) == {"diffusers-4", "ours-fora2-4"} and timing["rows"]["diffusers-4"]["ratio"] == 1
    assert timing["threads"] == torch.get_num_threads() and "Missing: dbcache-4; untimed: none" in second.stdout
    assert re.search(
        r"^\| ours, fora2 \| 3 \| 50.0% \| [\d.]+ \| [\d.]+ \| 2.5e-01 \| equal \| 5.000 ", second.stdout, re.M
    )
    assert Image.open(tmp_path / "samples-7" / "peers.png").format == "PNG"
    program(capfd=capfd)
    assert len(stubbed) == 2
    # Other settings: the row is outdated. Times alone make no row.
    rows = (*peers.ROWS[:2], Row("ours-fora2", "our_sampler", STEPS, plan="fora3"))
    monkeypatch.setattr(peers, "ROWS", rows)
    program("--timing", capfd=capfd)
    assert len(stubbed) == 2
    program("--timing", "--rows", "diffusers-4", capfd=capfd)
    later = json.loads((results / "timing.json").read_text())["rows"]
    assert set(later) == {"diffusers-4", "ours-fora2-4"} and later["diffusers-4"]["ratio"] == 1
    program("--quality", capfd=capfd)
    assert stubbed[2:] == ["ours-fora2-4"]


def test_rows_that_are_the_same_by_two_ways_share_their_metrics(bench, monkeypatch):
    rows = [Row("x", "our_sampler", STEPS, plan="fora2"), Row("y", "ours", STEPS, plan="fora2", same="x")]
    monkeypatch.setattr(peers, "ROWS", rows)
    assert bench.figures(rows[1])["skipped"] == pytest.approx(0.5)
    with pytest.raises(UserError, match=r"z-4 and x-4 agree to \d+.\d dB, 90 are expected"):
        bench.figures(Row("z", "ours", STEPS, plan="fora3", same="x"))


def test_metrics_of_the_other_row_are_taken_from_its_record(stubbed, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(peers, "ROWS", (*peers.ROWS, Row("ours", "our_sampler", STEPS, same="diffusers")))
    alone = call("benchmarks/peers.py", "--samples", 7, "--rows", "ours-4", capfd=capfd)
    assert alone.returncode == 1 and "diffusers-4 has no record yet: add it to --rows" in alone.stderr
    program("--quality", capfd=capfd)
    records = [
        json.loads((tmp_path / "samples-7" / "results" / f"{row}-4.json").read_text())
        for row in ("diffusers", "ours-fora2", "ours")
    ]
    assert records[0]["quality"] == records[2]["quality"] != records[1]["quality"]


def test_a_row_of_no_name_is_refused(capfd):
    result = call("benchmarks/peers.py", "--rows", "dbcache-20", capfd=capfd)
    assert result.returncode == 2 and "'dbcache-20' is none of diffusers-20, " in result.stderr


def record(fid):
    metrics = {"fid": fid, "sfid": 1, "inception_score": 1, "precision": 1, "recall": 1}
    quality = {"metrics": metrics, "class_accuracy": 1}
    return {"statements": 1, "skipped": 0, "error": 0.5, "psnr_db": 40.0, "quality": quality}


def test_the_best_at_equal_time_is_the_lowest_fid_that_is_fast_enough():
    rows = {
        Row("diffusers", "plain", 20): (1.0, 1.0),
        Row("a", "dbcache", 20): (0.60, 1.4),
        Row("b", "hicache", 20): (0.45, 1.5),
        Row("ours-x", "our_sampler", 20): (0.61, 0.5),
        Row("ours-y", "ours", 20): (0.35, 1.3),
        Row("ours-z", "our_sampler", 50): (0.1, 0.1),
        Row("untimed", "our_sampler", 20): (None, 0.1),
        Row("scaled", "our_sampler", 20, noise=(0.9, 1)): (0.45, 0.2),
        Row("their-scaled", "dbcache", 20, noise=(0.9, 1)): (0.2, 0.1),
        Row("guided", "our_sampler", 20, guidance=(3.0, 0, 1)): (0.2, 0.1),
    }
    timing = {"rows": {row.name: {"seconds": [t], "ratio": t} for row, (t, _) in rows.items() if t}}
    records = {row: record(fid) for row, (_, fid) in rows.items()}
    found = [(r["steps"], r["at most"], r["whose"], r["FID"]) for r in peers.at_equal_time(records, timing)]
    peer_scaled, scaled = ("peer, noise scaled", "0.100"), ("ours, noise scaled", "0.200")
    of_20 = [(20, 0.6, "peer", "1.400"), (20, 0.6, "ours", "1.300"), (20, 0.6, *peer_scaled), (20, 0.6, *scaled)]
    of_20 += [(20, 0.5, "peer", "1.500"), (20, 0.5, "ours", "1.300"), (20, 0.5, *peer_scaled), (20, 0.5, *scaled)]
    of_20 += [(20, 0.4, "ours", "1.300"), (20, 0.4, *peer_scaled), (20, 0.3, *peer_scaled)]
    assert found == of_20 + [(50, target, "ours", "0.100") for target in (0.6, 0.5, 0.4, 0.3)]


def test_the_rank_correlation_of_late_noise_and_fid():
    rows = [Row(name, "dbcache", 20) for name in "abc"] + [Row(name, "dbcache", 50) for name in "ab"]
    records = {row: record(fid) for row, fid in zip(rows, (1.0, 3.0, 2.0, 1.0, 2.0))}
    noise = {"rows": {row.name: value for row, value in zip(rows, (0.9, 1.0, 1.1, 0.9, 1.0))}}
    # Ranks 0, 1, 2 and 0, 2, 1: 1 - 6 (0 + 1 + 1) / (3 (9 - 1)).
    assert peers.rank_correlations(records, noise) == {20: pytest.approx(0.5)}


def test_the_requirements_name_each_peer_with_its_version():
    text = (ROOT / "requirements-peers.txt").read_text()
    assert all(re.search(rf"^{package}==[\d.]+", text, re.M) for package in peers.PACKAGES.values())
    assert {row.setup for row in peers.ROWS} <= vars(peer_setups).keys() & peers.TITLES.keys()
    assert len({row.name for row in peers.ROWS}) == len(peers.ROWS)


def test_the_page_shows_the_tables_of_the_committed_records():
    results, page = peers.parse_args([]).results, (ROOT / "docs" / "peers.md").read_text()
    records = {row: table.read(results / f"{row.name}.json") for row in peers.ROWS}
    records = {row: record for row, record in records.items() if record}
    tables = peers.tables(records, table.read(results / "timing.json"), table.read(results / "noise.json"))
    assert set(tables) == {"20 steps", "50 steps", "The best at equal time", "Late noise and FID"}
    for title, text in tables.items():
        assert f"### {title}\n" in page and f"\n{text}\n" in page
