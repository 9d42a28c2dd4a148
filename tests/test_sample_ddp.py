"""sample_ddp.py as a user types it: alone, under torchrun, on two machines, killed, on a full disk."""

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

import numpy as np
import psutil
import pytest
import torch
from conftest import assert_refused, call, fork, free_port, start, start_ranks, torchrun
from PIL import Image
from torch._dynamo.utils import counters

import sampling
from diffusion import create_diffusion
from evaluation.sample_set import SampleSet
from pretrained.loading import load_dit, load_vae
from pretrained.spec import model_spec
from router import Router
from runtime import devices
from schedule import Schedule

METHOD = ["--accelerate-method", "dynamiclayer", "--thres", 0.5, "--path"]
SCHEDULE = ["--accelerate-method", "schedule", "--path"]
COUNT, TIMEOUT = 240, 120  # images of a set that is disturbed, seconds
SCALE, STEPS = 2.0, 4  # the model folder's guidance


@pytest.fixture
def flags(model_folder, tmp_path):
    """The flags of a small set: 23 images of the model folder, four steps, into tmp_path/samples."""
    return ["--ckpt", model_folder, "--device", "cpu", "--num-sampling-steps", STEPS, "--num-fid-samples", 23] + [
        *("--sample-dir", tmp_path / "samples")
    ]


@pytest.fixture
def sample(flags, capfd):
    """Runs sample_ddp.py on that set in this process; further flags win."""
    threads = torch.get_num_threads()
    yield lambda *more: call("sample_ddp.py", *flags, *more, capfd=capfd)
    torch.set_num_threads(threads)


def the_set(folder):
    """The arrays of the one .npz in `folder`, which holds nothing else."""
    (path,) = folder.glob("*")
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def expected(model_folder, indices, labels=None, router=None, ancestral=False, scale=SCALE, seed=0):
    """The images `indices` by the documented rules, one at a time, with NumPy's and the sampler's own functions."""
    spec = model_spec(ckpt=str(model_folder))
    dit, vae = load_dit(spec, "cpu"), load_vae(spec, "cpu")
    schedule = Router.load(router).schedule(0.5) if router else None
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


def test_image_k_is_what_its_own_stream_makes_it(sample, model_folder, tmp_path):
    result = sample("--ddim-sample", "--per-proc-batch-size", 7)
    assert result.returncode == 0, result.stderr
    got = the_set(tmp_path / "samples")
    images, labels = expected(model_folder, range(23))
    assert got["labels"].dtype == np.int64 and np.array_equal(got["labels"], labels)
    assert_close(got["arr_0"], images)
    manifest = json.loads(str(got["manifest"]))
    assert (manifest["images"], manifest["cfg_scale"], manifest["seed"], manifest["router"]) == (23, 2.0, 0, None)
    digest = hashlib.sha256(got["arr_0"].tobytes()).hexdigest()
    assert f"(23 images, SHA-256 of arr_0 {digest})" in result.stdout
    shares = re.findall(r"(\S+)% (?:sampling|decoding|waiting for the disk|assembling|other)", result.stdout)
    assert len(shares) == 5 and sum(map(float, shares)) == pytest.approx(100, abs=0.3)
    assert "Sampling" not in result.stderr and "Traceback" not in result.stderr


