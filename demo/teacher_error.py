"""Error of routers' samplers against the plain sampler, a step at a time: python -m demo.teacher_error ROUTER ...

For every step that a router decides, real images are noised to the step before it, which runs in full; then the model
that reuses the router's layers is compared with the model that runs everything (the error that training lowers, with
scores of 0 and 1). All routers see the same images and the same noise.
"""

from pathlib import Path

from runtime import cli

HERE = Path(__file__).resolve().parent
SHIPPED = HERE.parent / "ckpt" / "fashion_mnist"


def parse_args(argv=None):
    parser = cli.ArgumentParser(
        description="Compare routers by their error against the plain model.", positional="ROUTER [ROUTER ...]"
    )
    parser.add_argument("routers", nargs="+", metavar="ROUTER", help="router files for the same number of steps")
    parser.add_argument("--ckpt", default=str(SHIPPED), help="model folder")
    parser.add_argument("--data-path", default=str(HERE / "data" / "test"), help="folder of images, a folder a class")
    cli.add_threshold_argument(parser)
    parser.add_argument("--samples", type=cli.positive, default=512, help="images a step, drawn from all")
    parser.add_argument("--batch-size", type=cli.positive, default=64, help="images at once")
    parser.add_argument("--seed", type=cli.seed, default=1, help="seed of the images and the noise")
    cli.add_device_argument(parser)
    return parser.parse_args(argv)


def main(args):
    import torch
    from torch.utils.data import DataLoader

    from diffusion import create_diffusion
    from pretrained.loading import load_dit, load_vae
    from pretrained.spec import model_spec
    from router import Router, router_loss
    from runtime import devices
    from runtime.errors import UserError
    from runtime.noise import random_stream
    from training.batches import TrainingSamples, clean_latents
    from training.images import ImageSource

    device = devices.pick_device(args.device)
    spec = model_spec(ckpt=args.ckpt)
    images = ImageSource(args.data_path, spec)
    if args.samples > len(images):
        raise UserError(f"{args.data_path} has {len(images)} images, fewer than --samples {args.samples}")
    dit, vae = load_dit(spec, device), load_vae(spec, device)
    schedules = {path: Router.load(path).schedule(args.thres) for path in args.routers}
    steps = schedules[args.routers[0]].steps
    for path, schedule in schedules.items():
        schedule.check_fits(path, steps, dit.depth)
    diffusion, trained = create_diffusion(steps), list(Router.trained_steps(steps))
    errors = {path: torch.zeros(len(trained), dtype=torch.float64) for path in schedules}

    # No label is dropped: the conditional model is measured.
    shape = (dit.in_channels, dit.input_size, dit.input_size)
    samples = TrainingSamples(images, args.seed, shape, dit.num_classes, 0.0, False)
    order = random_stream("order", args.seed, 0).permutation(len(images))[: args.samples].tolist()
    keys = list(enumerate(order))
    batches = [keys[start : start + args.batch_size] for start in range(0, len(keys), args.batch_size)]
    with torch.inference_mode():
        for batch in DataLoader(samples, batch_sampler=batches):
            inputs = clean_latents(batch, vae, device)
            for row, i in enumerate(trained):
                for path, schedule in schedules.items():
                    scores = schedule.compute[i].float().to(device)
                    errors[path][row] += router_loss(dit, diffusion, scores, i + 1, *inputs).sum().item()
    for path, schedule in schedules.items():
        mean, bound = errors[path] / args.samples, schedule.speedup_bound(dit.multiply_adds())
        worst = int(mean.argmax())
        print(
            f"{path}: cached {schedule.cached_share():.1%} of all layers, bound {bound:.3f}, "
            f"mean squared error {mean.mean():.3e} (largest {mean[worst]:.3e} at step {trained[worst]})"
        )


if __name__ == "__main__":
    cli.run(main, parse_args())
