"""Share of the shipped model's samples that an independent classifier puts in the class that was asked for.

    python -m demo.class_accuracy --path ckpt/fashion_mnist/DDIM20_router.pt       # with and without the router

Both draw from the same noise; every class gets the same number of samples.
"""

from pathlib import Path

from runtime import cli

HERE = Path(__file__).resolve().parent
SHIPPED = HERE.parent / "ckpt" / "fashion_mnist"


def parse_args(argv=None):
    parser = cli.ArgumentParser(description="Class accuracy of the Fashion-MNIST model's samples.")
    graph = SHIPPED / "classifier.pb"
    parser.add_argument("--ckpt", default=str(SHIPPED), help="model folder")
    parser.add_argument("--classifier", type=Path, default=graph, help="graph file of demo/train_classifier.py")
    parser.add_argument("--path", help="router; without it only the plain sampler is judged")
    cli.add_threshold_argument(parser)
    parser.add_argument("--num-sampling-steps", type=cli.sampling_steps, default=20, help="DDIM steps")
    parser.add_argument("--cfg-scale", type=cli.finite, help="guidance; default: what the model folder recommends")
    parser.add_argument("--samples", type=cli.positive, default=2000, help="images")
    parser.add_argument("--batch-size", type=cli.positive, default=100, help="images at a time")
    parser.add_argument("--seed", type=cli.seed, default=0, help="seed of the noise")
    cli.add_device_argument(parser)
    parser.add_argument("--data", type=Path, default=HERE / "data", help="folder whose test images judge the judge")
    return parser.parse_args(argv)


def main(args):
    import torch
    from tqdm import tqdm

    import sampling
    from demo.train_loop import load_split
    from diffusion import create_diffusion
    from evaluation import inception
    from pretrained.loading import load_dit, load_vae
    from pretrained.spec import model_spec
    from router import load_schedule
    from runtime import devices

    device = devices.pick_device(args.device)
    classifier = inception.Graph(args.classifier, device)
    spec = model_spec(ckpt=args.ckpt)
    dit, vae = load_dit(spec, device), load_vae(spec, device)
    schedules = {"without router": None}
    if args.path:
        schedule, _ = load_schedule("dynamiclayer", args.path, args.thres)
        schedule.check_fits(args.path, args.num_sampling_steps, dit.depth)
        schedules[f"with {args.path}"] = schedule
        print(schedule.describe(dit.multiply_adds()))
    diffusion = create_diffusion(args.num_sampling_steps)
    cfg_scale = spec.guidance(args.cfg_scale, 4.0)
    shape = args.samples, dit.in_channels, dit.input_size, dit.input_size
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(args.seed))
    labels = torch.arange(args.samples) % spec.num_classes
    real, classes = load_split(args.data, "test")
    share = classifier.class_accuracy(real.permute(0, 2, 3, 1), classes)
    print(f"the classifier on the test images: {share:.2%}")
    for name, schedule in schedules.items():
        images = []
        for z, y in zip(tqdm(noise.split(args.batch_size), desc=name, disable=None), labels.split(args.batch_size)):
            latents = sampling.sample_latents(dit, diffusion, z.to(device), y.to(device), cfg_scale, schedule)
            images.append(sampling.decode(vae, latents).cpu())
        share = classifier.class_accuracy(torch.cat(images), labels)
        setting = f"{args.samples} samples, {args.num_sampling_steps} steps, guidance {cfg_scale}, {name}"
        print(f"{setting}: {share:.2%} in their class", flush=True)


if __name__ == "__main__":
    cli.run(main, parse_args())