def test_compiled_blocks_see_one_batch_size(sample, model_folder, tmp_path, monkeypatch):
    """23 images in batches of 8: the last has 7, and would compile four more graphs."""
    monkeypatch.setattr(devices, "compile_blocks", functools.partial(devices.compile_blocks, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    result = sample("--compile", "--per-proc-batch-size", 8, *METHOD, model_folder / "router4.pt")
    assert result.returncode == 0, result.stderr
    assert 0 < counters["stats"]["unique_graphs"] <= 4
    images, labels = expected(model_folder, range(0, 23, 11), router=model_folder / "router4.pt")
    got = the_set(tmp_path / "samples")
    assert np.array_equal(got["labels"][::11], labels)
    assert_close(got["arr_0"][::11], images)


@pytest.mark.parametrize(
    "more, options",
    [
        (["--cfg-scale", "1.0"], {"scale": 1.0}),
        (["--p-sample"], {"ancestral": True}),
        (["--p-sample", "--cfg-scale", "1"], {"ancestral": True, "scale": 1.0}),
        (["--balanced-labels"], {"labels": [k % 5 for k in range(23)]}),
        (["--global-seed", "7"], {"seed": 7}),
        (["--deterministic"], {}),
        (METHOD, {"router": "router4.pt"}),
        ([*METHOD[:-1], "--p-sample", "--path"], {"router": "router4.pt", "ancestral": True}),
    ],
)
def test_other_ways_of_sampling(sample, model_folder, tmp_path, more, options):
    if "router" in options:
        options = options | {"router": model_folder / options["router"]}
        more = [*more, options["router"]]
    result = sample(*more)
    assert result.returncode == 0, result.stderr
    got = the_set(tmp_path / "samples")
    images, labels = expected(model_folder, range(0, 23, 6), **options)
    assert np.array_equal(got["labels"][::6], labels)
    assert_close(got["arr_0"][::6], images)


def test_a_schedule_file_makes_what_the_router_of_that_plan_makes(flags, sample, model_folder, tmp_path):
    """By two processes; the plan is in the manifest and the name, no threshold is."""
    assert sample(*METHOD, model_folder / "router4.pt", "--sample-dir", tmp_path / "router").returncode == 0
    schedule = Router.load(model_folder / "router4.pt").schedule(0.5)
    schedule.save(tmp_path / "plan.pt")
    result = fork("sample_ddp.py", *flags, *SCHEDULE, tmp_path / "plan.pt", cwd=tmp_path, processes=2)
    assert result.returncode == 0, result.stderr
    got, same = the_set(tmp_path / "samples"), the_set(tmp_path / "router")
    assert np.array_equal(got["labels"], same["labels"])
    assert_close(got["arr_0"], same["arr_0"])
    assert_close(got["arr_0"][::6], expected(model_folder, range(0, 23, 6), router=model_folder / "router4.pt")[0])
    ours, theirs = (json.loads(str(arrays["manifest"])) for arrays in (got, same))
    digest = hashlib.sha256(schedule.compute.numpy().tobytes()).hexdigest()
    assert {name for name in ours if ours[name] != theirs[name]} == {"router", "threshold", "schedule"}
    assert (ours["schedule"], ours["router"], ours["threshold"]) == (digest, None, None)
    assert (theirs["schedule"], theirs["threshold"]) == (None, 0.5)
    (npz,) = (tmp_path / "samples").iterdir()
    assert npz.name == f"tiny-size-8-cfg-2.0-seed-0-ddim-4-schedule-plan-{digest[:8]}-n-23.npz"
    Schedule.every_nth(4, 3, 2).save(tmp_path / "plan.pt")  # another plan of the same name is another set
    assert sample(*SCHEDULE, tmp_path / "plan.pt").returncode == 0
    assert len(list((tmp_path / "samples").iterdir())) == 2


def test_a_set_of_before_there_were_schedule_files_stays_valid(sample, model_folder, tmp_path):
    """Its manifest says nothing of a schedule."""
    from evaluation.npz import write_npz

    command = [*METHOD, model_folder / "router4.pt"]
    assert sample(*command).returncode == 0
    (npz,) = (tmp_path / "samples").iterdir()
    arrays = the_set(tmp_path / "samples")
    manifest = json.loads(str(arrays["manifest"]))
    assert manifest.pop("schedule", 0) is None
    with npz.open("wb") as file:
        write_npz(file, **arrays | {"manifest": np.array(json.dumps(manifest))})
    assert "is there already, complete" in sample(*command).stdout


def test_guidance_of_1_does_not_double_the_batch(sample, monkeypatch):
    from models import DiT

    sizes, denoise = [], DiT.denoise
    monkeypatch.setattr(DiT, "denoise", lambda self, x, *more: sizes.append(len(x)) or denoise(self, x, *more))
    for scale in ("1", "1.5"):
        assert sample("--cfg-scale", scale, "--per-proc-batch-size", 10).returncode == 0
    assert sizes == [10] * 4 + [10] * 4 + [3] * 4 + [20] * 4 + [20] * 4 + [6] * 4


def test_any_processes_and_batch_size_make_the_same_set(flags, sample, model_folder, tmp_path):
    """World sizes 1, 2 and 3, batches of 7 and 32; with --deterministic the same bits."""
    sets = {}
    for processes, size, more in (
        (None, 7, []),
        (2, 32, []),
        (None, 32, ["--deterministic"]),
        (3, 7, ["--deterministic"]),
    ):
        folder = tmp_path / f"{processes} {size} {len(more)}"
        command = [*flags, "--sample-dir", folder, "--per-proc-batch-size", size, *more]
        command += [*METHOD, model_folder / "router4.pt"]
        if processes:
            result = fork("sample_ddp.py", *command, cwd=tmp_path, processes=processes)
        else:
            torch.set_num_threads(2)  # where those of torchrun have one
            result = sample(*command)
        assert result.returncode == 0, result.stderr
        assert "23 images in" in result.stdout and f"processes: {processes or 1};" in result.stdout
        sets[processes, size, len(more)] = the_set(folder)
    first, *others = sets.values()
    for other in others:
        assert np.array_equal(other["labels"], first["labels"])
        assert_close(other["arr_0"], first["arr_0"])
    bits = {hashlib.sha256(s["arr_0"].tobytes()).digest() for key, s in sets.items() if key[2]}
    assert len(bits) == 1


def test_the_name_tells_runs_apart_and_paths_may_hold_anything(sample, model_folder, tmp_path):
    odd = tmp_path / "a folder" / "routér: 100%.v2"
    odd.parent.mkdir()
    shutil.copy(model_folder / "router4.pt", odd)
    Router(4, 3).save(tmp_path / "router4.pt")  # another one of the same name
    for more in (
        [],
        [*METHOD, odd],
        [*METHOD, model_folder / "router4.pt"],
        [*METHOD, tmp_path / "router4.pt"],
        [*METHOD[:3], 0.25, "--path", odd],
        ["--cfg-scale", 3],
        ["--global-seed", 1],
        ["--balanced-labels"],
        ["--deterministic"],
        ["--p-sample"],
        ["--num-fid-samples", 2],
    ):
        assert sample("--num-fid-samples", 1, *more).returncode == 0
    made = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert len(made) == 11
    assert "tiny-size-8-cfg-2.0-seed-0-ddim-4-n-1.npz" in made
    assert any(
        re.fullmatch(r"tiny-size-8-.*-ddim-4-dynamiclayer-rout-r-100-[0-9a-f]{8}-thres-0.25-n-1.npz", n) for n in made
    )
    assert all(re.fullmatch(r"[\w.-]+", name, re.ASCII) for name in made)


def test_weights_and_vae_are_in_the_name_of_a_registered_model():
    from sample_ddp import parse_args, set_name

    args = parse_args(["--ckpt", "runs/3/ema last.pt", "--num-sampling-steps", "50"])
    spec = model_spec(args.model, args.image_size, args.num_classes, args.vae, args.ckpt)
    manifest = {"cfg_scale": 1.5, "sampler": "ddim", "router": None, "dtype": None}
    name = set_name(args, spec, manifest)
    assert name == "DiT-XL-2-ema-last-size-256-vae-ema-cfg-1.5-seed-0-ddim-50-n-50000"
    args.ckpt = None
    assert set_name(args, spec, manifest).startswith("DiT-XL-2-pretrained-")


def test_pngs_and_the_set_hold_the_same_pixels(sample, tmp_path):
    for more in (["--save-to-disk"], ["--save-to-disk", "--num-fid-samples", 9, "--per-proc-batch-size", 4]):
        assert sample(*more).returncode == 0
    for folder in (path for path in (tmp_path / "samples").iterdir() if path.is_dir()):
        images = np.load(f"{folder}.npz")["arr_0"]
        assert sorted(path.name for path in folder.iterdir()) == [f"{k:06d}.png" for k in range(len(images))]
        for k, image in enumerate(images):
            assert np.array_equal(np.asarray(Image.open(folder / f"{k:06d}.png")), image)
    # What is complete can have its PNGs later.
    one = next((tmp_path / "samples").glob("*-n-9"))
    shutil.rmtree(one)
    result = sample("--save-to-disk", "--num-fid-samples", 9)
    assert "is there already, complete" in result.stdout and len(list(one.iterdir())) == 9


def test_a_set_in_lower_precision_has_a_name_of_its_own(sample, tmp_path):
    for flags in ([], ["--dtype", "bf16"]):
        assert sample(*flags).returncode == 0
    plain, lower = sorted((tmp_path / "samples").iterdir(), key=lambda path: "bf16" in path.name)
    assert lower.stem == plain.stem.replace("-n-23", "-bf16-n-23")
    plain, lower = (np.load(path)["arr_0"].astype(int) for path in (plain, lower))
    assert 0 < abs(plain - lower).mean() < 8


@pytest.mark.parametrize("flag", ["--ddim-sample", "--p-sample"])
def test_recorded_trajectories_make_the_same_images(sample, flag, tmp_path, monkeypatch):
    """With what a CPU has for a CUDA graph; 23 images are three full batches and one that is filled up."""
    device = devices.pick_device("cpu")
    monkeypatch.setattr(devices, "pick_device", lambda *_: device)
    arrays = []
    for k, more in enumerate(([], ["--cuda-graphs"])):
        folder = tmp_path / str(k)
        result = sample(flag, "--per-proc-batch-size", 7, *more, "--sample-dir", folder)
        assert result.returncode == 0, result.stderr
        arrays.append(the_set(folder)["arr_0"].astype(int))
    assert arrays[0].shape == arrays[1].shape and abs(arrays[0] - arrays[1]).max() <= 1


def test_a_finished_set_is_not_made_again_and_what_else_it_depends_on_is_compared(sample, model_folder, tmp_path):
    assert sample().returncode == 0
    (npz,) = (tmp_path / "samples").iterdir()
    before = npz.stat().st_mtime_ns, npz.stat().st_ino
    result = sample("--per-proc-batch-size", 3)
    assert result.returncode == 0 and f"{npz} is there already, complete" in result.stdout
    assert_refused(sample("--no-tf32"), "tf32 was true, now it is false", "--sample-dir")
    assert (npz.stat().st_mtime_ns, npz.stat().st_ino) == before and [npz] == list((tmp_path / "samples").iterdir())


# What happens to a start, and what the next one makes of it.


@pytest.fixture
def long(flags):
    """The flags of a set that takes a few seconds: `COUNT` images in batches of two."""
    return [*flags, "--num-fid-samples", COUNT, "--per-proc-batch-size", 2]


@pytest.fixture
def undisturbed(long, tmp_path, capfd):
    """The file that an undisturbed run of `long` makes, as bytes."""
    assert call("sample_ddp.py", *long, "--sample-dir", tmp_path / "undisturbed", capfd=capfd).returncode == 0
    (path,) = (tmp_path / "undisturbed").iterdir()
    return path.read_bytes()


def result_of(tmp_path):
    """The bytes of the one .npz of a folder `samples` that holds nothing else."""
    (path,) = (tmp_path / "samples").iterdir()
    return path.read_bytes()


def finished(tmp_path):
    """The shards in `samples`: name to what changes when one is written again."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in tmp_path.glob("samples/*/shards/*-*.npz")}


@pytest.fixture
def start_long(long, tmp_path):
    """Starts sample_ddp.py on that set, by conftest's `start`."""
    return lambda *more, **how: start("sample_ddp.py", *long, *more, cwd=tmp_path, **how)


def all_of(process):
    """What it said until its end, on both streams."""
    return "".join(process.communicate(timeout=TIMEOUT))


def wait_for(condition, process):
    """Until condition() holds; fails where `process` ends before."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, all_of(process)
        time.sleep(0.002)


def wait_for_shards(tmp_path, more, process):
    """Until `more` shards than now are there."""
    there = len(finished(tmp_path))
    wait_for(lambda: len(finished(tmp_path)) >= there + more, process)


def workers(process):
    """The processes that torchrun started."""
    return [p for p in psutil.Process(process.pid).children(True) if "sample_ddp.py" in " ".join(p.cmdline())]


def sampled(out):
    """How many images a start says that it sampled."""
    return int(re.search(r"^(\d+) images in", out, re.M)[1])


def test_killed_at_random_moments_it_continues_with_any_processes(start_long, long, undisturbed, tmp_path, capfd):
    """Alone, one of two, all of two, one of three: then one undisturbed start makes the same file."""
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
            all_of(process)
            assert process.returncode
        after = finished(tmp_path)
        assert len(after) > len(before) and all(after[name] == before[name] for name in before)
        before = after
    result = call("sample_ddp.py", *long, "--keep-shards", capfd=capfd)
    assert result.returncode == 0, result.stderr
    after = finished(tmp_path)
    assert all(after[name] == before[name] for name in before) and len(after) == COUNT // 2
    there = 2 * len(before)
    assert f"{there} of {COUNT} images are there from earlier starts" in result.stdout
    assert sampled(result.stdout) == COUNT - there
    assert next(tmp_path.glob("samples/*.npz")).read_bytes() == undisturbed


def test_killed_while_assembling_it_leaves_no_file_and_continues(flags, tmp_path, capfd):
    command = [*flags, "--num-fid-samples", 600, "--per-proc-batch-size", 1]
    process = start("sample_ddp.py", *command, cwd=tmp_path)
    wait_for_shards(tmp_path, 1, process)
    process.kill()
    process.communicate()
    # The rest is made up, so that assembling takes long enough to be met.
    shards = next(tmp_path.glob("samples/*/shards"))
    samples = SampleSet(shards.parent.parent, shards.parent.name, json.loads((shards / "manifest.json").read_text()))
    images = np.random.default_rng(0).integers(0, 256, (600, 8, 8, 3), dtype=np.uint8)
    for number in range(600):
        samples.write(number, images[number : number + 1], np.array([number]))
    process = start("sample_ddp.py", *command, cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("samples/.*.npz.*.part")), process)
    process.kill()
    process.communicate()
    assert not list(tmp_path.glob("samples/*.npz")) and len(finished(tmp_path)) == 600
    result = call("sample_ddp.py", *command, capfd=capfd)
    assert result.returncode == 0, result.stderr
    got = the_set(tmp_path / "samples")
    assert np.array_equal(got["arr_0"], images) and np.array_equal(got["labels"], np.arange(600))


def test_two_machines_share_the_work_and_go_on_when_one_of_them_dies(start_long, undisturbed, tmp_path):
    """Two agents on one machine, as in docs/clusters.md; the first process dies once."""
    rendezvous = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=1"]
    launcher = ["--nnodes=2", "--nproc_per_node=1", *rendezvous, "--max-restarts=1"]
    nodes = [start_long(launcher=launcher) for _ in range(2)]
    wait_for_shards(tmp_path, 5, nodes[0])
    there = 2 * len(finished(tmp_path))
    (first,) = (p for node in nodes for p in workers(node) if p.environ()["RANK"] == "0")
    first.kill()
    outs = [all_of(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outs
    (out,) = (out for out in outs if "images in" in out)
    assert "processes: 2;" in out and sampled(out) <= COUNT - there and "Traceback" not in "".join(outs)
    assert result_of(tmp_path) == undisturbed


def test_nobody_waits_for_a_process_that_died(long, undisturbed, tmp_path):
    first, second = start_ranks("sample_ddp.py", long, long, cwd=tmp_path)
    wait_for_shards(tmp_path, 6, first)
    second.kill()
    out = all_of(first)
    second.communicate()
    assert first.returncode == 0 and "other processes ended early" in out
    assert sampled(out) == COUNT and result_of(tmp_path) == undisturbed


def test_processes_with_other_flags_refuse_to_work_together(long, tmp_path):
    processes = start_ranks("sample_ddp.py", long, [*long, "--p-sample", "--global-seed", 3], cwd=tmp_path)
    outs = [all_of(process) for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert outs[0].splitlines() == ["sample_ddp.py: error: process 1 has another sampler, seed than process 0"]
    assert outs[1] == "" and not (tmp_path / "samples").exists()


@pytest.mark.parametrize("number, processes", [(signal.SIGINT, None), (signal.SIGTERM, 2)])
def test_a_signal_stops_it_in_one_line_and_keeps_what_is_finished(
    start_long, long, undisturbed, tmp_path, capfd, number, processes
):
    process = start_long(launcher=processes and torchrun(processes))
    wait_for_shards(tmp_path, 5, process)
    process.send_signal(number)
    out = all_of(process)
    there = 2 * len(finished(tmp_path))
    (line,) = (line for line in out.splitlines() if "sample_ddp.py: " in line)
    said = re.fullmatch(
        rf"sample_ddp.py: interrupted: (\d+) of {COUNT} images are finished, the same command continues", line
    )
    # The first process says it while the other may still be writing a batch.
    assert 10 <= there < COUNT and there - 2 * bool(processes) <= int(said[1]) <= there
    assert not list(tmp_path.glob("samples/**/.*.part"))
    if not processes:
        assert process.returncode == 130 and "Traceback" not in out
        return
    again = call("sample_ddp.py", *long, capfd=capfd)
    assert sampled(again.stdout) == COUNT - there
    assert result_of(tmp_path) == undisturbed


def test_a_second_start_at_the_same_time_is_refused(start_long, long, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(SampleSet, "PATIENCE", 0.1)
    process = start_long("--num-fid-samples", 2000)
    try:
        wait_for_shards(tmp_path, 1, process)
        assert_refused(call("sample_ddp.py", *long, "--num-fid-samples", 2000, capfd=capfd), "in use", "tiny-size-8")
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_a_damaged_shard_is_sampled_again_and_said(start_long, long, undisturbed, tmp_path, capfd):
    process = start_long()
    wait_for_shards(tmp_path, 8, process)
    process.kill()
    process.communicate()
    before = finished(tmp_path)
    path = next(tmp_path.glob("samples/*/shards/0000004-0000006.npz"))
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    result = call("sample_ddp.py", *long, capfd=capfd)
    assert "the shard of images 4 to 5 is damaged: they are sampled again" in result.stdout
    assert sampled(result.stdout) == COUNT - 2 * len(before) + 2
    assert result_of(tmp_path) == undisturbed


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB at tmp_path/samples; a function that mounts it again with other options."""
    (tmp_path / "samples").mkdir()

    def mount(options):
        return subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", tmp_path / "samples"], capture_output=True
        )

    if mount("size=64k").returncode:
        pytest.skip("mounting a file system is not allowed here")

    def remount(options):
        gc.collect()  # a start in this process that failed has its lock until then
        return mount(f"remount,{options}")

    yield remount
    gc.collect()
    subprocess.run(["umount", "--lazy", tmp_path / "samples"])


def test_a_full_disk_stops_it_in_one_line_and_loses_nothing(long, undisturbed, tmp_path, capfd, small_disk):
    result = call("sample_ddp.py", *long, capfd=capfd)
    there = 2 * len(finished(tmp_path))
    assert_refused(result, "No space left", f"{there} of {COUNT} images are finished, the same command continues")
    assert 0 < there < COUNT
    before = finished(tmp_path)
    assert not list(tmp_path.glob("samples/**/.*.part"))
    # Room for the shards, none for the file that they become: each takes a page of 4 kB.
    small_disk("size=500k")
    assert_refused(call("sample_ddp.py", *long, capfd=capfd), "No space left", "the same command continues")
    assert not list(tmp_path.glob("samples/*.npz")) and not list(tmp_path.glob("samples/.*.part"))
    assert before.items() <= finished(tmp_path).items()
    small_disk("size=16m")
    assert call("sample_ddp.py", *long, capfd=capfd).returncode == 0
    assert result_of(tmp_path) == undisturbed


def test_a_folder_that_cannot_be_written_is_refused(sample, small_disk, tmp_path):
    small_disk("ro")
    assert_refused(sample(), "cannot write into", "Read-only", "--sample-dir")
    (tmp_path / "file").write_text("mine")
    assert_refused(sample("--sample-dir", tmp_path / "file"), "cannot write into", "--sample-dir")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "more, words",
    [
        (["--num-fid-samples", "0"], "--num-fid-samples"),
        (["--per-proc-batch-size", "x"], "--per-proc-batch-size"),
        (["--global-seed", "-1"], "--global-seed"),
        (["--cfg-scale", "inf"], "finite"),
        (["--path", "x.pt"], "--accelerate-method"),
        (["--accelerate-method", "dynamiclayer"], "--path"),
        (["--accelerate-method", "schedule"], "--path"),
        ([*SCHEDULE, "ROUTER"], "is not a schedule file"),
        (["--accelerate-method", "dynamiclayer", "--path", "none.pt"], "no such file: none.pt"),
        (["--ddim-sample", "--p-sample"], "--p-sample"),
        (["--ckpt", "none"], "no such file: none"),
        (["--num-sampling-steps", "5", "--accelerate-method", "dynamiclayer", "--path", "ROUTER"], "4 steps"),
        (["--record", "/proc/x.json"], "/proc/x.json"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(sample, model_folder, tmp_path, more, words):
    more = [model_folder / "router4.pt" if flag == "ROUTER" else flag for flag in more]
    assert_refused(sample(*more), words)
    assert not list(tmp_path.iterdir())


def test_the_record_holds_the_times_and_their_circumstances(sample, tmp_path):
    assert sample("--record", tmp_path / "r.json").returncode == 0
    record = json.loads((tmp_path / "r.json").read_text())
    assert (record["images"], record["processes"], record["flags"]["num_fid_samples"]) == (23, 1, 23)
    assert record["images_per_second"] == pytest.approx(23 / record["seconds"])
    assert sum(record["shares"].values()) == pytest.approx(1) and all(s >= 0 for s in record["shares"].values())
