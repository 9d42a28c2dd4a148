"""What a GPU has to show beside the tests and the other benchmarks. benchmarks/gpu.sh runs it.

    python -m benchmarks.gpu_checks agreement speed vae metrics --record checks.json
    python -m benchmarks.gpu_checks --make-plans FOLDER --depth 28
    python -m benchmarks.gpu_checks --targets FOLDER_OF_RECORDS

agreement: latents of the shipped model in every way to run it, against float32 on the CPU.
speed: rates of large products and of a copy; the products of a block of DiT-XL/2, GELU in the first of its MLP,
attention by each backend, fp8.
vae: grey levels of the shipped VAE against the CPU; times of one of the released size with random weights.
metrics: the network of the FID against the CPU and its rate; precision and recall.

On a CPU the sizes are small, to try the program. The record is written after each check; the exit code is 1 if one
fails. Seconds are medians of three rounds of calls.
"""

import contextlib
import json
import statistics
import tempfile
import traceback
from functools import partial
from pathlib import Path

from benchmarks import common
from runtime import cli

# Largest relative L2 difference of latents from float32 on a CPU; bf16 has 8 bits, and with fp8 some products have 4.
TOLERANCES = {"fp32": 1e-4, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1e-1, "bf16 gelu": 1e-1, "bf16 fp8": 2e-1}
REUSED = {20: 0.2214, 50: 0.238}  # share of the layers that the released routers skip: of 2.29, and of 5.72 T published


def parse_args(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help="agreement, speed, vae or metrics")
    parser.add_argument("--make-plans", metavar="FOLDER", help="write the plans that gpu.sh times into this folder")
    parser.add_argument("--depth", type=cli.positive, default=28, help="blocks of the model of these plans")
    parser.add_argument("--targets", metavar="FOLDER", help="print which targets the records in this folder meet")
    cli.add_record_argument(parser)
    cli.add_device_argument(parser)
    args = parser.parse_args(argv)
    if wrong := set(args.checks) - set(CHECKS):
        parser.error(f"{', '.join(sorted(wrong))}: no such check")
    return args


