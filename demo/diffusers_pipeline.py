"""Run diffusers' DiTPipeline with and without a policy: a picture, the time of a call, and the error of the latents.

python -m demo.diffusers_pipeline                 # facebook/DiT-XL-2-256 and the released 20-step router
python -m demo.diffusers_pipeline --tiny          # a small random model, to see it run
python -m demo.diffusers_pipeline --pipeline ckpt/fashion_mnist --scheduler dpm++ --accelerate-method fora \\
    --interval 3 --forecast 2                     # every third step of DPM-Solver++, with forecasts
"""

from runtime import cli

# Those with which DiTPipeline works: it does not scale its noise, as Euler's needs.
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
LABELS = [207, 992, 387, 974]


def parse_args(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    name = "Hub name or folder of a DiTPipeline, or a model folder"
    parser.add_argument("--pipeline", default="facebook/DiT-XL-2-256", help=name)
    parser.add_argument("--tiny", action="store_true", help="a random model that reuses all layers every second step")
    parser.add_argument("--scheduler", choices=SCHEDULERS, help="of diffusers; default: that of the pipeline")
    steps = "denoising steps; default: those of the file in --path, else 20"
    parser.add_argument("--num-sampling-steps", metavar="N", type=cli.sampling_steps, help=steps)
    labels = f"one per image; default: {' '.join(map(str, LABELS))}, or of a small set all, at most 10"
    parser.add_argument("--class-labels", type=int, nargs="+", metavar="LABEL", help=labels)
    parser.add_argument("--guidance-scale", type=cli.finite, default=4.0, help="1 is no guidance")
    channels = "channels that are guided; default: all, or those of a model folder"
    parser.add_argument("--cfg-channels", metavar="N", type=cli.positive, help=channels)
    parser.add_argument("--seed", type=cli.seed, default=0, help="seed of the noise")
    parser.add_argument("--repeats", metavar="N", type=cli.positive, default=1, help="timed calls of each, in turn")
    parser.add_argument("--out", default="diffusers_pipeline.png", help="picture, rows of the policy below")
    cli.add_record_argument(parser)
    cli.add_method_arguments(parser)
    args = parser.parse_args(argv)
    cli.check_method_arguments(parser, args, alone="path")
    if args.accelerate_method is None and args.path is None:
        args.accelerate_method, args.path, args.interval = (
            ("fora", None, 2) if args.tiny else ("dynamiclayer", "ckpt/DDIM20_router.pt", None)
        )
    if args.thres != parser.get_default("thres") and args.accelerate_method != "dynamiclayer":
        parser.error(f"--thres {args.thres:g} is for a router: add --accelerate-method dynamiclayer --path FILE")
    return args


def tiny_pipeline():
    """A DiTPipeline with a small random model: 1000 classes, 16 pixels per side."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    from models import DiT
    from pretrained.diffusers_layout import to_diffusers

    torch.manual_seed(0)
    dit = DiT(input_size=8, hidden_size=128, depth=6, num_heads=4, frequency_shift=1)
    for name, parameter in dit.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(parameter, std=0.1)  # a fresh DiT outputs 0
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    vae = AutoencoderKL(**blocks, block_out_channels=[8, 8], latent_channels=4, norm_num_groups=4)
    return DiTPipeline(to_diffusers(dit), vae, DDIMScheduler(beta_start=1e-4, clip_sample=False))  # betas as published


def policy_of(args):
    """The policy of the flags, and its settings, for `accelerate`."""
    if args.accelerate_method is None:
        return args.path, {}
    setting, _ = cli.METHODS[args.accelerate_method]
    settings = {setting: getattr(args, setting)}
    if args.accelerate_method == "dynamiclayer":
        settings |= {"threshold": args.thres}
    if args.accelerate_method == "smoothcache":
        settings |= {"cfg_scale": args.guidance_scale}
    return args.accelerate_method, settings


def make_pipeline(args, device):
    """The pipeline of the flags, on the device. Raises UserError if its model cannot be loaded."""
    import diffusers

    from pretrained.diffusers_pipeline import load_pipeline
    from pretrained.spec import check_labels

    pipe = tiny_pipeline() if args.tiny else load_pipeline(args.pipeline, args.cfg_channels)
    if args.scheduler:
        pipe.scheduler = getattr(diffusers, SCHEDULERS[args.scheduler]).from_config(pipe.scheduler.config)
    classes = pipe.transformer.config.num_embeds_ada_norm
    args.class_labels = args.class_labels or (LABELS if max(LABELS) < classes else list(range(min(classes, 10))))
    check_labels(args.class_labels, classes)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def sample(pipe, args, device):
    """One call of the pipeline, as a dict.

    images: uint8 (N, H, W, 3); latents: float32 (N, C, h, w) on the CPU; loop, call: seconds of the denoising loop, and
    of the call with decoding.
    """
    import time

    import torch

    from runtime import devices

    decode, found = pipe.vae.decode, {}

    def timed_decode(latents, *more, **others):
        devices.synchronize(device)
        found["loop"] = time.perf_counter() - start
        found["latents"] = (latents * pipe.vae.config.scaling_factor).float().cpu()
        return decode(latents, *more, **others)

    noise = torch.Generator().manual_seed(args.seed)
    devices.synchronize(device)
    start, pipe.vae.decode = time.perf_counter(), timed_decode
    try:
        images = pipe(args.class_labels, args.guidance_scale, noise, args.num_sampling_steps, output_type="np").images
    finally:
        del pipe.vae.decode
    found["call"] = time.perf_counter() - start
    return found | {"images": torch.from_numpy((255 * images).round().astype("uint8"))}


def compare(pipe, args, device):
    """Run both in turn: the results of the last calls as dicts of `sample`, and the figures for a record."""
    import statistics

    from pretrained.diffusers_pipeline import accelerate
    from runtime.pictures import psnr

    policy, settings = policy_of(args)
    acceleration = accelerate(pipe, policy, args.forecast, args.cfg_channels, **settings)
    accelerated, fixed = pipe.transformer, acceleration.schedule
    args.num_sampling_steps = args.num_sampling_steps or (fixed.steps if fixed else 20)
    acceleration.disable()
    transformers = {"full": pipe.transformer, args.accelerate_method or "file": accelerated}
    runs = {name: [] for name in transformers}
    for _ in range(args.repeats + 1):  # the first warms up
        for name, pipe.transformer in transformers.items():
            runs[name].append(sample(pipe, args, device))
    full, routed = (some[1:] for some in runs.values())
    latents, exact = routed[-1]["latents"], full[-1]["latents"]
    figures = {
        "summary": acceleration.summary(),
        "seconds": {name: [run["loop"] for run in some[1:]] for name, some in runs.items()},
        "ratio": statistics.median(b["loop"] / a["loop"] for a, b in zip(full, routed)),
        "error": (latents - exact).square().mean().item(),
        "variance": exact.var().item(),
        "psnr_db": psnr(latents, exact, (exact.max() - exact.min()).item()),
    }
    return {name: some[-1] for name, some in runs.items()}, figures


def main(args):
    from runtime import devices
    from runtime.files import check_writable
    from runtime.pictures import picture_format, save_picture

    picture_format(args.out)
    for path in filter(None, [args.out, args.record]):
        check_writable(path)
    device = devices.pick_device("auto")
    runs, figures = compare(make_pipeline(args, device), args, device)
    for name, run in runs.items():
        print(f"Sampling time: {run['call']:.3f} ({name}), without decoding: {run['loop']:.3f}")
    print(f"Denoising: {figures['ratio']:.3f} of the time of diffusers; {figures['summary']}")
    print(
        f"Latents: error {figures['error']:.2e}, variance {figures['variance']:.3f}, PSNR {figures['psnr_db']:.1f} dB"
    )
    columns = min(16, len(args.class_labels))
    save_picture([run["images"] for run in runs.values()], args.out, columns)
    print(f"Picture: {args.out} (above without the policy, below with it)")
    if args.record:
        from runtime.records import write_record

        write_record(args.record, vars(args), device, figures)


if __name__ == "__main__":
    cli.run(main, parse_args())
