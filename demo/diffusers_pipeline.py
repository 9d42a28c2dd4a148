"""A router in a DiTPipeline of diffusers, in three lines: a picture and the times, with and without it.

    python -m demo.diffusers_pipeline                 # facebook/DiT-XL-2-256 and the released 20-step router
    python -m demo.diffusers_pipeline --tiny          # a small model of random weights, to see it run

The three lines are those of `dit_pipeline.py`; a time is that of a call of the pipeline, decoding included.
"""

from runtime import cli


def parse_args(argv=None):
    parser = cli.ArgumentParser(description="A router in a DiTPipeline of diffusers.")
    parser.add_argument("--pipeline", default="facebook/DiT-XL-2-256", help="Hub name or folder of a DiTPipeline")
    parser.add_argument("--path", default="ckpt/DDIM20_router.pt", help="router file, fetched if released")
    parser.add_argument("--thres", type=cli.fraction, default=0.1, help="threshold of the router, 0 to 1")
    parser.add_argument("--tiny", action="store_true", help="a random model, each layer reused at every second step")
    parser.add_argument(
        "--class-labels", type=int, nargs="+", default=[207, 992, 387, 974], metavar="LABEL", help="one image each"
    )
    parser.add_argument("--guidance-scale", type=cli.finite, default=4.0, help="1 is none")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the noise")
    parser.add_argument("--out", default="diffusers_pipeline.png", help="picture: above without the router, below with")
    return parser.parse_args(argv)


def tiny_pipeline():
    """A DiTPipeline of a small random model: 1000 classes, 16 pixels a side."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    from models import DiT
    from pretrained.diffusers_layout import to_diffusers

    torch.manual_seed(0)
    dit = DiT(input_size=8, hidden_size=128, depth=6, num_heads=4, frequency_shift=1)
    for name, parameter in dit.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(parameter, std=0.1)  # a fresh DiT outputs 0
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        latent_channels=4,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(beta_start=1e-4, clip_sample=False)  # as published
    return DiTPipeline(to_diffusers(dit), vae, scheduler)


def main(args):
    import time

    import torch
    from diffusers import DiTPipeline

    from pretrained.diffusers_pipeline import accelerate
    from pretrained.spec import check_labels
    from pretrained.weights import find_model_folder
    from router import Router
    from runtime import devices, released
    from runtime.files import check_writable
    from runtime.pictures import save_picture
    from schedule import Schedule

    check_writable(args.out)
    device = devices.pick_device("auto")
    if args.tiny:
        pipe = tiny_pipeline()
        schedule = Schedule.every_nth(steps=20, depth=6, interval=2)
    else:
        schedule = Router.load(released.find(args.path)).schedule(args.thres)
        pipe = DiTPipeline.from_pretrained(find_model_folder(args.pipeline))
    pipe.to(device).set_progress_bar_config(disable=True)
    check_labels(args.class_labels, pipe.transformer.config.num_embeds_ada_norm)

    def sample():
        """Images uint8 (N, H, W, 3), and the seconds they took."""
        devices.synchronize(device)
        start = time.perf_counter()
        images = pipe(
            class_labels=args.class_labels,
            guidance_scale=args.guidance_scale,
            generator=torch.Generator().manual_seed(args.seed),
            num_inference_steps=schedule.steps,
            output_type="np",
        ).images
        devices.synchronize(device)
        return torch.from_numpy((255 * images).round().astype("uint8")), time.perf_counter() - start

    groups = []
    for name in ("full", "router"):
        if name == "router":
            accelerate(pipe, schedule)
        sample()  # warms up
        images, seconds = sample()
        groups.append(images)
        print(f"Sampling time: {seconds:.3f} ({name})")
    save_picture(groups, args.out, columns=len(args.class_labels))
    print(f"Picture: {args.out} (above without the router, below with it)")


if __name__ == "__main__":
    cli.run(main, parse_args())
