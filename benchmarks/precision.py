"""What --dtype, --compile and --cuda-graphs change in the images of the shipped model.

    python -m benchmarks.precision --record benchmarks/results/precision-fashion-cpu.json
    python -m benchmarks.precision --table          # the table of the records there are

The same noise and labels, as many of each class, sampled in every way with the router and without; each is compared
with plain fp32, and judged by the classifier that is shipped with the model.
"""

from pathlib import Path

from benchmarks.common import markdown, read_records
from runtime import cli

ROOT = Path(__file__).resolve().parent.parent


SHIPPED = ROOT / "ckpt" / "fashion_mnist"
STEPS, BATCH = 20, 50


def parse_args(argv=None):
    parser = cli.ArgumentParser(description="What lower precision and compiling change in images.")
    parser.add_argument("--images", type=cli.positive, default=1000, help="of each way")
    cli.add_device_argument(parser)
    cli.add_record_argument(parser)
    parser.add_argument("--table", action="store_true", help="measure nothing, print that of results/precision-*.json")
    return parser.parse_args(argv)


def ways(device):
    """What is compared, as (dtype, whether compiled, whether recorded); the others are compared with the first."""
    if device.type == "cpu":
        return [("fp32", False, False), ("fp32", True, False), ("bf16", False, False), ("bf16", True, False)]
    recorded = [("fp32", False, False), ("fp32", False, True)]
    return [*recorded, *((dtype, True, True) for dtype in ("fp32", "tf32", "bf16", "fp16"))]


def sample(dit, vae, sampler, y, device):
    """Latents (N, C, h, w) and uint8 images (N, H, W, 3), both on the CPU, for labels y (N,)."""
    import torch
    from tqdm import tqdm

    import sampling

    noise = torch.randn(
        len(y), dit.in_channels, dit.input_size, dit.input_size, generator=torch.Generator().manual_seed(0)
    )
    latents, images = [], []
    for z, labels in zip(tqdm(noise.split(BATCH), leave=False, disable=None), y.split(BATCH)):
        latents.append(sampler(z.to(device), labels.to(device)))
        images.append(sampling.decode(vae, latents[-1]).cpu())
    return torch.cat(latents).cpu(), torch.cat(images)


def table(records):
    """The Markdown text: a line for each way and schedule of each record."""
    head = ["device", "schedule", "dtype", "", "latents differ by", "PSNR, dB", "grey levels, at most"]
    head += ["values that differ", "in their class"]
    rows = []
    for record in records:
        for row in record["rows"]:
            same = row["psnr_db"] is None
            how = " ".join(name for name in ("compiled", "recorded") if row[name])
            cells = [f"{row['error']:.1e}", "" if same else f"{row['psnr_db']:.1f}", f"{row['grey_levels']}"]
            cells += [f"{row['differing']:.3%}", f"{row['class_accuracy']:.1%}"]
            rows.append([record["device"], row["schedule"], row["dtype"], how, *cells])
    return markdown(head, rows)


def main(args):
    if args.table:
        print(table(read_records("precision-*")))
        return

    import torch

    import sampling
    from diffusion import create_diffusion
    from evaluation import inception
    from pretrained.loading import load_dit, load_vae
    from pretrained.spec import model_spec
    from router import load_schedule
    from runtime import devices, records
    from runtime.files import check_writable
    from runtime.pictures import psnr

    device = devices.pick_device(args.device)
    if args.record:
        check_writable(args.record)
    spec = model_spec(ckpt=SHIPPED)
    classifier = inception.load_graph(SHIPPED / "classifier.pb", device)
    router, _ = load_schedule("dynamiclayer", SHIPPED / f"DDIM{STEPS}_router.pt", 0.1)
    y = torch.arange(args.images) % spec.num_classes
    plain, rows = {}, []
    for dtype, compiled, recorded in ways(device):
        dit = devices.set_precision(load_dit(spec, device), dtype)
        vae = devices.speed_up_vae(load_vae(spec, device), device, dtype)
        if compiled:
            devices.compile_blocks(dit.blocks)
        for name, schedule in ("full", None), ("router", router):
            plan = create_diffusion(STEPS), spec.guidance(None, 4.0), schedule
            sampler = sampling.make_sampler(dit, *plan, cuda_graphs=recorded)
            latents, images = sample(dit, vae, sampler, y, device)
            exact, shown = plain.setdefault(name, (latents, images))
            grey = (images.int() - shown.int()).abs()
            rows.append(
                {
                    "schedule": name,
                    "dtype": dtype,
                    "compiled": compiled,
                    "recorded": recorded,
                    "error": ((latents - exact).abs().max() / exact.abs().max()).item(),
                    "psnr_db": psnr(images, shown, 255) if grey.any() else None,
                    "grey_levels": grey.max().item(),
                    "differing": (grey > 0).float().mean().item(),
                    "class_accuracy": classifier.class_accuracy(images, y),
                }
            )
    print(table([{"device": devices.device_name(device), "rows": rows}]))
    if args.record:
        records.write_record(args.record, vars(args), device, {"dtype": None, "rows": rows})


if __name__ == "__main__":
    cli.run(main, parse_args())