def relative(actual, expected):
    """L2 norm of the difference of two tensors over that of `expected`, computed in float64 on the CPU."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return ((actual - expected).norm() / expected.norm()).item()


def seconds(function, device, calls=20):
    """Seconds of a call: the median of three rounds of `calls`, one after another without waiting."""

    def several():
        for _ in range(calls):
            function()

    several()
    return statistics.median(common.timed(several, device=device)[1] for _ in range(3)) / calls


def agreement(device):
    """For each way to run the shipped model: the error against the CPU, and whether it equals eager. Lists faults."""
    import torch

    import sampling
    from diffusion import create_diffusion
    from pretrained.loading import load_dit
    from pretrained.spec import model_spec
    from router import Router
    from runtime import devices
    from schedule import Schedule

    on_gpu, diffusion = device.type == "cuda", create_diffusion(20)
    plans = {"full": None, "router": Router.load(common.SHIPPED_ROUTER).schedule(0.1)}
    plans["learned"] = Schedule.load(common.SHIPPED / "DDIM20_2x.json")
    spec, images = model_spec(ckpt=common.SHIPPED), 8 if on_gpu else 2
    z = torch.randn(images, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(images)
    cpu = load_dit(spec, "cpu")
    exact = {name: sampling.sample_latents(cpu, diffusion, z, y, 2.0, plan) for name, plan in plans.items()}
    inputs, others = [(a.to(device), b.to(device)) for a, b in ((z, y), (z + 1, (y + 1) % 10))]
    rows, faults = [], []
    for kind, tolerance in TOLERANCES.items():
        dtype, *experimental = kind.split()
        if not on_gpu and (dtype in ("tf32", "fp16") or "gelu" in experimental):
            continue
        for compiled in ((False, True) if not experimental else (True,)) if on_gpu else (False,):
            dit = devices.set_precision(load_dit(spec, device), dtype)
            devices.speed_up_blocks(dit.blocks, experimental)
            if compiled:
                devices.compile_blocks(dit.blocks)
            for name, plan in plans.items():
                eager = sampling.make_sampler(dit, diffusion, 2.0, plan)(*inputs)
                graphs = sampling.make_sampler(dit, diffusion, 2.0, plan, cuda_graphs=True)
                first, other, again = graphs(*inputs), graphs(*others), graphs(*inputs)
                row = {"dtype": kind, "compiled": compiled, "plan": name, "error": relative(eager, exact[name])}
                row |= {"graphs_equal_eager": torch.equal(first, eager), "graphs_error": relative(first, exact[name])}
                row["stays_the_same"] = torch.equal(first, again) and not torch.equal(first, other)
                rows.append(row)
                if not (max(row["error"], row["graphs_error"]) < tolerance and row["stays_the_same"]):
                    faults.append(row)
    return {"rows": rows, "faults": faults}


def speed(device):
    """Rates and seconds of single operations, by name."""
    import torch

    from runtime import devices

    figures = {}
    side, elements = (8192, 2**29) if device.type == "cuda" else (256, 2**16)
    for name, dtype in devices.DTYPES.items():
        devices.set_precision(torch.nn.Identity(), name)  # turns TF32 on or off
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        figures[f"{name}, TFLOP/s"] = 2 * side**3 / seconds(partial(torch.mm, a, b), device, 5) / 1e12
    source = torch.randn(elements, device=device)
    copy = partial(torch.empty_like(source).copy_, source)
    figures["copy, TB/s read and written"] = 2 * source.nbytes / seconds(copy, device) / 1e12
    devices.set_precision(torch.nn.Identity(), "tf32")
    for dtype in (torch.bfloat16, torch.float32):
        figures[f"microseconds of a block, {dtype}"] = products(device, dtype)
        figures[f"microseconds of attention, {dtype}"] = attention(device, dtype)
    return figures


def block_sizes(device):
    """Tokens of a batch, width and heads: those of DiT-XL/2 and 8 images with guidance, small on a CPU."""
    return (16 * 256, 1152, 16) if device.type == "cuda" else (16, 144, 2)


def products(device, dtype):
    """Microseconds of each linear layer of a block; of the first of the MLP with GELU after it and in it; in fp8."""
    import torch

    from models import DiTBlock
    from runtime.devices import Float8Linear

    rows, width, heads = block_sizes(device)
    block, figures = DiTBlock(width, heads).to(device, dtype).requires_grad_(False), {}
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        layer = block.get_submodule(name)
        x = torch.randn(1, rows, layer.in_features, device=device, dtype=dtype)
        ways = {"": partial(layer, x)}
        if name == "mlp.fc1":
            ways[", GELU after it"] = lambda x=x: block.mlp.act(block.mlp.fc1(x))
            ways[", GELU in it"] = partial(block.mlp.fused_hidden, x)
        if dtype == torch.bfloat16:
            fp8, ones, how = Float8Linear(layer), torch.ones(rows, 1, device=device), {"use_fast_accum": True}
            product = partial(torch._scaled_mm, x[0].to(fp8.rows.dtype), fp8.rows.t(), ones, fp8.scale.t())
            ways[", fp8 without rounding its input"] = partial(product, out_dtype=dtype, **how)
        if name == "mlp.fc1":
            figures["fc1, difference of the two with GELU"] = relative(*(f() for f in list(ways.values())[1:3]))
        for way, function in ways.items():
            try:
                figures[name + way] = seconds(function, device) * 1e6
            except (RuntimeError, ValueError) as error:  # an operation that this device does not have
                figures[name + way] = str(error).splitlines()[0]
    return figures


def attention(device, dtype):
    """Microseconds of attention, and its error, by each backend of torch that has it."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    rows, width, heads = block_sizes(device)
    tokens = min(rows, 256)
    shape = rows // tokens, heads, tokens, width // heads
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    exact, figures = scaled_dot_product_attention(q.double(), k.double(), v.double()), {}
    compute = partial(scaled_dot_product_attention, q, k, v)
    names = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    for name in ("default", *names):
        try:
            with contextlib.nullcontext() if name == "default" else sdpa_kernel(getattr(SDPBackend, name)):
                figures[name] = {"us": seconds(compute, device) * 1e6, "error": relative(compute(), exact)}
        except RuntimeError as error:
            figures[name] = str(error).splitlines()[0]
    return figures


def vae(device):
    """Grey levels of the shipped VAE against the CPU by precision; seconds of a VAE of the released size."""
    import torch
    from diffusers import AutoencoderKL

    import sampling
    from pretrained.loading import load_vae
    from pretrained.spec import model_spec
    from runtime import devices

    on_gpu, spec, figures = device.type == "cuda", model_spec(ckpt=common.SHIPPED), {}
    latents = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    exact, dtypes = sampling.decode(load_vae(spec, "cpu"), latents).int(), ("fp32", "tf32", "fp16", "bf16")
    for dtype in dtypes if on_gpu else ("fp32",):
        devices.set_precision(torch.nn.Identity(), dtype)  # turns TF32 on or off
        shipped = torch.nn.Module.to(load_vae(spec, device), devices.DTYPES[dtype])
        levels = (sampling.decode(shipped, latents.to(device)).cpu().int() - exact).abs()
        figures[f"grey levels, {dtype}"] = {
            "most": levels.max().item(),
            "above one": (levels > 1).float().mean().item(),
        }
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    widths, groups = ((128, 256, 512, 512), 32) if on_gpu else ((8, 8, 8, 8), 4)
    large = AutoencoderKL(**blocks, block_out_channels=widths, layers_per_block=2, norm_num_groups=groups)
    large = large.eval().requires_grad_(False).to(device)
    z = torch.randn(8, 4, *(32, 32) if on_gpu else (4, 4), device=device)
    for dtype in dtypes if on_gpu else ("fp32",):
        devices.set_precision(torch.nn.Identity(), dtype)
        for layout in (torch.contiguous_format, torch.channels_last):
            torch.nn.Module.to(large, devices.DTYPES[dtype], memory_format=layout)
            took = seconds(partial(sampling.decode_unchecked, large, z), device, 3)
            figures[f"seconds of 8 images of 256 pixels, {dtype}, {layout}"] = took
    return figures


