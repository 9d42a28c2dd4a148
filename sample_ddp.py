"""Sample the images of an evaluation (50,000 for FID) into one .npz, by any number of processes, in several starts.

    torchrun --nnodes=1 --nproc_per_node=8 --master_port 12345 sample_ddp.py --model DiT-XL/2 --num-sampling-steps 50 \\
        --ddim-sample --accelerate-method dynamiclayer --path ckpt/DDIM50_router.pt --thres 0.1
    python sample_ddp.py --ckpt ckpt/fashion_mnist --num-sampling-steps 20 --ddim-sample --num-fid-samples 500 \\
        --accelerate-method dynamiclayer --path ckpt/fashion_mnist/DDIM20_router.pt

Image k follows --global-seed and k alone. Finished images stay, so the same command continues what was stopped, with
whatever number of processes and batch size; several machines need a folder that they share (docs/clusters.md).
"""

import re
import sys
from pathlib import Path

from runtime import cli

CFG_SCALE = 1.5  # as published for FID
DETERMINISTIC_BATCH = 8  # images of a batch with --deterministic, each always at the same place in it
FORMAT = 1  # of the manifest; raised where the same flags no longer make the same images


def parse_args(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    cli.add_model_arguments(parser, vae="ema")
    sampling = cli.add_sampling_arguments(parser, cfg_scale=CFG_SCALE)
    sampling.add_argument(
        "--num-fid-samples", metavar="N", type=cli.positive, default=50000, help="images, all processes together"
    )
    sampling.add_argument("--global-seed", type=cli.seed, default=0, help="an image follows it and its number alone")
    sampling.add_argument(
        "--balanced-labels",
        action="store_true",
        help="image k is of class k modulo the classes; without it classes are drawn uniformly",
    )
    sampling.add_argument(
        "--deterministic",
        action="store_true",
        help="not a bit depends on processes or batch size: the model always runs on "
        f"{DETERMINISTIC_BATCH} images, whatever --per-proc-batch-size, and on a CPU in one thread a process",
    )
    speed = cli.add_speed_arguments(parser)
    for flag, dtype in ("--tf32", "tf32"), ("--no-tf32", "fp32"):
        speed.add_argument(flag, dest="dtype", action="store_const", const=dtype, help=f"the same as --dtype {dtype}")
    speed.add_argument(
        "--per-proc-batch-size",
        metavar="N",
        type=cli.positive,
        default=32,
        help="images that a process samples at a time",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--sample-dir", metavar="DIR", default="samples", help="folder for the .npz and what it is made from"
    )
    output.add_argument("--save-to-disk", action="store_true", help="also write each image as NNNNNN.png")
    output.add_argument(
        "--keep-shards",
        action="store_true",
        help="leave the parts of the .npz where they are, until a start without this flag",
    )
    cli.add_record_argument(output)
    args = parser.parse_args(argv)
    cli.check_sampling_arguments(parser, args)
    return args


def load(args, device, dtype, processes):
    """The model's spec, its DiT in `dtype`, its VAE, and its schedule or None with what the manifest says of it."""
    import sampling
    from pretrained.loading import load_dit, load_vae
    from pretrained.spec import model_spec
    from router import load_schedule
    from runtime import devices

    spec = processes.run_everywhere(
        lambda: model_spec(args.model, args.image_size, args.num_classes, args.vae, args.ckpt), local_main_first=True
    )

    def read():
        # What is missing is fetched; a wrong --path is found before the weights are read.
        schedule, described = load_schedule(args.accelerate_method, args.path, args.thres)
        dit = load_dit(spec, device)
        sampling.check_sampler(dit, spec.guidance(args.cfg_scale, CFG_SCALE), args.p_sample)
        if schedule:
            schedule.check_fits(args.path, args.num_sampling_steps, dit.depth)
        dit = devices.set_precision(dit, dtype)
        if args.compile:
            devices.compile_blocks(dit.blocks)
        return dit, devices.speed_up_vae(load_vae(spec, device), device, dtype), schedule, described

    return spec, *processes.run_everywhere(read, local_main_first=True)


def describe(args, spec, dit, vae, schedule, device, dtype):
    """The manifest: all that determines the images, as JSON types; schedule: its part of it."""
    from importlib.metadata import version

    from runtime import devices
    from runtime.hashes import fingerprint

    return {
        "format": FORMAT,
        **{name: version(name) for name in ("torch", "diffusers", "timm", "numpy")},
        "model": fingerprint(dit, spec.config),
        "vae": fingerprint(vae, {"scaling_factor": vae.config.scaling_factor}),
        **schedule,
        "images": args.num_fid_samples,
        "image_size": spec.image_size,
        "num_classes": spec.num_classes,
        "cfg_scale": spec.guidance(args.cfg_scale, CFG_SCALE),
        "sampler": "ddpm" if args.p_sample else "ddim",
        "steps": args.num_sampling_steps,
        "seed": args.global_seed,
        "labels": "balanced" if args.balanced_labels else "uniform",
        "tf32": args.dtype != "fp32",
        "dtype": dtype if dtype in ("bf16", "fp16") else None,
        "deterministic": args.deterministic and devices.device_model(device) + ", compiled" * args.compile,
    }


def set_name(args, spec, manifest):
    """The name of the set: the original's rule, and what else tells runs apart. Paths in it may hold anything."""
    parts = [spec.name]
    parts += [Path(args.ckpt).stem if args.ckpt else "pretrained"] if spec.registered else []
    parts += [f"size-{spec.image_size}"]
    parts += [f"vae-{spec.vae}"] if spec.vae in ("ema", "mse") else []
    parts += [f"cfg-{manifest['cfg_scale']}", f"seed-{args.global_seed}"]
    parts += [f"{manifest['sampler']}-{args.num_sampling_steps}"]
    if args.path:
        # Of many trainings the checkpoints are named alike.
        digest = manifest["router"] or manifest["schedule"]
        parts += [args.accelerate_method, Path(args.path).stem, digest[:8]]
        parts += [f"thres-{args.thres}"] if manifest["router"] else []
    parts += ["balanced"] if args.balanced_labels else []
    parts += [manifest["dtype"]] if manifest["dtype"] else []
    parts += ["deterministic"] if args.deterministic else []
    parts += [f"n-{args.num_fid_samples}"]
    return "-".join(re.sub(r"[^\w.-]+", "-", part, flags=re.ASCII)[:40].strip("-") for part in parts)


def begin(images, processes, batch_size):
    """The ranges (start, stop) of images that are left to sample; the processes check those that are there together."""
    processes.run_everywhere(lambda: images.hold(processes.rank))
    finished = processes.run_on_main(images.finished)
    bad = processes.run_everywhere(lambda: images.damaged(finished[processes.rank :: processes.size]))
    bad = [damaged for part in processes.gather(bad) for damaged in part]

    def missing():
        images.remove(bad)
        for start, stop in bad:
            print(f"the shard of images {start} to {stop - 1} is damaged: they are sampled again")
        left = images.missing(batch_size)
        there = images.count - sum(stop - start for start, stop in left)
        if there:
            print(f"{there} of {images.count} images are there from earlier starts")
        images.check_space()
        return left

    return processes.run_on_main(missing)


def main(args):
    import time
    from functools import partial

    import torch
    from tqdm import tqdm

    from evaluation.sample_set import SampleSet
    from evaluation.writer import SampleWriter
    from runtime import devices, records
    from runtime.errors import UserError
    from runtime.files import check_writable
    from runtime.memory import out_of_memory
    from runtime.processes import Processes

    processes = Processes()
    processes.connect()
    device = processes.run_everywhere(lambda: devices.pick_device(args.device, processes, args.cuda_graphs))
    dtype = devices.pick_dtype(args.dtype, device)
    if args.deterministic:
        devices.make_deterministic(device)
        if device.type == "cpu":
            torch.set_num_threads(1)  # a sum depends on how many threads share it
    if args.record:
        processes.run_on_main(lambda: check_writable(args.record))
    spec, dit, vae, schedule, described = load(args, device, dtype, processes)
    manifest = describe(args, spec, dit, vae, described, device, dtype)
    for rank, other in enumerate(processes.gather(manifest)):
        different = [name for name in manifest if other[name] != manifest[name]]
        if different:
            raise processes.error(f"process {rank} has another {', '.join(different)} than process {processes.rank}")
    images = SampleSet(args.sample_dir, set_name(args, spec, manifest), manifest, args.save_to_disk, args.keep_shards)
    if processes.run_on_main(images.open):
        if processes.is_main:
            images.complete_pngs()
            print(f"{images.npz} is there already, complete" + ("; nothing to record" if args.record else ""))
        return processes.disconnect()
    batch_size = DETERMINISTIC_BATCH if args.deterministic else args.per_proc_batch_size
    ranges = begin(images, processes, batch_size)
    if processes.is_main:
        if not (args.ddim_sample or args.p_sample):
            print("Neither --ddim-sample nor --p-sample: DDIM is meant")
        if schedule:
            print(schedule.describe(dit.multiply_adds()))
    # From here on no process waits for a message from another, which may be dead.
    processes.disconnect()

    # In a log file a line a minute is enough, and none for what is done before.
    often = {} if sys.stderr.isatty() else {"delay": 60, "mininterval": 60}
    bar = partial(tqdm, smoothing=0, disable=not processes.is_main, **often)
    shown = bar(total=images.count, initial=images.count_finished() if processes.is_main else 0, unit="image")

    def show():
        if processes.is_main:
            shown.update(images.count_finished() - shown.n)

    sample = batch_sampler(args, dit, schedule, manifest["cfg_scale"], batch_size, device)
    pipeline, since = SampleWriter(sample, vae, images.write, device), time.perf_counter()
    try:
        with cli.sigterm_interrupts():
            pipeline.run(ranges[processes.rank :: processes.size], show)
            if not processes.is_main:
                return
            pipeline.run(wait_for_others(images, processes, batch_size, show), show)
            seconds = time.perf_counter() - since
            shown.close()
            digest = images.assemble(partial(bar, desc="assembling", unit="shard"))
    except (UserError, KeyboardInterrupt, MemoryError, RuntimeError) as error:
        shown.close()
        texts = [str(text) for text in error.args]
        if not isinstance(error, UserError | KeyboardInterrupt):
            if not out_of_memory(error):
                raise
            smaller = "" if args.deterministic else ": pass a smaller --per-proc-batch-size"
            texts = [f"{device} has too little memory for {batch_size} images at a time{smaller}"]
        texts.append(f"{images.count_finished()} of {images.count} images are finished, the same command continues")
        raise (KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError)("; ".join(texts)) from None
    spent = pipeline.seconds | {"assembling": time.perf_counter() - since - seconds}
    figures = summarise(sum(stop - start for start, stop in ranges), seconds, spent, pipeline.overlaps, processes.size)
    print(f"Samples: {images.npz} ({images.count} images, SHA-256 of arr_0 {digest})")
    if args.record:
        records.write_record(args.record, vars(args), device, {"dtype": dtype} | figures)


def batch_sampler(args, dit, schedule, cfg_scale, batch_size, device):
    """A function (start, stop) -> latents of these images on the device, and their labels on the CPU."""
    import sampling
    from diffusion import create_diffusion
    from runtime.noise import ImageNoise

    diffusion = create_diffusion(args.num_sampling_steps)
    sampler = sampling.make_sampler(dit, diffusion, cfg_scale, schedule, args.p_sample, args.cuda_graphs)
    shape = dit.in_channels, dit.input_size, dit.input_size

    def sample(start, stop):
        if args.deterministic or args.cuda_graphs or args.compile:
            # Another size would be compiled or recorded anew: images beyond a smaller batch fill it up and are dropped.
            stop = start + batch_size
        draws = ImageNoise(args.global_seed, range(start, stop), shape, dit.num_classes, device, args.balanced_labels)
        return sampler(draws.z, draws.y, randn_like=draws.randn_like), draws.labels

    return sample


def wait_for_others(images, processes, batch_size, show):
    """Returns when every image is finished: []; or when the other processes are gone: the ranges they left."""
    import time

    while images.missing(batch_size):
        if not images.others_live(processes.size):
            images.refresh()
            left = images.missing(batch_size)
            if left:
                print("other processes ended early: their images are sampled by this one")
            return left
        show()
        time.sleep(0.2)
    return []


def summarise(images, seconds, spent, overlaps, processes):
    """Says where the time of this process went, and returns it as a dict.

    images: how many this start sampled, in `seconds`; spent: seconds by what they were spent on, assembling included;
    overlaps: whether images were decoded beside the sampling of others.
    """
    total = seconds + spent["assembling"]
    shares = {name: part / total for name, part in spent.items()}
    shares["other"] = max(0.0, 1 - sum(shares.values()) + (shares["decoding"] if overlaps else 0))
    print(
        f"{images} images in {seconds:.1f} s, {images / seconds:.2f} images/s, processes: {processes}; "
        f"process 0: {shares['sampling']:.1%} sampling, {shares['decoding']:.1%} decoding"
        f"{' (beside it)' if overlaps else ''}, {shares['disk']:.1%} waiting for the disk, "
        f"{shares['assembling']:.1%} assembling, {shares['other']:.1%} other"
    )
    return {
        "processes": processes,
        "images": images,
        "seconds": seconds,
        "images_per_second": images / seconds,
        "shares": shares,
    }


if __name__ == "__main__":
    cli.run(main, parse_args(), memory_hint="a smaller --per-proc-batch-size")
