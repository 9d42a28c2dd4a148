"""Sample a picture from a DiT and time it, with or without a router or schedule that lets layers reuse their output.

    python sample.py --model DiT-XL/2 --num-sampling-steps 20 --ddim-sample \\
        --accelerate-method dynamiclayer --path ckpt/DDIM20_router.pt --thres 0.1
    python sample.py --ckpt ckpt/fashion_mnist --num-sampling-steps 20 --ddim-sample \\
        --accelerate-method dynamiclayer --path ckpt/fashion_mnist/DDIM20_router.pt --compare

The time is that of the diffusion loop, without loading and decoding.
"""

from runtime import cli

CFG_SCALE = 4.0  # as published for pictures


def parse_args(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    cli.add_model_arguments(parser, vae="mse").add_argument(
        "--random-weights", action="store_true", help="draw the weights from the seed: timing only, no picture"
    )
    sampling = cli.add_sampling_arguments(parser, cfg_scale=CFG_SCALE)
    sampling.add_argument(
        "--class-labels",
        type=int,
        nargs="+",
        metavar="LABEL",
        help="classes to sample, one image each; default: eight classes of ImageNet, or the first ten of a small model",
    )
    sampling.add_argument("--seed", type=cli.seed, default=0, help="seed of the noise")
    cli.add_speed_arguments(parser)
    output = parser.add_argument_group("picture and times")
    output.add_argument("--out", metavar="FILE", help="picture to write; default: Sample_NFE{n}_Method_{method}.png")
    output.add_argument("--repeats", metavar="N", type=cli.positive, default=5, help="timed runs, after a warm-up")
    output.add_argument(
        "--compare",
        action="store_true",
        help="also sample without --accelerate-method, in turn, from the same noise; the picture shows both",
    )
    output.add_argument("--save-schedule", metavar="JSON", type=cli.json_file, help="file for the schedule that ran")
    cli.add_record_argument(output, only="with --compare: ")
    args = parser.parse_args(argv)
    cli.check_sampling_arguments(parser, args)
    cli.check_speed_arguments(parser, args)
    for flag in ("compare", "save_schedule"):
        if getattr(args, flag) and not args.accelerate_method:
            parser.error(f"--{flag.replace('_', '-')} needs a router or schedule: add --accelerate-method")
    if args.record and not args.compare:
        parser.error("--record writes the figures of --compare: add --compare")
    return args


def main(args):
    """Check what can be refused early, load, sample, save the picture, report."""
    from pretrained.spec import check_labels, model_spec
    from runtime import devices
    from runtime.errors import UserError
    from runtime.files import check_outputs
    from runtime.pictures import picture_format
    from runtime.records import write_record
    from sampling import check_interval, rows_per_step
    from training.policies import schedule_of_flags

    device = devices.pick_device(args.device, cuda_graphs=args.cuda_graphs, experimental=args.experimental)
    dtype = devices.pick_dtype(args.dtype, device)
    spec = model_spec(args.model, args.image_size, args.num_classes, args.vae, args.ckpt)
    if args.random_weights and args.ckpt and spec.registered:  # a file of weights
        raise UserError("--random-weights draws the weights: leave out --ckpt, or name a model folder")
    diffusion = spec.make_process(args.num_sampling_steps, args.sampler, args.noise_scale)
    labels = args.class_labels or spec.default_labels
    check_labels(labels, spec.num_classes)
    out = args.out or f"Sample_NFE{args.num_sampling_steps}_Method_{args.accelerate_method or 'full'}.png"
    picture_format(out)
    outputs = {"--out": None if args.random_weights else out}
    outputs |= {"--record": args.record, "--save-schedule": args.save_schedule}
    check_outputs(outputs, {"--path": args.path, "--ckpt": args.ckpt})
    schedule = schedule_of_flags(args, spec, diffusion=diffusion)

    cfg_scale = spec.guidance(args.cfg_scale, CFG_SCALE, args.cfg_channels, args.cfg_interval)
    check_interval(diffusion, cfg_scale)
    dit, vae, schedule = load_models(args, spec, diffusion, schedule, cfg_scale, device, dtype)
    name = {None: "full", "dynamiclayer": "router"}.get(args.accelerate_method, "schedule")
    schedules = {name: schedule}
    if args.compare:
        schedules = {"full": None} | schedules
    latents, times, capturing = sample_in_turn(args, dit, diffusion, schedules, cfg_scale, labels, device)
    # Results are saved before they are printed: the output may be a pipe that was closed.
    images = {} if vae is None else save_images(args, vae, latents, labels, out)
    if args.compare:
        rows = {key: rows_per_step(diffusion, cfg_scale, plan, len(labels)) for key, plan in schedules.items()}
        figures = compare(dit, schedule, images or latents, times, rows) | {"dtype": dtype}
        if args.record:
            write_record(args.record, vars(args), device, figures)
    print_times(args, times, capturing)
    if images:
        print_picture(args, spec, labels, out, name)
    if args.save_schedule:
        print(f"Schedule: {args.save_schedule}")
    if args.compare:
        print_comparison(figures, name, "images" if images else "latents")


def load_models(args, spec, diffusion, schedule, cfg_scale, device, dtype):
    """Load the DiT in `dtype` and the VAE (None with --random-weights), make the schedule if its policy needs the DiT.

    Returns the DiT, the VAE and the schedule or None, which is printed, and saved with --save-schedule.
    """
    from pretrained.loading import load_dit, load_vae
    from pretrained.spec import SAMPLER_NAMES
    from runtime import devices
    from sampling import check_sampler
    from training.policies import schedule_of_flags

    if not args.sampler:
        print(f"No sampler flag: sampling with {SAMPLER_NAMES[spec.sampler()]}")
    if args.random_weights:
        print(f"Random weights from seed {args.seed}: timing only, no picture is written")
    dit = load_dit(spec, device, args.seed if args.random_weights else None)
    check_sampler(dit, cfg_scale, args.sampler == "ddpm")
    dit = devices.set_precision(dit, dtype)
    if args.experimental:
        devices.speed_up_blocks(dit.blocks, args.experimental)
    schedule = schedule or schedule_of_flags(args, dit, cfg_scale, diffusion)
    if args.compile:
        devices.compile_blocks(dit.blocks, experimental=args.experimental)
    if args.experimental:
        print(f"Experimental, measured on no GPU yet: {', '.join(args.experimental)}")
    if schedule:
        print(schedule.describe(dit.multiply_adds()))
    if args.save_schedule:
        schedule.save(args.save_schedule)
    vae = None
    if not args.random_weights:
        vae = devices.speed_up_vae(load_vae(spec, device), device, dtype, args.experimental)
    return dit, vae, schedule


def sample_in_turn(args, dit, diffusion, schedules, cfg_scale, labels, device):
    """Sample with each of `schedules` in turn, --repeats times after a warm-up.

    Returns the latents, the list of seconds, and the seconds for capturing CUDA graphs (0 without them) of each
    schedule, by its name. Raises UserError if latents are not finite.
    """
    import time
    from functools import partial

    import torch
    from tqdm import tqdm

    from runtime.devices import synchronize
    from sampling import check_finite, make_sampler

    def draw_like(x, generator):
        return torch.randn(x.shape, generator=generator, device=device)

    generator = torch.Generator().manual_seed(args.seed)  # on the CPU: the same noise on every device
    z = torch.randn(len(labels), dit.in_channels, dit.input_size, dit.input_size, generator=generator).to(device)
    y = torch.tensor(labels, device=device)
    progress, ancestral = partial(tqdm, leave=False, disable=None), args.sampler == "ddpm"
    samplers = {
        name: make_sampler(dit, diffusion, cfg_scale, schedule, ancestral, args.cuda_graphs, progress)
        for name, schedule in schedules.items()
    }
    latents, times = {}, {name: [] for name in samplers}
    for repeat in range(args.repeats + 1):
        for name, sample in samplers.items():  # in turn, so that a machine that slows down slows all of them
            # The noise of ancestral sampling is the same in every repeat.
            noise = torch.Generator(device).manual_seed(args.seed + 1)
            synchronize(device)
            start = time.perf_counter()
            latents[name] = sample(z, y, randn_like=partial(draw_like, generator=noise))
            synchronize(device)
            if repeat:
                times[name].append(time.perf_counter() - start)
            else:  # the warm-up
                check_finite(latents[name].isfinite().flatten(1).all(1, keepdim=True))
    capturing = {name: sampler.seconds if args.cuda_graphs else 0.0 for name, sampler in samplers.items()}
    return latents, times, capturing


def save_images(args, vae, latents, labels, out):
    """Decode the latents of each schedule, save all images as one picture, and return them by the schedule's name."""
    from runtime.pictures import save_picture
    from sampling import decode

    images = {name: decode(vae, some).cpu() for name, some in latents.items()}
    save_picture(list(images.values()), out, picture_columns(args, labels))
    return images


def picture_columns(args, labels):
    return min(len(labels), 10) if args.compare else 4 if len(labels) <= 8 else 10


def compare(dit, schedule, results, times, rows):
    """Return the speed-up, its bound, rates and the PSNR of --compare, as a dict for JSON.

    results: images or latents, "full" first, then those of `schedule`; times: their seconds, in the same order.
    rows: as in `speed_figures`.
    """
    import math

    import torch

    from runtime.pictures import psnr

    full, cached = results.values()
    peak = 255 if full.dtype == torch.uint8 else (full.max() - full.min()).item()
    decibels = psnr(cached, full, peak)
    # JSON has no infinity, and equal images have no finite PSNR.
    return speed_figures(dit, schedule, times, rows) | {"psnr_db": decibels if math.isfinite(decibels) else None}


def print_times(args, times, capturing):
    import statistics

    for name, seconds in times.items():
        label = f" ({name})" if args.compare else ""
        spread = statistics.stdev(seconds) if len(seconds) > 1 else 0.0
        print(f"Sampling time: {statistics.mean(seconds):.3f}±{spread:.3f}{label}")
        if args.cuda_graphs:
            print(f"Capturing the CUDA graph{label}: {capturing[name]:.3f} s, once")


def print_picture(args, spec, labels, out, name):
    if spec.class_names:
        print("Classes: " + ", ".join(spec.class_names[label] for label in labels))
    rows = f" (above without the {name}, below with it)" if args.compare else ""
    print(f"Picture: {out}{rows}")


def print_comparison(figures, name, results):
    rates, decibels = figures["g_multiply_adds_per_second"], figures["psnr_db"]
    print(f"Speed-up: {figures['speedup']:.3f}, {figures['share_of_bound']:.1%} of the bound {figures['bound']:.3f}")
    print(
        f"G multiply-adds/s: {rates['full']:.1f} full, {rates[name]:.1f} {name}; "
        f"plain matrix products of these shapes {rates['matrix_product']:.1f}"
    )
    decibels = "inf" if decibels is None else f"{decibels:.2f}"
    print(f"PSNR of the {results} with and without the {name}: {decibels} dB")


def speed_figures(dit, schedule, times, rows):
    """Speed-up, its bound and the rates of a comparison, as a dict for JSON.

    times: seconds of each repeat, {"full": [...], NAME: [...]}, measured in turn.
    rows: `rows_per_step` of both, by the same names.
    """
    import statistics

    import torch

    from runtime.devices import matmul_rate
    from schedule import Schedule

    costs, plans = dit.multiply_adds(), (Schedule.full(schedule.steps, schedule.depth), schedule)
    work = {
        name: (torch.tensor(rows[name]) * plan.multiply_adds(costs)).sum().item() for name, plan in zip(times, plans)
    }
    full, cached = work.values()
    bound = full / cached
    # Neighbouring runs share the state of the machine, so each ratio is of neighbours.
    ratio = statistics.median(full / cached for full, cached in zip(*times.values()))
    rates = {name: work[name] / statistics.median(times[name]) / 1e9 for name in times}
    batch = max(map(max, rows.values()))
    rates["matrix_product"] = matmul_rate(dit.block_linears(), batch * dit.pos_embed.shape[1]) / 1e9
    return {
        "batch": batch,
        "seconds": times,
        "speedup": ratio,
        "bound": bound,
        "share_of_bound": ratio / bound,
        "cached_share": schedule.cached_share(),
        "layers_run_per_step": schedule.compute.sum(dim=(1, 2)).tolist(),
        "g_multiply_adds_per_second": rates,
    }


if __name__ == "__main__":
    cli.run(main, parse_args(), memory_hint="fewer --class-labels")
