"""sample_ddp.py as a user runs it: alone, under torchrun, on two machines, killed, on a full disk."""

import contextlib
import functools
import gc
import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from conftest import assert_refused, call, fork, free_port, run, start, start_ranks, torchrun
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

import sampling
from diffusion import create_diffusion
from evaluation.sample_set import set_name
from models import DiT
from pretrained.loading import load_dit, load_vae
from pretrained.spec import model_spec
from router import Router
from runtime import devices
from schedule import Schedule
from training.smoothcache import layer_changes

SCALE, STEPS = 2.0, 4  # the model folder's guidance
FLAGS = f"--ckpt tiny --device cpu --num-sampling-steps {STEPS} --num-fid-samples 23 --sample-dir samples".split()
SCHEDULE = "--accelerate-method schedule --path"
ROUTER = "--accelerate-method dynamiclayer --thres 0.5 --path tiny/router4.pt"
COUNT = 960
# A set that takes seconds, so that a test finds the program at work even on a busy machine.
LONG = [*FLAGS, "--num-fid-samples", COUNT, "--per-proc-batch-size", 2]
SAMPLES = Path("samples")
TIMEOUT = 300  # seconds
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def folder(model_folder, tmp_path, monkeypatch):
    """The present folder: an empty one with the model folder in it."""
    monkeypatch.chdir(tmp_path)
    Path("tiny").symlink_to(model_folder)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture
def sample(capfd):
    """Runs sample_ddp.py in this process with FLAGS and more; later flags win."""
    return lambda more="": call("sample_ddp.py", *FLAGS, *more.split(), capfd=capfd)


@pytest.fixture
def make(sample):
    """Makes a set in `folder`; returns its arrays, with the manifest as a dict, and the output."""

    def make(more="", folder=SAMPLES):
        result = sample(f"{more} --sample-dir {folder}")
        assert result.returncode == 0, result.stderr
        return read_set(folder), result.stdout

    return make


def npz_in(folder=SAMPLES):
    (path,) = Path(folder).glob("*.npz")
    return path


def read_set(folder):
    with np.load(npz_in(folder), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files} | {"manifest": json.loads(str(arrays["manifest"]))}


def expected(
    indices, labels=None, router=None, ancestral=False, scale=SCALE, seed=0, schedule=None, noise_scale=(1, 1)
):
    """The images `indices` by the documented rules, one at a time, with NumPy's and the sampler's own functions."""
    spec = model_spec(ckpt="tiny")
    dit, vae = load_dit(spec, "cpu"), load_vae(spec, "cpu")
    schedule = Router.load(router).schedule(0.5) if router else schedule
    images = []
    for number in indices:
        stream = np.random.default_rng([3, seed, number])
        drawn = stream.integers(5)
        y = torch.tensor([drawn if labels is None else labels[number]])

        def draw(x, stream=stream):
            noise = stream.standard_normal((1, *x.shape[1:]), dtype=np.float32)
            return torch.from_numpy(noise).repeat(len(x), 1, 1, 1)

        z = draw(torch.empty(1, 4, 4, 4))
        diffusion = create_diffusion(STEPS, noise_scale=noise_scale)
        latents = sampling.sample_latents(dit, diffusion, z, y, scale, schedule, ancestral, draw)
        with torch.no_grad():
            x = vae.decode(latents / vae.config.scaling_factor).sample[0]
        pixels = torch.clamp(127.5 * x + 128.0, 0, 255).permute(1, 2, 0).to(torch.uint8)
        images.append((pixels.numpy(), int(y)))
    return [np.stack(part) for part in zip(*images)]


