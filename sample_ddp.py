"""Sample a set of images (50,000 for FID) into one .npz, with any number of processes and any number of interruptions.

    torchrun --nnodes=1 --nproc_per_node=8 --master_port 12345 sample_ddp.py --model DiT-XL/2 --num-sampling-steps 50 \\
        --ddim-sample --accelerate-method dynamiclayer --path ckpt/DDIM50_router.pt --thres 0.1
    python sample_ddp.py --ckpt ckpt/fashion_mnist --num-sampling-steps 20 --ddim-sample --num-fid-samples 500 \\
        --accelerate-method dynamiclayer --path ckpt/fashion_mnist/DDIM20_router.pt

Image k depends on --global-seed and k alone. Finished images are kept, so the same command continues a run that was
stopped, with any number of processes and any batch size. Several machines need a shared folder (docs/clusters.md).
"""

import argparse
import contextlib
import sys

from runtime import cli, signals

CFG_SCALE = 1.5  # as published for FID
DETERMINISTIC_BATCH = 8  # images of every batch with --deterministic; image k is always at the same place in it
FORMAT = 1  # of the manifest; raise it if the same flags no longer make the same images


def parse_args(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    cli.add_model_arguments(parser, vae="ema")
    sampling = cli.add_sampling_arguments(parser, cfg_scale=CFG_SCALE)
    sampling.add_argument("--num-fid-samples", metavar="N", type=cli.positive, default=50000, help="images of the set")
    sampling.add_argument("--global-seed", type=cli.seed, default=0, help="seed; image k depends on it and k alone")
    sampling.add_argument(
        "--balanced-labels", action="store_true", help="image k has class k modulo the classes; else classes are drawn"
    )
    sampling.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits for any number of processes and any --per-proc-batch-size: the model always runs on "
        f"{DETERMINISTIC_BATCH} images, and on a CPU in one thread per process",
    )
    speed = cli.add_speed_arguments(parser)
    speed.add_argument("--tf32", action=argparse.BooleanOptionalAction, help="--dtype tf32, or with --no-tf32 fp32")
    speed.add_argument(
        "--per-proc-batch-size", metavar="N", type=cli.positive, default=32, help="images per batch of a process"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--sample-dir", metavar="DIR", default="samples", help="folder for the .npz and its shards")
    output.add_argument("--save-to-disk", action="store_true", help="also write each image as NNNNNN.png")
    output.add_argument("--keep-shards", action="store_true", help="keep the shards, until a run without this flag")
    output.add_argument("--name", metavar="TEXT", help="not used: accepted because the original has it")
    cli.add_record_argument(output)
    args = parser.parse_args(argv)
    if args.tf32 is not None:
        if args.dtype:
            parser.error(f"--dtype {args.dtype} says the precision: leave out --tf32 and --no-tf32")
        args.dtype = "tf32" if args.tf32 else "fp32"
    cli.check_sampling_arguments(parser, args)
    cli.check_speed_arguments(parser, args)
    return args


def load(args, device, dtype):
    """Load the model's spec, its process, its DiT in `dtype`, its VAE, and the schedule of a file or None."""
    import sampling
    from pretrained.loading import load_dit, load_vae
    from pretrained.spec import model_spec
    from runtime import devices
    from training.policies import schedule_of_flags

    spec = model_spec(args.model, args.image_size, args.num_classes, args.vae, args.ckpt)
    diffusion = spec.make_process(args.num_sampling_steps, args.sampler, args.noise_scale)
    sampling.check_interval(diffusion, guidance(args, spec))
    schedule = schedule_of_flags(args, spec, diffusion=diffusion)
    dit = load_dit(spec, device)
    sampling.check_sampler(dit, guidance(args, spec), args.sampler == "ddpm")
    dit = devices.set_precision(dit, dtype)
    if args.experimental:
        devices.speed_up_blocks(dit.blocks, args.experimental)
    vae = devices.speed_up_vae(load_vae(spec, device), device, dtype, args.experimental)
    return spec, diffusion, dit, vae, schedule


def guidance(args, spec):
    return spec.guidance(args.cfg_scale, CFG_SCALE, args.cfg_channels, args.cfg_interval)


def describe(args, spec, dit, vae, schedule_entries, device, dtype):
    """The manifest: everything that determines the images, as JSON types."""
    from importlib.metadata import version

    from runtime import devices
    from runtime.hashes import fingerprint
    from sampling import scale_and_shift

    # Kernels that were chosen by their times change only last bits, as --compile does.
    experimental = [name for name in args.experimental if name != "autotune"]
    cfg_scale, machine = guidance(args, spec), devices.device_model(device)
    scale, shift = scale_and_shift(vae)
    vae_config = {"scaling_factor": scale} | ({"shift_factor": shift} if shift else {})
    return {
        "format": FORMAT,
        **{name: version(name) for name in ("torch", "diffusers", "numpy")},
        "model": fingerprint(dit, spec.settings),
        "vae": fingerprint(vae, vae_config),
        **schedule_entries,
        "images": args.num_fid_samples,
        "image_size": spec.image_size,
        "num_classes": spec.num_classes,
        "cfg_scale": float(cfg_scale),
        **cfg_scale.entries(),
        **({"noise_scale": list(args.noise_scale)} if args.noise_scale[0] != 1 else {}),
        "sampler": spec.sampler(args.sampler),
        "steps": args.num_sampling_steps,
        "seed": args.global_seed,
        "labels": "balanced" if args.balanced_labels else "uniform",
        "tf32": args.dtype != "fp32",
        "dtype": dtype if dtype in ("bf16", "fp16") else None,
        **({"experimental": experimental} if experimental else {}),
        "deterministic": args.deterministic and (f"{machine}, compiled" if args.compile else machine),
    }


def prepare(args, processes):
    """Check what can be refused, and load, on all ranks.

    Returns the device, the precision, the model's spec, its process, its DiT, its VAE and the schedule or None.
    """
    from functools import partial

    import torch

    from runtime import devices
    from runtime.files import check_outputs
    from training import policies

    # The messages that follow depend on these flags, so they are compared first.
    deciding = {"--record": bool(args.record), "--compile": args.compile, "--accelerate-method": args.accelerate_method}
    processes.check_equal(deciding)
    device = processes.run_everywhere(
        lambda: devices.pick_device(args.device, processes, args.cuda_graphs, args.experimental)
    )
    dtype = devices.pick_dtype(args.dtype, device)
    if args.deterministic:
        devices.make_deterministic(device)
        if device.type == "cpu":
            torch.set_num_threads(1)  # a sum depends on how many threads share it
    if args.record:
        inputs = {"--path": args.path, "--ckpt": args.ckpt}
        processes.run_on_main(lambda: check_outputs({"--record": args.record}, inputs))

    spec, diffusion, dit, vae, schedule = processes.run_everywhere(
        lambda: load(args, device, dtype), local_main_first=True
    )
    if schedule is None:  # rank 0 measures for all: rounding may differ from one machine to the next
        make = partial(policies.schedule_of_flags, args, dit, guidance(args, spec), diffusion)
        schedule = processes.run_on_main(make)
    if args.compile:
        processes.run_everywhere(lambda: devices.compile_blocks(dit.blocks, experimental=args.experimental))
    return device, dtype, spec, diffusion, dit, vae, schedule


def main(args):
    """Load, describe, open the set, then sample, assemble and report."""
    from evaluation.sample_set import SampleSet, set_name
    from pretrained.spec import SAMPLER_NAMES
    from runtime import records
    from runtime.processes import Processes
    from training import policies

    processes = Processes()
    processes.connect()
    device, dtype, spec, diffusion, dit, vae, schedule = prepare(args, processes)
    schedule_entries = processes.run_everywhere(lambda: policies.manifest_entries(args, schedule))
    manifest = describe(args, spec, dit, vae, schedule_entries, device, dtype)
    processes.check_equal(manifest)

    name = set_name(spec, manifest, args.ckpt, args.path)
    samples = SampleSet(args.sample_dir, name, manifest, args.save_to_disk, args.keep_shards)
    if processes.run_on_main(samples.open):
        if processes.is_main:
            samples.complete_pngs()
            print(f"{samples.npz} is there already and complete" + ("; nothing to record" if args.record else ""))
        return processes.disconnect()
    batch_size = DETERMINISTIC_BATCH if args.deterministic else args.per_proc_batch_size
    ranges = resume(samples, processes, batch_size)
    if processes.is_main:
        if not args.sampler:
            print(f"No sampler flag: sampling with {SAMPLER_NAMES[spec.sampler()]}")
        if args.experimental:
            print(f"Experimental, measured on no GPU yet: {', '.join(args.experimental)}")
        if schedule:
            print(schedule.describe(dit.multiply_adds()))
    processes.disconnect()  # from here on no rank waits for a message of another, which may be dead

    sampler = make_batch_sampler(args, dit, diffusion, schedule, guidance(args, spec), batch_size, device)
    memory_hint = None if args.deterministic else f"--per-proc-batch-size below {batch_size}"
    with errors_tell_what_is_finished(samples, memory_hint), signals.sigterm_interrupts():
        figures, digest = sample_and_assemble(samples, processes, sampler, vae, ranges, batch_size, device)
    if processes.is_main:
        if args.record:
            records.write_record(args.record, vars(args), device, {"dtype": dtype} | figures)
        report(figures)
        print(f"Samples: {samples.npz} ({samples.count} images, SHA-256 of arr_0 {digest})")


def sample_and_assemble(samples, processes, sampler, vae, ranges, batch_size, device):
    """Sample this rank's share of `ranges`; on the main process wait for the others and assemble the set.

    Returns the figures for `report` and the SHA-256 of the images, None and None on other ranks.
    """
    import time
    from functools import partial

    from tqdm import tqdm

    from evaluation.writer import SampleWriter

    # In a log file one line per minute is enough.
    pace = {} if sys.stderr.isatty() else {"delay": 60, "mininterval": 60}
    bar = partial(tqdm, smoothing=0, disable=not processes.is_main, **pace)
    finished = samples.count_finished() if processes.is_main else 0
    writer, since = SampleWriter(sampler, vae, samples.write, device), time.perf_counter()
    with bar(total=samples.count, initial=finished, unit="image") as images_bar:

        def show():
            if processes.is_main:
                images_bar.update(samples.count_finished() - images_bar.n)

        writer.run(ranges[processes.rank :: processes.size], show)
        if not processes.is_main:
            return None, None
        writer.run(samples.wait_for_others(processes.size, batch_size, show), show)
    seconds = time.perf_counter() - since
    digest = samples.assemble(partial(bar, desc="assembling", unit="shard"))
    spent = writer.seconds | {"assembling": time.perf_counter() - since - seconds}
    images = sum(stop - start for start, stop in ranges)
    return time_figures(images, seconds, spent, writer.overlaps, processes.size), digest


def resume(samples, processes, batch_size):
    """Return the ranges (start, stop) that are left to sample, after all ranks have checked the finished shards."""
    processes.run_everywhere(lambda: processes.is_main or samples.hold(processes.rank))  # rank 0 holds it by now
    finished = processes.run_on_main(samples.finished)
    damaged = processes.run_everywhere(lambda: samples.damaged(finished[processes.rank :: processes.size]))
    damaged = [shard for shards in processes.gather(damaged) for shard in shards]

    def missing():
        for start, stop in damaged:
            samples.remove(start, stop)
            print(f"the shard of images {start} to {stop - 1} is damaged: they are sampled again")
        left = samples.missing(batch_size)
        there = samples.count - sum(stop - start for start, stop in left)
        if there:
            print(f"{there} of {samples.count} images are there from earlier launches")
        samples.check_space()
        return left

    return processes.run_on_main(missing)


def make_batch_sampler(args, dit, diffusion, schedule, cfg_scale, batch_size, device):
    """Return a function (start, stop) -> latents on the device and labels on the CPU, of these images or a few more."""
    from runtime.noise import ImageNoise
    from sampling import make_sampler

    sampler = make_sampler(dit, diffusion, cfg_scale, schedule, args.sampler == "ddpm", args.cuda_graphs)
    shape = dit.in_channels, dit.input_size, dit.input_size

    def sample(start, stop):
        if args.deterministic or args.cuda_graphs or args.compile:
            stop = start + batch_size  # another size would be compiled or captured anew, or change the last bits
        noise = ImageNoise(args.global_seed, range(start, stop), shape, dit.num_classes, device, args.balanced_labels)
        return sampler(noise.z, noise.y, randn_like=noise.randn_like), noise.labels

    return sample


@contextlib.contextmanager
def errors_tell_what_is_finished(samples, memory_hint):
    """Add the number of finished images to an interruption, and to an error that is no bug of ours."""
    from runtime.errors import UserError, explain

    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        text = None if interrupted else explain(error, memory_hint)
        if text is None and not interrupted:
            raise
        finished = f"{samples.count_finished()} of {samples.count} images are finished, the same command continues"
        raise (KeyboardInterrupt(finished) if interrupted else UserError(f"{text}; {finished}")) from None


def time_figures(images, seconds, spent, overlaps, processes):
    """Where the time of rank 0 went, as a dict for the record.

    images: sampled by this launch in `seconds`; spent: seconds of rank 0 by purpose; overlaps: as in `SampleWriter`.
    """
    total = seconds + spent["assembling"]
    shares = {name: part / total for name, part in spent.items()}
    shares["other"] = max(0.0, 1 - sum(shares.values()) + (shares["decoding"] if overlaps else 0))
    rate = images / seconds
    figures = dict(processes=processes, images=images, seconds=seconds, images_per_second=rate)
    return figures | {"decoding_overlaps": overlaps, "shares": shares}


def report(figures):
    shares = figures["shares"]
    print(
        f"{figures['images']} images in {figures['seconds']:.1f} s, {figures['images_per_second']:.2f} images/s, "
        f"processes: {figures['processes']}; process 0: {shares['sampling']:.1%} sampling, "
        f"{shares['decoding']:.1%} decoding{' (beside it)' if figures['decoding_overlaps'] else ''}, "
        f"{shares['disk']:.1%} waiting for the disk, {shares['assembling']:.1%} assembling, {shares['other']:.1%} other"
    )


if __name__ == "__main__":
    cli.run(main, parse_args(), memory_hint="a smaller --per-proc-batch-size")
