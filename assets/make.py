"""Makes the pictures of this folder from the shipped weights and records: python -m assets.make

samples.png: ten classes across, eight samples down, DDIM-20 without a router.
router.png:  the scores of the two shipped routers, steps down in the order they run, layers across.
router.gif:  the scores of the first of them during its training, from its log.
plans.png:   the plan of the 50-step router, and the learned plan that runs a third of the multiply-adds.
"""

import json
from pathlib import Path

from runtime import cli

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "ckpt" / "fashion_mnist"
THRESHOLD = 0.1


def parse_args(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "assets", help="folder to write the pictures into")
    return parser.parse_args(argv)


def draw_samples(path, rows=8):
    import torch

    import sampling
    from diffusion import create_diffusion
    from pretrained.loading import load_dit, load_vae
    from pretrained.spec import model_spec
    from runtime.pictures import save_picture

    device = torch.device("cpu")
    spec = model_spec(ckpt=str(SHIPPED))
    dit, vae = load_dit(spec, device), load_vae(spec, device)
    labels = torch.arange(spec.num_classes).repeat(rows)
    shape = len(labels), dit.in_channels, dit.input_size, dit.input_size
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    latents = sampling.sample_latents(dit, create_diffusion(20), z, labels, spec.cfg_scale)
    save_picture([sampling.decode(vae, latents)], path, spec.num_classes)


def main(args):
    from router import Router
    from schedule import Schedule
    from training.plots import save_animation, save_heatmap, save_plans
    from training.run_folder import frames

    draw_samples(args.out / "samples.png")
    scores = {f"DDIM-{steps}": Router.load(SHIPPED / f"DDIM{steps}_router.pt").scores() for steps in (20, 50)}
    save_heatmap(scores, THRESHOLD, args.out / "router.png")
    log = (ROOT / "demo" / "records" / "fashion-20.jsonl").read_text().splitlines()
    save_animation(frames(map(json.loads, log), 20), THRESHOLD, args.out / "router.gif")
    router = Router.load(SHIPPED / "DDIM50_router.pt").schedule(THRESHOLD)
    plans = {"router, at most 1.8x": router, "learned plan, 3x": Schedule.load(SHIPPED / "DDIM50_3x.json")}
    save_plans(plans, args.out / "plans.png")
    print(f"wrote samples.png, router.png, router.gif and plans.png into {args.out}")


if __name__ == "__main__":
    cli.run(main, parse_args())
