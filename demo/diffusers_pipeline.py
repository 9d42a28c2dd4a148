"""Run diffusers' DiTPipeline with and without a router: a picture, and the time of one call, decoding included.

python -m demo.diffusers_pipeline                 # facebook/DiT-XL-2-256 and the released 20-step router
python -m demo.diffusers_pipeline --tiny          # a small random model, to see it run
"""

from runtime import cli


def parse_args(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", default="facebook/DiT-XL-2-256", help="Hub name or folder of a DiTPipeline")
    parser.add_argument("--path", default="ckpt/DDIM20_router.pt", help="router file, fetched if released")
    parser.add_argument("--thres", type=cli.fraction, default=0.1, help="threshold of the router, 0 to 1")
    parser.add_argument("--tiny", action="store_true", help="a random model that reuses all layers every second step")
    parser.add_argument(
        "--class-labels", type=int, nargs="+", default=[207, 992, 387, 974], metavar="LABEL", help="one per image"
    )
    parser.add_argument("--guidance-scale", type=cli.finite, default=4.0, help="1 is no guidance")
    parser.add_argument("--seed", type=cli.seed, default=0, help="seed of the noise")
    parser.add_argument("--out", default="diffusers_pipeline.png", help="picture, rows of the router below")
    return parser.parse_args(argv)


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
        pipe, schedule = tiny_pipeline(), Schedule.every_nth(steps=20, depth=6, interval=2)
    else:
        schedule = Router.load(released.find(args.path)).schedule(args.thres)
        pipe = DiTPipeline.from_pretrained(find_model_folder(args.pipeline))
    pipe.to(device).set_progress_bar_config(disable=True)
    check_labels(args.class_labels, pipe.transformer.config.num_embeds_ada_norm)

    def sample():
        """Images uint8 (N, H, W, 3), and the seconds they took."""
        devices.synchronize(device)
        start = time.perf_counter()
        noise = torch.Generator().manual_seed(args.seed)
        images = pipe(args.class_labels, args.guidance_scale, noise, schedule.steps, output_type="np").images
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
