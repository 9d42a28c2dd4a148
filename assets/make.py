"""Makes the pictures of this folder from the shipped weights and records: python -m assets.make

samples.png: ten classes across, eight samples down, DDIM-20 without a router.
flow.png:    ten classes of the flow model across; down 50 Euler steps in full, with the plan for 2x, and for 3x.
router.png:  the scores of the two shipped routers, steps down in the order they run, layers across.
router.gif:  the scores of the first of them during its training, from its log.
plans.png:   the plan of the 50-step router, and the learned plan that runs a third of the multiply-adds.
"""

import json
from functools import partial
from pathlib import Path

from runtime import cli

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "ckpt" / "fashion_mnist"
FLOW = ROOT / "ckpt" / "fashion_mnist_flow"
THRESHOLD = 0.1


def parse_args(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "assets", help="folder to write the pictures into")
    return parser.parse_args(argv)


def draw_samples(path, model, steps, rows, plans=(None,)):
    """Draw a model folder's samples of all its classes, `rows` of each, with each of `plans` from the same noise."""
    import torch

    import sampling
    from pretrained.loading import load_dit, load_vae
    from pretrained.spec import model_spec
    from runtime.pictures import save_picture

    device = torch.device("cpu")
    spec = model_spec(ckpt=str(model))
    dit, vae = load_dit(spec, device), load_vae(spec, device)
    labels = torch.arange(spec.num_classes).repeat(rows)
    shape = len(labels), dit.in_channels, dit.input_size, dit.input_size
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    sample = partial(sampling.sample_latents, dit, spec.make_process(steps), z, labels, spec.cfg_scale)
    save_picture([sampling.decode(vae, sample(plan)) for plan in plans], path, spec.num_classes)


def main(args):
    from router import Router
    from schedule import Schedule
    from training.plots import save_animation, save_heatmap, save_plans
    from training.run_folder import frames

    draw_samples(args.out / "samples.png", SHIPPED, steps=20, rows=8)
    plans = (None, *(Schedule.load(FLOW / f"Euler50_{speed}x.json") for speed in (2, 3)))
    draw_samples(args.out / "flow.png", FLOW, steps=50, rows=1, plans=plans)
    scores = {f"DDIM-{steps}": Router.load(SHIPPED / f"DDIM{steps}_router.pt").scores() for steps in (20, 50)}
    save_heatmap(scores, THRESHOLD, args.out / "router.png")
    log = (ROOT / "demo" / "records" / "fashion-20.jsonl").read_text().splitlines()
    save_animation(frames(map(json.loads, log), 20), THRESHOLD, args.out / "router.gif")
    router = Router.load(SHIPPED / "DDIM50_router.pt").schedule(THRESHOLD)
    plans = {"router, at most 1.8x": router, "learned plan, 3x": Schedule.load(SHIPPED / "DDIM50_3x.json")}
    save_plans(plans, args.out / "plans.png")
    print(f"wrote samples.png, flow.png, router.png, router.gif and plans.png into {args.out}")


if __name__ == "__main__":
    cli.run(main, parse_args())
