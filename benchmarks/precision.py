"""What --dtype, --compile, --cuda-graphs and --experimental change in the images of the shipped model.

    python -m benchmarks.precision --record benchmarks/results/precision-fashion-cpu.json
    python -m benchmarks.precision --table

The same noise and labels, equally many of each class, are sampled in every way, with the router and without. Each way
is compared with plain fp32, and judged by the classifier that is shipped with the model.
"""

from functools import partial

from benchmarks import common
from runtime import cli

STEPS, BATCH = 20, 50
HOW = {"compiled": "compiled", "recorded": "CUDA graphs"}  # keys of a record, and their text


def parse_args(argv=None):
    parser = common.parser(__doc__)
    parser.add_argument("--images", type=cli.positive, default=1000, help="images of each way")
    cli.add_device_argument(parser)
    return parser.parse_args(argv)


def ways(device):
    """The ways to sample, as (dtype, compiled, with CUDA graphs, names of --experimental).

    The first is what the others are compared with.
    """
    if device.type == "cpu":
        plain = [(dtype, compiled, False, []) for dtype in ("fp32", "bf16") for compiled in (False, True)]
        return [*plain, ("bf16", True, False, ["fp8"])]
    plain = [("fp32", False, False, []), ("fp32", False, True, [])]
    plain += [(dtype, True, True, []) for dtype in ("fp32", "tf32", "bf16", "fp16")]
    return [*plain, *(("bf16", True, True, [name]) for name in ("gelu", "fp8", "vae-fp16"))]


def sample(dit, vae, sampler, y, device):
    """Latents (N, C, h, w) and uint8 images (N, H, W, 3), both on the CPU, for labels y (N,)."""
    import torch

    import sampling

    shape = len(y), dit.in_channels, dit.input_size, dit.input_size
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    latents = [sampler(z.to(device), labels.to(device)) for z, labels in zip(noise.split(BATCH), y.split(BATCH))]
    images = [sampling.decode(vae, batch).cpu() for batch in latents]
    return torch.cat(latents).cpu(), torch.cat(images)


def measure(args):
    """Figures of each way, with the router and without: {"rows": [...]}."""
    import torch

    import sampling
    from diffusion import create_diffusion
    from evaluation import inception
    from pretrained.loading import load_dit, load_vae
    from pretrained.spec import model_spec
    from router import Router
    from runtime import devices
    from runtime.pictures import psnr

    device = devices.pick_device(args.device)
    spec = model_spec(ckpt=common.SHIPPED)
    classifier = inception.Graph(common.SHIPPED / "classifier.pb", device)
    router = Router.load(common.SHIPPED_ROUTER).schedule(0.1)
    y = torch.arange(args.images) % spec.num_classes
    plain, rows = {}, []
    for dtype, compiled, cuda_graphs, experimental in ways(device):
        dit = devices.set_precision(load_dit(spec, device), dtype)
        devices.speed_up_blocks(dit.blocks, experimental)
        vae = devices.speed_up_vae(load_vae(spec, device), device, dtype, experimental)
        if compiled:
            devices.compile_blocks(dit.blocks)
        make_sampler = partial(sampling.make_sampler, dit, create_diffusion(STEPS), spec.cfg_scale)
        for name, schedule in ("full", None), ("router", router):
            sampler = make_sampler(schedule, cuda_graphs=cuda_graphs)
            latents, images = sample(dit, vae, sampler, y, device)
            plain_latents, plain_images = plain.setdefault(name, (latents, images))
            levels = (images.int() - plain_images.int()).abs()
            error = (latents - plain_latents).abs().max() / plain_latents.abs().max()
            row = {"schedule": name, "dtype": dtype, "compiled": compiled, "recorded": cuda_graphs}
            row["experimental"] = experimental
            row["error"] = error.item()
            row["psnr_db"] = psnr(images, plain_images, 255) if levels.any() else None
            row["grey_levels"] = levels.max().item()
            row["differing"] = (levels > 0).float().mean().item()
            row["class_accuracy"] = classifier.class_accuracy(images, y)
            rows.append(row)
    return {"dtype": None, "rows": rows}


def rows(record):
    """A row for each way and schedule."""
    for row in record["rows"]:
        yield {
            "device": record["device"],
            "schedule": row["schedule"],
            "dtype": row["dtype"],
            "": " ".join([text for name, text in HOW.items() if row[name]] + row.get("experimental", [])),
            "latents differ by": f"{row['error']:.1e}",
            "PSNR, dB": "" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}",
            "grey levels, at most": row["grey_levels"],
            "values that differ": f"{row['differing']:.3%}",
            "in their class": f"{row['class_accuracy']:.1%}",
        }


def main(args):
    common.run_benchmark(args, "precision-*", measure, rows)


if __name__ == "__main__":
    cli.run(main, parse_args())
