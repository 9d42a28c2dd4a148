"""Policies by name: the schedules that they give, and what a manifest says of them."""

import hashlib
import inspect
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import random_dit

from pretrained.loading import load_dit
from pretrained.spec import model_spec
from router import Router
from runtime.cli import METHODS
from runtime.errors import UserError
from runtime.hashes import fingerprint
from schedule import Schedule
from training.policies import POLICIES, make_schedule, manifest_entries, schedule_of_flags


def flags(method=None, **settings):
    """The flags of a program with four steps, parsed."""
    defaults = dict(path=None, thres=0.1, interval=None, alpha=None, cached=None, forecast=None, num_sampling_steps=4)
    return SimpleNamespace(accelerate_method=method, **defaults | settings)


def test_every_name_of_the_command_line_is_a_policy_with_that_setting():
    assert list(METHODS) == list(POLICIES)
    for method, (setting, _) in METHODS.items():
        assert inspect.signature(POLICIES[method]).parameters[setting].default is inspect.Parameter.empty


def test_policies_without_a_file_equal_those_of_schedule():
    where = range(0, 19, 2)
    for schedule, expected in (
        (make_schedule("fora", 20, 12, interval=3), Schedule.every_nth(20, 12, 3)),
        (make_schedule("random", 20, 12, cached=0.3), Schedule.random_layers(20, 12, where, 144, 0)),
        (make_schedule("first", 20, 12, cached=0.3), Schedule.first_blocks(20, 12, where, 144)),
        (make_schedule("last", 20, 12, cached=0.5), Schedule.every_nth(20, 12, 2)),
    ):
        assert torch.equal(schedule.compute, expected.compute) and schedule.order == 0
    assert make_schedule("first", 7, 3, cached=0.3).cached_share() == pytest.approx(13 / 42)  # nearest to 12.6
    assert make_schedule("fora", 20, 12, interval=3, forecast=2).order == 2


def test_the_schedule_of_a_file_has_its_own_order_unless_one_is_given(tmp_path):
    plan, router = tmp_path / "plan.json", tmp_path / "r.pt"
    Schedule.every_nth(4, 3, 2).with_order(1).save(plan)
    Router(4, 3).save(router)
    assert [make_schedule("schedule", 4, 3, order, path=plan).order for order in (None, 0, 1, 2)] == [1, 0, 1, 2]
    schedule = make_schedule("dynamiclayer", 4, 3, 2, path=router, threshold=0.5)
    assert schedule.order == 2 and torch.equal(schedule.compute, Router.load(router).schedule(0.5).compute)
    assert make_schedule("dynamiclayer", 4, 3, path=router).order == 0


def test_the_file_of_smoothcache_gets_the_depth_of_the_model(tmp_path):
    path = tmp_path / "smooth.json"
    path.write_text(json.dumps({"attn": [1, 0, 1, 0], "mlp": [1, 1, 0, 0]}))
    schedule = make_schedule("schedule", 4, 5, path=path)
    assert schedule.rows() == [[[False, False]] * 5, [[True, False]] * 5, [[False, True]] * 5, [[True, True]] * 5]
    with pytest.raises(UserError, match="smooth.json is for 4 steps"):
        make_schedule("schedule", 5, 5, path=path)


@pytest.mark.parametrize(
    "method, settings, error, words",
    [
        ("tea", {}, ValueError, "unknown method 'tea': choose one of dynamiclayer, .*, last"),
        ("fora", {}, TypeError, "interval"),
        ("fora", {"cached": 0.5}, TypeError, "cached"),
        ("fora", {"interval": 0}, ValueError, "interval 0"),
        ("fora", {"interval": 2, "forecast": 3}, ValueError, "order 3"),
        ("first", {"cached": 0.6}, ValueError, "14 layers cannot be reused at 2 steps of 6"),
        ("smoothcache", {"alpha": float("nan"), "dit": random_dit()}, ValueError, "above 0"),
    ],
)
def test_what_a_policy_cannot_do_is_refused(method, settings, error, words):
    with pytest.raises(error, match=words):
        make_schedule(method, 4, 3, **settings)


def test_the_depth_is_known_before_the_model_is_loaded(model_folder):
    spec = model_spec(ckpt=str(model_folder))
    assert spec.depth == load_dit(spec, "cpu").depth == 3
    assert [model_spec(name).depth for name in ("DiT-XL/2", "DiT-S/8")] == [28, 12]


def test_only_files_are_read_before_the_model_is_loaded(model_folder):
    spec = model_spec(ckpt=str(model_folder))
    path, dit = model_folder / "router4.pt", load_dit(spec, "cpu")
    expected = Router.load(path).schedule(0.5).compute
    assert torch.equal(schedule_of_flags(flags("dynamiclayer", path=path, thres=0.5), spec).compute, expected)
    with pytest.raises(UserError, match="no such file: none.json"):
        schedule_of_flags(flags("schedule", path="none.json"), spec)
    for args, runs in ((flags("fora", interval=2), 2), (flags("smoothcache", alpha=1e9, forecast=2), 1)):
        assert schedule_of_flags(args, spec) is None
        schedule = schedule_of_flags(args, dit, 2.0)
        assert schedule.compute.sum().item() == runs * 6 and schedule.order == (args.forecast or 0)
    assert schedule_of_flags(flags(), dit) is None


def test_what_the_manifest_says_of_a_schedule(tmp_path):
    """Files without forecasts have the three entries of earlier versions, whose sets must stay continuable."""
    schedule, nothing = Schedule.every_nth(4, 3, 2), {"router": None, "threshold": None, "schedule": None}
    Router(4, 3).save(tmp_path / "r.pt")
    router = fingerprint(Router.load(tmp_path / "r.pt"), {})
    cells = bytes(cell for row in schedule.rows() for block in row for cell in block)
    sha, sha_2 = hashlib.sha256(cells).hexdigest(), hashlib.sha256(cells + b"order 2").hexdigest()
    routed = flags("dynamiclayer", path=tmp_path / "r.pt", thres=0.5)
    for args, plan, expected in (
        (flags(), None, {}),
        (flags("schedule", path="s.json"), schedule, {"schedule": sha}),
        (flags("schedule", path="s.json"), schedule.with_order(2), {"schedule": sha_2, "forecast": 2}),
        (routed, schedule, {"router": router, "threshold": 0.5}),
        (routed, schedule.with_order(1), {"router": router, "threshold": 0.5, "forecast": 1}),
        (flags("fora", interval=2), schedule, {"schedule": sha, "method": "fora", "interval": 2}),
        (flags("smoothcache", alpha=0.1), schedule, {"schedule": sha, "method": "smoothcache", "alpha": 0.1}),
        (
            flags("last", cached=0.5, forecast=2),
            schedule.with_order(2),
            {"schedule": sha_2, "method": "last", "cached": 0.5, "forecast": 2},
        ),
    ):
        assert manifest_entries(args, plan) == nothing | expected