def metrics(device):
    """Error of the network of the FID against the CPU and its images/s; precision and recall here and on the CPU."""
    import numpy as np
    import torch

    from benchmarks.inception_graph import inception_v3
    from evaluation import inception
    from evaluation.metrics import precision_recall
    from runtime import devices

    devices.set_precision(torch.nn.Identity(), "tf32")  # which the metrics switch off
    count, points = (64, 10000) if device.type == "cuda" else (2, 300)
    random, figures = np.random.default_rng(0), {"faults": []}
    images = random.integers(0, 256, (count, 256, 256, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = inception_v3(Path(folder) / "random.pb", narrower=1 if device.type == "cuda" else 8)
        here, cpu = inception.Graph(path, device), inception.Graph(path, "cpu")
    figures["error of the features"] = list(map(relative, here.features(images[:2]), cpu.features(images[:2])))
    figures["images/s"] = count / seconds(partial(here.features, images), device, 2)
    sets = [random.standard_normal((points, 2048), dtype=np.float32) for _ in range(2)]
    figures["precision and recall, s"] = common.timed(partial(precision_recall, *sets, device=device))[1]
    some = [points[:2000] for points in sets]
    both = [precision_recall(*some, device=where) for where in (device, "cpu")]
    figures["precision and recall of 2,000, here and on the CPU"] = both
    if max(figures["error of the features"]) > 1e-4 or np.abs(np.subtract(*both)).max() > 1e-3:
        figures["faults"].append("the metrics differ from those of the CPU")
    return figures


CHECKS = {"agreement": agreement, "speed": speed, "vae": vae, "metrics": metrics}


def make_plans(folder, depth):
    """Write router20.json and router50.json, and every3-20.json and every3-50.json with forecasts of order 2.

    Without a released router another plan takes its place: it reuses as many layers at the same steps, at random.
    """
    from router import Router
    from schedule import Schedule

    for steps, share in REUSED.items():
        path = common.ROOT / "ckpt" / f"DDIM{steps}_router.pt"
        if path.exists() and depth == 28:
            plan = Router.load(path).schedule(0.1)
        else:
            print(f"{path} is not there: router{steps}.json reuses as many layers at random")
            reused = round(share * steps * depth * 2)
            plan = Schedule.random_layers(steps, depth, Router.trained_steps(steps), reused, seed=0)
        plan.save(Path(folder) / f"router{steps}.json")
        Schedule.every_nth(steps, depth, 3).with_order(2).save(Path(folder) / f"every3-{steps}.json")


def targets(folder):
    """Print a line for each target: the goal, the best figure of the records of `benchmarks.latency`, met or not."""
    for path in sorted(Path(folder).glob("latency-*.json")):
        rows = json.loads(path.read_text())["rows"]
        print(f"{path.stem}:")
        for plan in dict.fromkeys(row["schedule"] for row in rows):
            some = [row for row in rows if row["schedule"] == plan and row["mode"] != "reference"]
            figures = [("share of the rate of plain products, bf16", "share_of_matrix_product", 0.6)]
            if some[0]["against_reference"]:
                figures.append(("times the reference", "against_reference", 4))
            if plan != "full":
                for row in some:
                    row["of_bound"] = row["against_full"] / row["bound_against_full"]
                figures = [*figures[1:], ("of its bound", "of_bound", 0.9 if plan.startswith("every") else 0.97)]
            for text, name, goal in figures:
                best = max(
                    some, key=lambda row: row[name] * (name != "share_of_matrix_product" or row["dtype"] == "bf16")
                )
                verdict = "met" if best[name] >= goal else "MISSED"
                print(f"  {plan}: {best[name]:.3f} {text} ({best['mode']}, {best['dtype']}), goal {goal}: {verdict}")
            for row in some:
                if row.get("against_plain"):
                    print(f"  {plan}: {row['against_plain']:.3f} times as fast as without the switch ({row['mode']})")


def main(args):
    if args.make_plans:
        make_plans(args.make_plans, args.depth)
    if args.targets:
        targets(args.targets)
    if args.checks:
        run_checks(args)


def run_checks(args):
    """Run the checks; print and record the figures of each. Raises UserError if one fails, after all others ran."""
    from runtime import devices
    from runtime.errors import UserError
    from runtime.records import write_record

    device, figures, failed = devices.pick_device(args.device), {}, []
    for name in args.checks:
        try:
            figures[name], took = common.timed(CHECKS[name], device)
            figures[name]["seconds"] = took
        except Exception:  # the other checks are wanted too
            figures[name] = {"faults": traceback.format_exc(limit=-3).splitlines()}
        print(json.dumps({name: figures[name]}, indent=1))
        if figures[name].get("faults"):
            failed.append(name)
        if args.record:
            write_record(args.record, vars(args), device, {"dtype": None} | figures)
    if failed:
        raise UserError(f"{', '.join(failed)} failed: see the faults above")


if __name__ == "__main__":
    cli.run(main, parse_args())