def assert_close(images, others):
    """Within one grey level, and equal nearly everywhere."""
    assert images.shape == others.shape and images.dtype == others.dtype == np.uint8
    difference = np.abs(images.astype(int) - others.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


# What the images are, and what they depend on


def test_image_k_follows_from_its_own_stream_and_the_end_is_reported(make):
    made, out = make("--ddim-sample --per-proc-batch-size 7 --record r.json")
    images, labels = expected(range(23))
    assert made["labels"].dtype == np.int64 and np.array_equal(made["labels"], labels)
    assert_close(made["arr_0"], images)
    assert made["manifest"].items() >= {"images": 23, "cfg_scale": 2.0, "seed": 0, "router": None}.items()
    assert f"(23 images, SHA-256 of arr_0 {hashlib.sha256(made['arr_0'].tobytes()).hexdigest()})" in out
    record = json.loads(Path("r.json").read_text())
    assert (record["images"], record["processes"], record["flags"]["num_fid_samples"]) == (23, 1, 23)
    assert record["images_per_second"] == pytest.approx(23 / record["seconds"])
    assert sum(record["shares"].values()) == pytest.approx(1) and min(record["shares"].values()) >= 0


@pytest.mark.parametrize(
    "more, options",
    [
        ("--p-sample --cfg-scale 1", {"ancestral": True, "scale": 1.0}),
        ("--balanced-labels", {"labels": [k % 5 for k in range(23)]}),
        ("--global-seed 7 --deterministic", {"seed": 7}),
        (ROUTER, {"router": "tiny/router4.pt"}),
        (f"{ROUTER} --p-sample", {"router": "tiny/router4.pt", "ancestral": True}),
        (f"{ROUTER} --compile", {"router": "tiny/router4.pt"}),
        (f"{ROUTER} --cuda-graphs --p-sample", {"router": "tiny/router4.pt", "ancestral": True}),
    ],
)
def test_other_ways_of_sampling(make, monkeypatch, more, options):
    """With stand-ins on the CPU for the backend of torch.compile and for a CUDA graph."""
    monkeypatch.setattr(devices, "compile_blocks", functools.partial(devices.compile_blocks, backend="eager"))
    monkeypatch.setattr(devices, "pick_device", lambda *_: torch.device("cpu"))
    sizes, denoise = set(), DiT.denoise
    monkeypatch.setattr(DiT, "denoise", lambda self, x, *more: sizes.add(len(x)) or denoise(self, x, *more))
    torch._dynamo.reset()
    counters.clear()
    made, _ = make(f"{more} --per-proc-batch-size 8")
    images, labels = expected(range(0, 23, 6), **options)
    assert np.array_equal(made["labels"][::6], labels)
    assert_close(made["arr_0"][::6], images)
    assert max(sizes) == (8 if options.get("scale") == 1 else 16)  # only guidance doubles the batch
    # The last batch has 7 images; if it were not filled up, it would compile four more graphs.
    assert ("--compile" in more) <= counters["stats"]["unique_graphs"] <= 4


def test_a_schedule_file_gives_the_images_of_its_router(make):
    schedule = Router.load("tiny/router4.pt").schedule(0.5)
    schedule.save("plan.pt")
    by_plan, by_router = make(f"{SCHEDULE} plan.pt")[0], make(ROUTER, "other")[0]
    assert np.array_equal(by_plan["arr_0"], by_router["arr_0"])
    ours, theirs = by_plan["manifest"], by_router["manifest"]
    digest = hashlib.sha256(schedule.compute.numpy().tobytes()).hexdigest()
    assert ours == theirs | {"router": None, "threshold": None, "schedule": digest}
    assert (len(theirs["router"]), theirs["threshold"], theirs["schedule"]) == (64, 0.5, None)
    assert npz_in().name == f"tiny-size-8-cfg-2.0-seed-0-ddim-4-schedule-plan-{digest[:8]}-n-23.npz"


@pytest.mark.parametrize(
    "flags, plan, name",
    [
        ("fora --interval 3 --forecast 2", Schedule.every_nth(4, 3, 3).with_order(2), "fora-interval-3-forecast-2"),
        ("last --cached 0.5", Schedule.every_nth(4, 3, 2), "last-cached-0.5"),
        ("smoothcache --alpha 1e9 --forecast 1", Schedule.every_nth(4, 3, 4).with_order(1), "smoothcache-alpha-1"),
    ],
)
def test_a_policy_by_its_name_gives_the_images_of_its_schedule(make, sample, flags, plan, name):
    made, _ = make(f"--accelerate-method {flags}")
    images, _ = expected(range(0, 23, 6), schedule=plan)
    assert_close(made["arr_0"][::6], images)
    policy, _, value, *_ = flags.split()
    entries = {"method": policy, "router": None, "schedule": plan.sha256(), flags.split()[1][2:]: float(value)}
    assert made["manifest"].items() >= entries.items() and made["manifest"].get("forecast") == (plan.order or None)
    assert f"-ddim-4-{name}" in npz_in().name
    assert "is there already and complete" in sample(f"--accelerate-method {flags}").stdout


def test_the_noise_that_the_model_predicts_can_be_scaled(make, sample):
    plain, scaled = make()[0], make("--noise-scale 0.8 0.5", "scaled")[0]
    images, _ = expected(range(0, 23, 6), noise_scale=(0.8, 0.5))
    assert_close(scaled["arr_0"][::6], images)
    assert not np.array_equal(scaled["arr_0"], plain["arr_0"])
    assert scaled["manifest"] == plain["manifest"] | {"noise_scale": [0.8, 0.5]}
    assert npz_in("scaled").name == npz_in().name.replace("-seed-0", "-noise-0.8-to-0.5-seed-0")
    again = sample("--noise-scale 0.8 0.5 --sample-dir scaled")
    assert "is there already and complete" in again.stdout
    assert np.array_equal(make("--noise-scale 1", "one")[0]["arr_0"], plain["arr_0"])


def test_the_plan_of_a_router_with_forecasts_makes_another_set(make):
    routed, forecast = make(ROUTER)[0], make(f"{ROUTER} --forecast 2", "2")[0]
    plan = Router.load("tiny/router4.pt").schedule(0.5).with_order(2)
    assert_close(forecast["arr_0"][::6], expected(range(0, 23, 6), schedule=plan)[0])
    assert forecast["manifest"] == routed["manifest"] | {"forecast": 2} and "forecast" not in routed["manifest"]
    assert npz_in("2").name == npz_in().name.replace("-n-23", "-forecast-2-n-23")
    assert np.array_equal(make(f"{ROUTER} --forecast 0", "0")[0]["arr_0"], routed["arr_0"])
    assert npz_in("0").name == npz_in().name


def test_rank_0_measures_for_all_ranks(folder, make):
    """With other weights on rank 1 the manifests differ in the weights, and not in the schedule of smoothcache."""
    changes = layer_changes(load_dit(model_spec(ckpt="tiny"), "cpu"), STEPS, SCALE)
    alpha = changes[changes.isfinite()].median().item()
    flags = f"--accelerate-method smoothcache --alpha {alpha}"
    result = fork("sample_ddp.py", *FLAGS, *flags.split(), cwd=folder, processes=2)
    assert result.returncode == 0, result.stderr
    made, alone = read_set(SAMPLES), make(flags, "alone")[0]
    assert made["manifest"] == alone["manifest"]
    assert made["manifest"]["schedule"] == Schedule.by_change(changes, 3, alpha).sha256()
    assert_close(made["arr_0"], alone["arr_0"])
    shutil.copytree("tiny/", "other")
    state = {name: value * 1.5 for name, value in load_file("other/dit.safetensors").items()}
    save_file(state, "other/dit.safetensors")
    commands = [[*FLAGS, *flags.split(), "--ckpt", ckpt] for ckpt in ("tiny", "other")]
    outputs = [output_of(process) for process in start_ranks("sample_ddp.py", *commands, cwd=folder)]
    assert "process 1 differs from process 0 in model: pass" in outputs[0], outputs


def test_any_processes_and_batch_size_give_the_same_set(make, folder):
    """World sizes 1, 2 (under torchrun) and 3, batches of 7 and 32; with --deterministic the same bits."""
    torch.set_num_threads(2)  # the other processes have one thread
    first, one = make(f"{ROUTER} --per-proc-batch-size 7", "1")[0], make(f"{ROUTER} --deterministic", "2")[0]
    assert torch.get_num_threads() == 1  # the bits of a larger model depend on it
    flags = [*FLAGS, *ROUTER.split(), "--sample-dir"]
    for result, processes in (
        (run("sample_ddp.py", *flags, 3, cwd=folder, processes=2), 2),
        (fork("sample_ddp.py", *flags, 4, "--deterministic", "--per-proc-batch-size", 7, cwd=folder, processes=3), 3),
    ):
        assert result.returncode == 0, result.stderr
        assert "23 images in" in result.stdout and f"processes: {processes};" in result.stdout
    two, three = read_set("3"), read_set("4")
    for other in (one, two, three):
        assert np.array_equal(other["labels"], first["labels"])
        assert_close(other["arr_0"], first["arr_0"])
    assert np.array_equal(one["arr_0"], three["arr_0"])


def test_the_name_of_a_set_distinguishes_runs():
    manifest = {"image_size": 256, "cfg_scale": 1.5, "seed": 0, "sampler": "ddim", "steps": 50, "images": 9}
    manifest |= dict.fromkeys(("router", "schedule", "threshold", "labels", "dtype", "deterministic"))

    def name(ckpt=None, path=None, **changes):
        return set_name(SimpleNamespace(name="DiT-XL/2", registered=True, vae="ema"), manifest | changes, ckpt, path)

    assert name("runs/ema last.pt") == "DiT-XL-2-ema-last-size-256-vae-ema-cfg-1.5-seed-0-ddim-50-n-9"
    assert name(seed=7) == "DiT-XL-2-pretrained-size-256-vae-ema-cfg-1.5-seed-7-ddim-50-n-9"
    routed = name(path="a/routér: 1%.2.pt", router="0123456789", threshold=0.2, labels="balanced")
    assert routed.endswith("-ddim-50-dynamiclayer-rout-r-1-.2-01234567-thres-0.2-balanced-n-9")
    planned = name(path="plan.pt", schedule="abcdefghij", dtype="bf16", deterministic="CPU")
    assert planned.endswith("-ddim-50-schedule-plan-abcdefgh-bf16-deterministic-n-9")
    assert name(method="fora", schedule="abc", interval=3).endswith("-ddim-50-fora-interval-3-n-9")
    smooth = name(method="smoothcache", schedule="abc", alpha=0.18, forecast=2, labels="balanced")
    assert smooth.endswith("-ddim-50-smoothcache-alpha-0.18-forecast-2-balanced-n-9")


def test_a_complete_set_is_not_made_again_but_gets_its_pngs(make, sample):
    made, npz = make()[0], npz_in()
    before = npz.stat().st_mtime_ns, npz.stat().st_ino
    assert f"{npz} is there already and complete" in make("--per-proc-batch-size 3 --save-to-disk")[1]
    assert_refused(sample("--no-tf32"), "tf32 was true, now it is false", "--sample-dir")
    assert_refused(sample("--no-tf32 --dtype bf16"), "--dtype bf16 says the precision: leave out --tf32")
    assert (npz.stat().st_mtime_ns, npz.stat().st_ino) == before
    for k, image in enumerate(made["arr_0"]):
        assert np.array_equal(np.asarray(Image.open(npz.with_suffix("") / f"{k:06d}.png")), image)


def test_switches_that_change_images_belong_to_the_set(make, sample, monkeypatch):
    plain, names = make("--dtype bf16")[0], []
    fast, out = make("--dtype bf16 --experimental fp8", "fast")
    assert "Experimental, measured on no GPU yet: fp8" in out and "-bf16-fp8-n-23.npz" in out
    assert fast["manifest"] == plain["manifest"] | {"experimental": ["fp8"]}
    assert 0 < np.abs(fast["arr_0"].astype(int) - plain["arr_0"]).mean() < 5
    shutil.move(npz_in("fast"), npz_in())
    assert_refused(sample("--dtype bf16"), 'experimental was ["fp8"], now it is null', "--sample-dir")
    monkeypatch.setattr(devices, "compile_blocks", lambda blocks, experimental: names.append(experimental))
    kept = make("--dtype bf16 --compile --experimental autotune", "tuned")[0]
    assert names == [["autotune"]] and kept["manifest"] == plain["manifest"]  # it changes last bits, as --compile does


def test_a_damaged_shard_is_sampled_again(make):
    made, _ = make("--per-proc-batch-size 4 --keep-shards")
    gc.collect()  # frees the lock of this launch
    shard = npz_in().with_suffix("") / "shards" / "0000004-0000008.npz"
    shard.write_bytes(shard.read_bytes()[:-1])
    npz_in().unlink()
    again, out = make("--per-proc-batch-size 4")
    assert "the shard of images 4 to 7 is damaged: they are sampled again" in out
    assert "19 of 23 images are there" in out and sampled(out) == 4
    assert np.array_equal(again["arr_0"], made["arr_0"])


@pytest.mark.parametrize(
    "more, words",
    [
        ("--num-fid-samples 0", "--num-fid-samples"),
        ("--global-seed -1", "--global-seed"),
        ("--accelerate-method schedule", "--path"),
        ("--accelerate-method fora --interval 5", "--interval 5 is more than the 4 steps"),
        ("--accelerate-method first --cached 0.5 --num-sampling-steps 5", "2 of 5 steps can reuse, so at most 0.4"),
        (f"{SCHEDULE} tiny/router4.pt", "is not a schedule file"),
        (f"{ROUTER} --num-sampling-steps 5", "4 steps"),
        ("--ddim-sample --p-sample", "--p-sample"),
        ("--compile --deterministic --experimental autotune", "times, which are never the same: leave it or --det"),
        ("--ckpt none", "no such file: none"),
        ("--record /proc/x.json", "/proc/x.json"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(sample, more, words):
    assert_refused(sample(more), words)
    assert not SAMPLES.exists()


@pytest.mark.parametrize(
    "more, line",
    [
        ("--num-fid-samples 0", "error: argument --num-fid-samples: 0 is not a whole number of at least 1"),
        pytest.param(f"{SCHEDULE} none.pt", "error: no such file: none.pt", marks=slow),
    ],
)
def test_a_refusal_under_torchrun_is_printed_once(folder, more, line):
    result = run("sample_ddp.py", *FLAGS, *more.split(), cwd=folder, processes=2)
    assert result.returncode == 1
    assert (result.stdout + result.stderr).count("error: ") == result.stderr.count(line) == 1


def test_processes_with_different_flags_are_refused(folder):
    processes = start_ranks("sample_ddp.py", FLAGS, [*FLAGS, "--p-sample", "--global-seed", 3], cwd=folder)
    outputs = [output_of(process) for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert "error: process 1 differs from process 0 in sampler, seed: " in outputs[0] and outputs[0].count("\n") == 1
    assert outputs[1] == "" and not SAMPLES.exists()


@pytest.mark.parametrize("more", ["--record r.json", "--accelerate-method fora --interval 2"])
def test_processes_whose_flags_lead_to_other_messages_are_refused_too(folder, more):
    """Rank 1 has none of them, so it would wait for ever, or take another message for an answer."""
    processes = start_ranks("sample_ddp.py", [*FLAGS, *more.split()], FLAGS, cwd=folder)
    outputs = [output_of(process) for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    line = f"error: process 1 differs from process 0 in {more.split()[0]}: pass the same flags and files"
    assert line in outputs[0] and outputs[0].count("\n") == 1 and outputs[1] == "" and not SAMPLES.exists()


# Interruptions, and what the next launch makes of them


@pytest.fixture(scope="module")
def undisturbed(model_folder, tmp_path_factory):
    """The file that an undisturbed run with LONG makes, as bytes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "tiny").symlink_to(model_folder)
    assert fork("sample_ddp.py", *LONG, cwd=folder).returncode == 0
    return npz_in(folder / SAMPLES).read_bytes()


@pytest.fixture
def finish(undisturbed, folder):
    """Runs the same command to its end, compares its file with the undisturbed one, and returns its output."""

    def finish():
        result = fork("sample_ddp.py", *LONG, cwd=folder)
        assert result.returncode == 0, result.stderr
        assert npz_in().read_bytes() == undisturbed and list(SAMPLES.iterdir()) == [npz_in()]
        return result.stdout

    return finish


def shards():
    """The present shards: name to a value that changes if one is written again."""
    found = {}
    for path in SAMPLES.glob("*/shards/*-*.npz"):
        with contextlib.suppress(FileNotFoundError):  # the set was completed meanwhile
            found[path.name] = path.stat().st_ino, path.stat().st_mtime_ns
    return found


def output_of(process):
    """Its output until its end, on both streams."""
    return "".join(process.communicate(timeout=TIMEOUT))


def wait_for_shards(more, process):
    """Wait until there are `more` shards than now; fail if `process` ends before."""
    wanted, deadline = len(shards()) + more, time.monotonic() + TIMEOUT
    while len(shards()) < wanted:
        assert process.poll() is None and time.monotonic() < deadline, output_of(process)
        time.sleep(0.002)


def workers(process):
    """The processes that torchrun started."""
    return [p for p in psutil.Process(process.pid).children(True) if "sample_ddp.py" in " ".join(p.cmdline())]


def sampled(out):
    """How many images a launch says that it sampled."""
    return int(re.search(r"^(\d+) images in", out, re.M)[1])


@slow
def test_killed_at_random_moments_it_continues_with_any_processes(undisturbed, folder):
    """Killed alone, one of two, all of two, one of three; no finished image is sampled again."""
    moments, before = random.Random(0), {}
    for processes, victims in ((1, "all"), (2, "one"), (2, "all"), (3, "one")):
        if victims == "all":
            started = start_ranks("sample_ddp.py", *[LONG] * processes, cwd=folder)
        else:  # torchrun ends the others
            started = [start("sample_ddp.py", *LONG, cwd=folder, launcher=torchrun(processes))]
        wait_for_shards(moments.randint(1, 9), started[0])
        time.sleep(moments.random() * 0.01)
        for victim in started if victims == "all" else [moments.choice(workers(started[0]))]:
            victim.kill()
        for process in started:
            output_of(process)
            assert process.returncode
        after = shards()
        assert len(after) > len(before) and before.items() <= after.items()
        before = after
    # Without torchrun, rank 0 samples the images of a rank that died.
    first, second = start_ranks("sample_ddp.py", LONG, LONG, cwd=folder)
    wait_for_shards(3, first)
    second.kill()
    out = output_of(first)
    output_of(second)
    assert f"{2 * len(before)} of {COUNT} images are there" in out and sampled(out) == COUNT - 2 * len(before)
    assert first.returncode == 0 and "other processes ended early" in out and npz_in().read_bytes() == undisturbed


@slow
def test_two_machines_share_the_work_and_continue_after_the_death_of_rank_0(undisturbed, folder):
    """Two torchruns on this machine, as in docs/clusters.md."""
    rendezvous = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=1"]
    launcher = ["--nnodes=2", "--nproc_per_node=1", *rendezvous, "--max-restarts=1"]
    nodes = [start("sample_ddp.py", *LONG, cwd=folder, launcher=launcher) for _ in range(2)]
    wait_for_shards(5, nodes[0])
    there = 2 * len(shards())
    (first,) = (p for node in nodes for p in workers(node) if p.environ()["RANK"] == "0")
    first.kill()
    outs = [output_of(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outs
    (out,) = (out for out in outs if "images in" in out)
    assert "processes: 2;" in out and sampled(out) <= COUNT - there and "Traceback" not in "".join(outs)
    assert npz_in().read_bytes() == undisturbed


@slow
@pytest.mark.parametrize("number, processes", [(signal.SIGINT, None), (signal.SIGTERM, 2)])
def test_a_signal_ends_it_with_one_line_and_keeps_finished_images(finish, folder, number, processes):
    process = start("sample_ddp.py", *LONG, cwd=folder, launcher=processes and torchrun(processes))
    wait_for_shards(5, process)
    process.send_signal(number)
    out, there = output_of(process), 2 * len(shards())
    (line,) = (line for line in out.splitlines() if "sample_ddp.py: " in line)
    counted = re.fullmatch(rf"\S+ interrupted: (\d+) of {COUNT} images are finished, the same command continues", line)
    assert 10 <= there < COUNT and not list(SAMPLES.glob("**/.*.part"))
    if processes:  # rank 0 may count while the other rank still writes its batches
        assert int(counted[1]) <= there
    else:
        assert int(counted[1]) == there and process.returncode == 130 and "Traceback" not in out
    assert sampled(finish()) == COUNT - there


@slow
def test_a_full_disk_ends_it_with_one_line_and_loses_nothing(sample, finish):
    """Room for a few shards, then for all shards (4 kB each) but not the .npz, then for everything."""

    def mount(options):
        gc.collect()  # frees the lock of a failed launch in this process
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", SAMPLES], capture_output=True).returncode

    SAMPLES.mkdir()
    if mount("size=64k"):
        pytest.skip("mounting a file system is not allowed here")
    try:
        before, long = {}, " ".join(map(str, LONG))
        for size in ("64k", "1960k"):
            mount(f"remount,size={size}")
            result, there = sample(long), 2 * len(shards())
            assert_refused(result, "No space left", f"{there} of {COUNT} images are finished, the same command")
            assert before.items() < shards().items() and not list(SAMPLES.glob("**/.*.part"))
            assert not list(SAMPLES.glob("*.npz"))
            before = shards()
        mount("remount,size=16m")
        finish()
    finally:
        gc.collect()
        subprocess.run(["umount", "--lazy", SAMPLES])


def test_the_name_of_the_originals_commands_is_accepted_and_changes_nothing(make):
    plain, _ = make()
    named, out = make("--name DiT-XL/2-50", folder="named")
    assert plain.keys() == named.keys() and all(np.array_equal(plain[name], named[name]) for name in plain)
    assert npz_in().name == npz_in("named").name and "DiT-XL" not in out
