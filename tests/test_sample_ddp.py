"""sample_ddp.py as a user runs it: alone, under torchrun, on two machines, killed, on a full disk."""

import functools
import gc
import hashlib
import json
import random
import re
import signal
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from conftest import assert_refused, call, fork, free_port, run, start, start_ranks, torchrun
from PIL import Image
from torch._dynamo.utils import counters

import sampling
from diffusion import create_diffusion
from evaluation.sample_set import set_name
from models import DiT
from pretrained.loading import load_dit, load_vae
from pretrained.spec import model_spec
from router import Router
from runtime import devices

METHOD = ["--accelerate-method", "dynamiclayer", "--thres", 0.5, "--path"]
SCHEDULE = ["--accelerate-method", "schedule", "--path"]
COUNT = 240  # images of a set that is disturbed
TIMEOUT = 300  # seconds
SCALE, STEPS = 2.0, 4  # the model folder's guidance


@pytest.fixture
def flags(model_folder, tmp_path):
    """The flags of a small set: 23 images of the model folder, four steps, into tmp_path/samples."""
    return ["--ckpt", model_folder, "--device", "cpu", "--num-sampling-steps", STEPS, "--num-fid-samples", 23] + [
        *("--sample-dir", tmp_path / "samples")
    ]


@pytest.fixture
def sample(flags, capfd):
    """Runs sample_ddp.py on that set in this process; later flags win."""
    threads = torch.get_num_threads()
    yield lambda *more: call("sample_ddp.py", *flags, *more, capfd=capfd)
    torch.set_num_threads(threads)


def only_file(folder):
    (path,) = folder.iterdir()
    return path


