"""Sample a picture from a DiT, with or without a router or schedule that lets layers reuse their output, and time it.

    python sample.py --model DiT-XL/2 --num-sampling-steps 20 --ddim-sample \\
        --accelerate-method dynamiclayer --path ckpt/DDIM20_router.pt --thres 0.1
    python sample.py --ckpt ckpt/fashion_mnist --num-sampling-steps 20 --ddim-sample \\
        --accelerate-method dynamiclayer --path ckpt/fashion_mnist/DDIM20_router.pt --compare

The time is that of the diffusion loop: without loading, without decoding.
"""

from runtime import cli

CFG_SCALE = 4.0  # as published for pictures


def parse_args(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    cli.add_model_arguments(parser, vae="mse").add_argument(
        "--random-weights", action="store_true", help="weights drawn from the seed: for timing only, no picture"
    )
    sampling = cli.add_sampling_arguments(parser, cfg_scale=CFG_SCALE)
    sampling.add_argument(
        "--class-labels",
        type=int,
        nargs="+",
        metavar="LABEL",
        help="classes to sample, one image each; without it eight of ImageNet's, or a small model's all",
    )
    sampling.add_argument("--seed", type=cli.seed, default=0, help="of the noise")
    cli.add_speed_arguments(parser)
    output = parser.add_argument_group("picture and times")
    output.add_argument("--out", metavar="FILE", help="picture to write; without it Sample_NFE{n}_Method_{method}.png")
    output.add_argument("--repeats", metavar="N", type=cli.positive, default=5, help="timed runs after a warm-up")
    output.add_argument(
        "--compare",
        action="store_true",
        help="also sample without the file of --path, in turn, from the same noise; the picture shows those above",
    )
    cli.add_record_argument(output, only="with --compare: ")
    args = parser.parse_args(argv)
    cli.check_sampling_arguments(parser, args)
    if args.compare and not args.path:
        parser.error("--compare needs a router or schedule to compare with: add --accelerate-method and --path")
    if args.record and not args.compare:
        parser.error("--record keeps the figures of --compare: add that")
    if args.random_weights and args.ckpt and args.ckpt.endswith((".pt", ".safetensors")):
        parser.error("--random-weights draws the weights: leave out --ckpt, or name a model folder")
    return args


def main(args):
    import math
    import statistics
    import time
    from functools import partial

    import torch
    from tqdm import tqdm

    import sampling
    from diffusion import create_diffusion
    from pretrained.loading import load_dit, load_vae
    from pretrained.spec import check_labels, model_spec
    from router import load_schedule
    from runtime import devices, records
    from runtime.files import check_writable
    from runtime.pictures import picture_format, psnr, save_picture

    # What can be refused is refused before the weights are read.
    device = devices.pick_device(args.device, cuda_graphs=args.cuda_graphs)
    dtype = devices.pick_dtype(args.dtype, device)
    spec = model_spec(args.model, args.image_size, args.num_classes, args.vae, args.ckpt)
    labels = args.class_labels or spec.default_labels
    check_labels(labels, spec.num_classes)
    out = args.out or f"Sample_NFE{args.num_sampling_steps}_Method_{args.accelerate_method or 'full'}.png"
    picture_format(out)
    for place in filter(None, (out, args.record)):
        check_writable(place)
    schedule, _ = load_schedule(args.accelerate_method, args.path, args.thres)
    if not (args.ddim_sample or args.p_sample):
        print("Neither --ddim-sample nor --p-sample: DDIM is meant")

    if args.random_weights:
        print(f"Random weights from seed {args.seed}: the times are meant, there will be no picture")
    dit = load_dit(spec, device, args.seed if args.random_weights else None)
    cfg_scale = spec.guidance(args.cfg_scale, CFG_SCALE)
    sampling.check_sampler(dit, cfg_scale, args.p_sample)
    dit = devices.set_precision(dit, dtype)
    if args.compile:
        devices.compile_blocks(dit.blocks)
    if schedule:
        schedule.check_fits(args.path, args.num_sampling_steps, dit.depth)
        print(schedule.describe(dit.multiply_adds()))
    vae = None if args.random_weights else devices.speed_up_vae(load_vae(spec, device), device, dtype)

    diffusion = create_diffusion(args.num_sampling_steps)
    generator = torch.Generator().manual_seed(args.seed)  # on the CPU: the same noise on every device
    z = torch.randn(len(labels), dit.in_channels, dit.input_size, dit.input_size, generator=generator).to(device)
    y = torch.tensor(labels, device=device)

    cached = "schedule" if args.accelerate_method == "schedule" else "router"
    plans = {"full": None, cached: schedule} if args.compare else {cached if schedule else "full": schedule}
    progress = partial(tqdm, leave=False, disable=None)
    runs = {
        name: sampling.make_sampler(dit, diffusion, cfg_scale, plan, args.p_sample, args.cuda_graphs, progress)
        for name, plan in plans.items()
    }

    def timed(sample):
        """Latents and the seconds of their loop."""
        # The ancestral noise continues the stream of the seed, and is the same in every repeat.
        noise = torch.Generator(device).manual_seed(args.seed + 1)
        randn_like = lambda x: torch.randn(x.shape, generator=noise, device=device)  # noqa: E731
        devices.synchronize(device)
        start = time.perf_counter()
        latents = sample(z, y, randn_like=randn_like)
        devices.synchronize(device)
        return latents, time.perf_counter() - start

    latents, times = {}, {name: [] for name in runs}
    for repeat in range(args.repeats + 1):
        for name, sample in runs.items():  # in turn, so that a machine that slows down slows both
            latents[name], seconds = timed(sample)
            if repeat:  # the first run warms up
                times[name].append(seconds)
    for name in runs:
        spread = statistics.stdev(times[name]) if args.repeats > 1 else 0.0
        label = f" ({name})" if args.compare else ""
        print(f"Sampling time: {statistics.mean(times[name]):.3f}±{spread:.3f}{label}")
        if args.cuda_graphs:
            print(f"Recording the CUDA graph{label}: {runs[name].seconds:.3f} s, once")

    images = {} if args.random_weights else {name: sampling.decode(vae, latents[name]).cpu() for name in runs}
    if images:
        columns = min(len(labels), 10) if args.compare else 4 if len(labels) <= 8 else 10
        save_picture(list(images.values()), out, columns)
        if spec.class_names:
            print("Classes: " + ", ".join(spec.class_names[label] for label in labels[:columns]))
        print(f"Picture: {out}" + (f" (above without the {cached}, below with it)" if args.compare else ""))

    if args.compare:
        shown, peak = (images, 255) if images else (latents, (latents["full"].max() - latents["full"].min()).item())
        figures = compare(dit, schedule, times, batch=len(labels) * (1 if cfg_scale == 1.0 else 2))
        figures["dtype"] = dtype
        psnr = psnr(shown[cached], shown["full"], peak)
        figures["psnr_db"] = psnr if math.isfinite(psnr) else None  # JSON has no infinity, of pictures that are equal
        rates = figures["g_multiply_adds_per_second"]
        print(
            f"Speed-up: {figures['speedup']:.3f}, {figures['share_of_bound']:.1%} of the bound {figures['bound']:.3f}"
        )
        print(
            f"G multiply-adds/s: {rates['full']:.1f} full, {rates[cached]:.1f} {cached}; "
            f"plain matrix products of these shapes {rates['matrix_product']:.1f}"
        )
        print(f"PSNR of the {'images' if images else 'latents'} with and without the {cached}: {psnr:.2f} dB")
        if args.record:
            records.write_record(args.record, vars(args), device, figures)


def compare(dit, schedule, times, batch):
    """What `times` (seconds a repeat, of "full" and what is compared with it, in turn) say about a schedule, as a dict.

    batch: samples in one call of the model, the unconditional half included.
    """
    import statistics

    from runtime import devices
    from schedule import Schedule

    costs = dit.multiply_adds()
    bound = schedule.speedup_bound(costs)
    # Neighbouring runs share the state of the machine: the median of their ratios.
    ratio = statistics.median(full / cached for full, cached in zip(*times.values()))
    plans = dict(zip(times, (Schedule.full(schedule.steps, schedule.depth), schedule)))
    rates = {
        name: batch * plan.multiply_adds(costs).sum().item() / statistics.median(times[name]) / 1e9
        for name, plan in plans.items()
    }
    block, tokens = dit.blocks[0], dit.pos_embed.shape[1]
    layers = block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2
    rates["matrix_product"] = devices.matmul_rate(layers, batch * tokens) / 1e9
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
