"""Makes the pictures of this folder from the shipped weights and records: python -m assets.make

samples.png: ten classes across, eight samples down, DDIM-20 without a router.
router.png:  the scores of the two shipped routers, steps down in the order they run, layers across.
router.gif:  how the first of them came about, by the log of its training.
"""

import json
from pathlib import Path

from runtime import cli

ROOT = Path(__file__).resolve().parent.parent


FOLDER = ROOT / "ckpt" / "fashion_mnist"


def parse_args(argv=None):
    parser = cli.ArgumentParser(description="Make the pictures of assets/.")
    parser.add_argument("--ckpt", default=str(FOLDER), help="model folder with DDIM20_router.pt and DDIM50_router.pt")
    parser.add_argument("--out", type=Path, default=ROOT / "assets", help="folder to write the pictures into")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    return parser.parse_args(argv)


def draw_samples(args, rows=8):
    import torch

    import sampling
    from diffusion import create_diffusion
    from pretrained.loading import load_dit, load_vae
    from pretrained.spec import model_spec
    from runtime.pictures import save_picture

    device = torch.device("cpu")
    spec = model_spec(ckpt=args.ckpt)
    dit, vae = load_dit(spec, device), load_vae(spec, device)
    labels = torch.arange(spec.num_classes).repeat(rows)
    generator = torch.Generator().manual_seed(args.seed)
    z = torch.randn(len(labels), dit.in_channels, dit.input_size, dit.input_size, generator=generator)
    latents = sampling.sample_latents(dit, create_diffusion(20), z, labels, spec.cfg_scale)
    save_picture([sampling.decode(vae, latents)], args.out / "samples.png", spec.num_classes)


def draw_routers(args, threshold=0.1):
    from router import Router
    from training.plots import save_heatmap

    routers = {f"DDIM-{steps}": Router.load(Path(args.ckpt) / f"DDIM{steps}_router.pt") for steps in (20, 50)}
    scores = {title: router.scores() for title, router in routers.items()}
    save_heatmap(scores, threshold, args.out / "router.png")


def draw_training(args, threshold=0.1):
    from training.plots import save_animation
    from training.run_folder import frames

    log = ROOT / "demo" / "records" / "fashion-20.jsonl"
    save_animation(frames(map(json.loads, log.open()), 20), threshold, args.out / "router.gif")


def main(args):
    draw_samples(args)
    draw_routers(args)
    draw_training(args)
    print(f"wrote samples.png, router.png and router.gif into {args.out}")


if __name__ == "__main__":
    cli.run(main, parse_args())