def read_set(folder):
    """The arrays of the one .npz in `folder`, which holds nothing else."""
    with np.load(only_file(folder), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def expected(model_folder, indices, labels=None, router=None, ancestral=False, scale=SCALE, seed=0):
    """The images `indices` by the documented rules, one at a time, with NumPy's and the sampler's own functions."""
    spec = model_spec(ckpt=str(model_folder))
    dit, vae = load_dit(spec, "cpu"), load_vae(spec, "cpu")
    schedule = Router.load(model_folder / router).schedule(0.5) if router else None
    images = []
    for number in indices:
        stream = np.random.default_rng([3, seed, number])
        drawn = stream.integers(5)
        y = torch.tensor([drawn if labels is None else labels[number]])

        def draw(x, stream=stream):
            noise = stream.standard_normal((1, *x.shape[1:]), dtype=np.float32)
            return torch.from_numpy(noise).repeat(len(x), 1, 1, 1)

        z = draw(torch.empty(1, 4, 4, 4))
        latents = sampling.sample_latents(
            dit, create_diffusion(STEPS), z, y, scale, schedule, ancestral=ancestral, randn_like=draw
        )
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


def test_image_k_follows_from_its_own_stream_and_the_end_is_reported(sample, model_folder, tmp_path):
    result = sample("--ddim-sample", "--per-proc-batch-size", 7, "--record", tmp_path / "r.json")
    assert result.returncode == 0, result.stderr
    got = read_set(tmp_path / "samples")
    images, labels = expected(model_folder, range(23))
    assert got["labels"].dtype == np.int64 and np.array_equal(got["labels"], labels)
    assert_close(got["arr_0"], images)
    manifest = json.loads(str(got["manifest"]))
    assert (manifest["images"], manifest["cfg_scale"], manifest["seed"], manifest["router"]) == (23, 2.0, 0, None)
    digest = hashlib.sha256(got["arr_0"].tobytes()).hexdigest()
    assert f"(23 images, SHA-256 of arr_0 {digest})" in result.stdout
    shares = re.findall(r"(\S+)% (?:sampling|decoding|waiting for the disk|assembling|other)", result.stdout)
    assert len(shares) == 5 and sum(map(float, shares)) == pytest.approx(100, abs=0.3)
    record = json.loads((tmp_path / "r.json").read_text())
    assert (record["images"], record["processes"], record["flags"]["num_fid_samples"]) == (23, 1, 23)
    assert record["images_per_second"] == pytest.approx(23 / record["seconds"])
    assert sum(record["shares"].values()) == pytest.approx(1) and all(s >= 0 for s in record["shares"].values())


@pytest.mark.parametrize(
    "more, options",
    [
        (["--p-sample", "--cfg-scale", 1], {"ancestral": True, "scale": 1.0}),
        (["--balanced-labels"], {"labels": [k % 5 for k in range(23)]}),
        (["--global-seed", 7, "--deterministic"], {"seed": 7}),
        ([*METHOD, "router4.pt"], {"router": "router4.pt"}),
        ([*METHOD, "router4.pt", "--p-sample"], {"router": "router4.pt", "ancestral": True}),
    ],
)
def test_other_ways_of_sampling(sample, model_folder, tmp_path, monkeypatch, more, options):
    monkeypatch.chdir(model_folder)
    result = sample(*more)
    assert result.returncode == 0, result.stderr
    got = read_set(tmp_path / "samples")
    images, labels = expected(model_folder, range(0, 23, 6), **options)
    assert np.array_equal(got["labels"][::6], labels)
    assert_close(got["arr_0"][::6], images)


@pytest.mark.parametrize("ancestral, flag", [(False, "--compile"), (True, "--cuda-graphs")])
def test_compiled_blocks_and_captured_trajectories_see_one_batch_size(
    sample, model_folder, tmp_path, monkeypatch, ancestral, flag
):
    """23 images in batches of 8: the last is filled up. The backend and the graph are the CPU's stand-ins."""
    monkeypatch.setattr(devices, "compile_blocks", functools.partial(devices.compile_blocks, backend="eager"))
    monkeypatch.setattr(devices, "pick_device", lambda *_: torch.device("cpu"))
    torch._dynamo.reset()
    counters.clear()
    more = [*(["--p-sample"] if ancestral else []), flag, "--per-proc-batch-size", 8]
    result = sample(*more, *METHOD, model_folder / "router4.pt")
    assert result.returncode == 0, result.stderr
    assert 4 * (not ancestral) >= counters["stats"]["unique_graphs"] >= (not ancestral)
    some = range(0, 23, 11)
    images, _ = expected(model_folder, some, router="router4.pt", ancestral=ancestral)
    assert_close(read_set(tmp_path / "samples")["arr_0"][some], images)


def test_lower_precision_changes_images_a_little(sample, model_folder, tmp_path):
    assert sample("--dtype", "bf16").returncode == 0
    images = read_set(tmp_path / "samples")["arr_0"].astype(int)
    assert 0 < abs(images - expected(model_folder, range(23))[0]).mean() < 8


def test_guidance_of_1_does_not_double_the_batch(sample, monkeypatch):
    sizes, denoise = [], DiT.denoise
    monkeypatch.setattr(DiT, "denoise", lambda self, x, *more: sizes.append(len(x)) or denoise(self, x, *more))
    for scale in (1, 1.5):
        assert sample("--cfg-scale", scale).returncode == 0
    assert sizes == [23] * STEPS + [46] * STEPS


def test_a_schedule_file_gives_the_images_of_its_router(sample, model_folder, tmp_path):
    router = Router.load(model_folder / "router4.pt")
    router.schedule(0.5).save(tmp_path / "plan.pt")
    assert sample(*METHOD, model_folder / "router4.pt", "--sample-dir", tmp_path / "router").returncode == 0
    assert sample(*SCHEDULE, tmp_path / "plan.pt").returncode == 0
    ours, theirs = read_set(tmp_path / "samples"), read_set(tmp_path / "router")
    assert np.array_equal(ours["arr_0"], theirs["arr_0"])
    ours, theirs = (json.loads(str(arrays["manifest"])) for arrays in (ours, theirs))
    digest = hashlib.sha256(router.schedule(0.5).compute.numpy().tobytes()).hexdigest()
    assert {name for name in ours if ours[name] != theirs[name]} == {"router", "threshold", "schedule"}
    assert (ours["schedule"], ours["router"], ours["threshold"]) == (digest, None, None)
    assert (theirs["schedule"], theirs["threshold"]) == (None, 0.5)
    name = f"tiny-size-8-cfg-2.0-seed-0-ddim-4-schedule-plan-{digest[:8]}-n-23.npz"
    assert only_file(tmp_path / "samples").name == name


def test_any_processes_and_batch_size_give_the_same_set(flags, sample, model_folder, tmp_path):
    """World sizes 1, 2 (under torchrun) and 3, batches of 7 and 32; with --deterministic the same bits."""
    command = [*flags, *METHOD, model_folder / "router4.pt", "--per-proc-batch-size"]
    results = [
        sample(*command, 7, "--sample-dir", tmp_path / "1"),
        run("sample_ddp.py", *command, 32, "--sample-dir", tmp_path / "2", cwd=tmp_path, processes=2),
        sample(*command, 32, "--sample-dir", tmp_path / "one", "--deterministic"),
        fork(
            "sample_ddp.py", *command, 7, "--sample-dir", tmp_path / "3", "--deterministic", cwd=tmp_path, processes=3
        ),
    ]
    for result, processes in zip(results, (1, 2, 1, 3)):
        assert result.returncode == 0, result.stderr
        assert "23 images in" in result.stdout and f"processes: {processes};" in result.stdout
    first, *others = (read_set(tmp_path / name) for name in ("1", "2", "one", "3"))
    for other in others:
        assert np.array_equal(other["labels"], first["labels"])
        assert_close(other["arr_0"], first["arr_0"])
    assert np.array_equal(others[1]["arr_0"], others[2]["arr_0"])


# Names of sets, and sets that exist

MANIFEST = {"image_size": 256, "cfg_scale": 1.5, "seed": 0, "sampler": "ddim", "steps": 50, "images": 50000}
MANIFEST |= {"router": None, "schedule": None, "threshold": None, "labels": "uniform", "dtype": None}
MANIFEST |= {"deterministic": False}
BY_ROUTER = {"router": "0123456789ab", "threshold": 0.25}


@pytest.mark.parametrize(
    "changes, ckpt, path, name",
    [
        ({}, "a/ema last.pt", None, "DiT-XL-2-ema-last-size-256-vae-ema-cfg-1.5-seed-0-ddim-50-n-50000"),
        ({"seed": 7, "images": 9}, None, None, "DiT-XL-2-pretrained-size-256-vae-ema-cfg-1.5-seed-7-ddim-50-n-9"),
        (
            {"router": "0123456789", "threshold": 0.2},
            None,
            "a/routér: 1%.2.pt",
            "-dynamiclayer-rout-r-1-.2-01234567-thres-0.2-",
        ),
        ({"schedule": "abcdefghij", "sampler": "ddpm"}, None, "plan.pt", "-ddpm-50-schedule-plan-abcdefgh-n-"),
        (
            {"labels": "balanced", "dtype": "bf16", "deterministic": "CPU"},
            None,
            None,
            "-balanced-bf16-deterministic-n-",
        ),
    ],
)
def test_the_name_of_a_set_distinguishes_runs(changes, ckpt, path, name):
    assert name in set_name(
        SimpleNamespace(name="DiT-XL/2", registered=True, vae="ema"), MANIFEST | changes, ckpt, path
    )


def test_a_complete_set_is_not_made_again_but_gets_its_pngs(sample, tmp_path):
    """Its settings are compared first."""
    assert sample().returncode == 0
    npz = only_file(tmp_path / "samples")
    before = npz.stat().st_mtime_ns, npz.stat().st_ino
    result = sample("--per-proc-batch-size", 3, "--save-to-disk")
    assert result.returncode == 0 and f"{npz} is there already and complete" in result.stdout
    assert_refused(sample("--no-tf32"), "tf32 was true, now it is false", "--sample-dir")
    assert (npz.stat().st_mtime_ns, npz.stat().st_ino) == before
    for k, image in enumerate(np.load(npz)["arr_0"]):
        assert np.array_equal(np.asarray(Image.open(npz.with_suffix("") / f"{k:06d}.png")), image)


def test_a_damaged_shard_is_sampled_again(sample, tmp_path):
    assert sample("--per-proc-batch-size", 4, "--keep-shards").returncode == 0
    (npz,) = (tmp_path / "samples").glob("*.npz")
    made = npz.read_bytes()
    npz.unlink()
    gc.collect()  # frees the lock of the launch before
    shard = npz.with_suffix("") / "shards" / "0000004-0000008.npz"
    shard.write_bytes(shard.read_bytes()[:-1])
    out = sample("--per-proc-batch-size", 4).stdout
    assert "the shard of images 4 to 7 is damaged: they are sampled again" in out
    assert "19 of 23 images are there" in out and sampled(out) == 4
    assert only_file(tmp_path / "samples").read_bytes() == made


# Refusals


@pytest.mark.parametrize(
    "more, words",
    [
        (["--num-fid-samples", "0"], "--num-fid-samples"),
        (["--per-proc-batch-size", "x"], "--per-proc-batch-size"),
        (["--global-seed", "-1"], "--global-seed"),
        (["--accelerate-method", "schedule"], "--path"),
        ([*SCHEDULE, "router4.pt"], "is not a schedule file"),
        ([*METHOD, "none.pt"], "no such file: none.pt"),
        ([*METHOD, "router4.pt", "--num-sampling-steps", "5"], "4 steps"),
        (["--ddim-sample", "--p-sample"], "--p-sample"),
        (["--ckpt", "none"], "no such file: none"),
        (["--record", "/proc/x.json"], "/proc/x.json"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(sample, model_folder, tmp_path, monkeypatch, more, words):
    monkeypatch.chdir(model_folder)
    assert_refused(sample(*more), words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "more, line",
    [
        (["--num-fid-samples", "0"], "error: argument --num-fid-samples: 0 is not a whole number of at least 1"),
        pytest.param([*METHOD, "none.pt"], "error: no such file: none.pt", marks=pytest.mark.slow),
        pytest.param(["--device", "tpu"], "error: device 'tpu' cannot be used here", marks=pytest.mark.slow),
    ],
)
def test_a_refusal_under_torchrun_is_printed_once(flags, tmp_path, more, line):
    result = run("sample_ddp.py", *flags, *more, cwd=tmp_path, processes=2)
    assert result.returncode == 1
    assert (result.stdout + result.stderr).count("error: ") == result.stderr.count(line) == 1


def test_processes_with_different_flags_are_refused(flags, tmp_path):
    processes = start_ranks("sample_ddp.py", flags, [*flags, "--p-sample", "--global-seed", 3], cwd=tmp_path)
    outputs = ["".join(process.communicate(TIMEOUT)) for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert "error: process 1 differs from process 0 in sampler, seed: " in outputs[0] and outputs[0].count("\n") == 1
    assert outputs[1] == "" and not (tmp_path / "samples").exists()


# Interruptions, and what the next launch makes of them


@pytest.fixture
def long(flags):
    """The flags of a set that takes a few seconds: `COUNT` images in batches of two."""
    return [*flags, "--num-fid-samples", COUNT, "--per-proc-batch-size", 2]


@pytest.fixture(scope="module")
def undisturbed(model_folder, tmp_path_factory):
    """The file that an undisturbed run of `long` makes, as bytes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    flags = ["--ckpt", model_folder, "--device", "cpu", "--num-sampling-steps", STEPS, "--num-fid-samples", COUNT]
    assert fork("sample_ddp.py", *flags, "--per-proc-batch-size", 2, "--sample-dir", ".", cwd=folder).returncode == 0
    return only_file(folder).read_bytes()


@pytest.fixture
def finish(long, undisturbed, tmp_path):
    """Runs `long` to its end, compares its file with the undisturbed one, and returns its output."""

    def finish():
        result = fork("sample_ddp.py", *long, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert only_file(tmp_path / "samples").read_bytes() == undisturbed
        return result.stdout

    return finish


@pytest.fixture
def start_long(long, tmp_path):
    """Starts sample_ddp.py on that set, by conftest's `start`."""
    return lambda **how: start("sample_ddp.py", *long, cwd=tmp_path, **how)


def shards(tmp_path):
    """The shards in `samples`: name to a value that changes if one is written again."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in tmp_path.glob("samples/*/shards/*-*.npz")}


def output_of(process):
    """Its output until its end, on both streams."""
    return "".join(process.communicate(timeout=TIMEOUT))


def wait_for(condition, process):
    """Wait until condition() holds; fail if `process` ends before."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, output_of(process)
        time.sleep(0.002)


def wait_for_shards(tmp_path, more, process):
    """Wait until there are `more` shards than now."""
    before = len(shards(tmp_path))
    wait_for(lambda: len(shards(tmp_path)) >= before + more, process)


def workers(process):
    """The processes that torchrun started."""
    return [p for p in psutil.Process(process.pid).children(True) if "sample_ddp.py" in " ".join(p.cmdline())]


def sampled(out):
    """How many images a launch says that it sampled."""
    return int(re.search(r"^(\d+) images in", out, re.M)[1])


@pytest.mark.slow
def test_killed_at_random_moments_it_continues_with_any_processes(start_long, long, finish, tmp_path):
    """Alone, one of two, all of two, one of three; no finished image is sampled again."""
    moments = random.Random(0)
    before = {}
    for processes, victims in ((1, "all"), (2, "one"), (2, "all"), (3, "one")):
        if victims == "all":
            started = start_ranks("sample_ddp.py", *[long] * processes, cwd=tmp_path)
        else:  # torchrun ends the others
            started = [start_long(launcher=torchrun(processes))]
        wait_for_shards(tmp_path, moments.randint(1, 9), started[0])
        time.sleep(moments.random() * 0.01)
        for victim in started if victims == "all" else [moments.choice(workers(started[0]))]:
            victim.kill()
        for process in started:
            output_of(process)
            assert process.returncode
        after = shards(tmp_path)
        assert len(after) > len(before) and before.items() <= after.items()
        before = after
    out = finish()
    there = 2 * len(before)
    assert f"{there} of {COUNT} images are there from earlier launches" in out and sampled(out) == COUNT - there


@pytest.mark.slow
def test_two_machines_share_the_work_and_continue_after_the_death_of_rank_0(start_long, undisturbed, tmp_path):
    """Two torchruns on this machine, as in docs/clusters.md."""
    rendezvous = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=1"]
    launcher = ["--nnodes=2", "--nproc_per_node=1", *rendezvous, "--max-restarts=1"]
    nodes = [start_long(launcher=launcher) for _ in range(2)]
    wait_for_shards(tmp_path, 5, nodes[0])
    there = 2 * len(shards(tmp_path))
    (first,) = (p for node in nodes for p in workers(node) if p.environ()["RANK"] == "0")
    first.kill()
    outs = [output_of(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outs
    (out,) = (out for out in outs if "images in" in out)
    assert "processes: 2;" in out and sampled(out) <= COUNT - there and "Traceback" not in "".join(outs)
    assert only_file(tmp_path / "samples").read_bytes() == undisturbed


@pytest.mark.slow
def test_rank_0_samples_the_images_of_a_rank_that_died(long, undisturbed, tmp_path):
    first, second = start_ranks("sample_ddp.py", long, long, cwd=tmp_path)
    wait_for_shards(tmp_path, 6, first)
    second.kill()
    out = output_of(first)
    second.communicate()
    assert first.returncode == 0 and "other processes ended early" in out
    assert sampled(out) == COUNT and only_file(tmp_path / "samples").read_bytes() == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("number, processes", [(signal.SIGINT, None), (signal.SIGTERM, 2)])
def test_a_signal_ends_it_with_one_line_and_keeps_finished_images(start_long, finish, tmp_path, number, processes):
    process = start_long(launcher=processes and torchrun(processes))
    wait_for_shards(tmp_path, 5, process)
    process.send_signal(number)
    out = output_of(process)
    there = 2 * len(shards(tmp_path))
    (line,) = (line for line in out.splitlines() if "sample_ddp.py: " in line)
    text = re.fullmatch(
        rf"sample_ddp.py: interrupted: (\d+) of {COUNT} images are finished, the same command continues", line
    )
    # Rank 0 may print it while the other rank is still writing a batch.
    assert 10 <= there < COUNT and there - 2 * bool(processes) <= int(text[1]) <= there
    assert not list(tmp_path.glob("samples/**/.*.part"))
    if not processes:
        assert process.returncode == 130 and "Traceback" not in out
    assert sampled(finish()) == COUNT - there


@pytest.fixture
def remount(tmp_path):
    """Mounts a file system of 64 kB at tmp_path/samples; a function that gives it other options."""
    (tmp_path / "samples").mkdir()

    def mount(options):
        gc.collect()  # frees the lock of a failed launch in this process
        command = ["mount", "-t", "tmpfs", "-o", options, "none", tmp_path / "samples"]
        return subprocess.run(command, capture_output=True).returncode

    if mount("size=64k"):
        pytest.skip("mounting a file system is not allowed here")
    yield lambda options: mount(f"remount,{options}")
    gc.collect()
    subprocess.run(["umount", "--lazy", tmp_path / "samples"])


@pytest.mark.slow
def test_a_full_disk_ends_it_with_one_line_and_loses_nothing(long, finish, tmp_path, capfd, remount):
    result = call("sample_ddp.py", *long, capfd=capfd)
    there = 2 * len(shards(tmp_path))
    assert_refused(result, "No space left", f"{there} of {COUNT} images are finished, the same command continues")
    assert 0 < there < COUNT
    before = shards(tmp_path)
    assert not list(tmp_path.glob("samples/**/.*.part"))
    # Room for the shards, of a page of 4 kB each, but not for the .npz.
    remount("size=500k")
    assert_refused(call("sample_ddp.py", *long, capfd=capfd), "No space left", "the same command continues")
    assert not list(tmp_path.glob("samples/*.npz")) and not list(tmp_path.glob("samples/.*.part"))
    assert before.items() <= shards(tmp_path).items()
    remount("size=16m")
    finish()
