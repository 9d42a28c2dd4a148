"""Where the time of sampling goes and what shortens it: a model with and without a router, run in every way.

    python -m benchmarks.latency --ckpt ckpt/fashion_mnist --path ckpt/fashion_mnist/DDIM20_router.pt --reference
    python -m benchmarks.latency --model DiT-XL/2 --path ckpt/DDIM20_router.pt --reference --modes eager --repeats 1
    python -m benchmarks.latency --ckpt ckpt/fashion_mnist --path ckpt/fashion_mnist/DDIM20_router.pt --profile
    python -m benchmarks.latency --table

All rows run in turn in one process, `--repeats` times, from the same noise; a ratio is the median over the rounds. The
times are those of the diffusion loop with guidance. Without --ckpt the weights are random.

"reference" does what the original implementation does. "eager" is sample.py without flags, "compile" and "graphs" are
its flags --compile and --cuda-graphs. "First" is the time of a first run: two steps that trigger everything that
happens once (compiling), or capturing a CUDA graph. "Peak" is the weights and what a row takes beside them at most (on
a GPU only).
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks import common
from runtime import cli

CFG_SCALE = 4.0  # as published for pictures; a step takes as long with any other but 1
MODES = ["eager", "compile", "graphs", "compile+graphs"]


@dataclass
class Row:
    """One way to run: "full" or "router", one of MODES or "reference", a precision; and what was measured of it."""

    schedule: str
    mode: str
    dtype: str
    dit: Any
    sampler: Callable  # z, y -> latents
    warm_up: Callable
    seconds: list = field(default_factory=list)
    first: float = 0.0  # seconds of the warm-up
    peak: int = 0  # bytes that it takes on a GPU beyond what was in use before it
    latents: Any = None

    def run(self, function, z, y, device):
        """Run the sampler or the warm-up: (latents, seconds, peak)."""
        import torch

        from runtime import devices

        devices.set_precision(z, self.dtype)  # turns the TF32 of the process on or off
        before = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = devices.peak_memory(device)
        return *common.timed(function, z, y, device=device), devices.peak_memory(device) - before


def parse_args(argv=None):
    parser = cli.ArgumentParser(description="Seconds of the diffusion loop in every way to run it.")
    parser.add_argument("--model", default="DiT-XL/2", help="size and patch, with random weights; not with --ckpt")
    parser.add_argument(
        "--image-size", type=int, choices=[256, 512], default=256, help="pixels a side; not with --ckpt"
    )
    parser.add_argument("--ckpt", help="weights or a model folder, as for sample.py")
    parser.add_argument("--path", help="router file; without it only the full model runs")
    cli.add_threshold_argument(parser)
    parser.add_argument("--num-sampling-steps", type=cli.sampling_steps, default=20, help="denoising steps")
    parser.add_argument("--images", type=cli.positive, default=1, help="images of a batch; guidance doubles it")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=["fp32", "tf32", "bf16", "fp16"],
        help="default: fp32 and bf16, on a GPU also tf32 and fp16",
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: all that the device can run")
    parser.add_argument("--reference", action="store_true", help="also run as the original implementation does")
    parser.add_argument("--repeats", type=cli.positive, default=5, help="rounds, after each row was warmed up")
    cli.add_device_argument(parser)
    common.add_record_and_table_arguments(parser)
    parser.add_argument(
        "--profile", action="store_true", help="only print where the time of a full and of a cached step goes"
    )
    args = parser.parse_args(argv)
    if args.profile and not args.path:
        parser.error("--profile needs a cached step: add --path")
    return args


def make_models(load, dtypes, compiled):
    """{(dtype, whether compiled): DiT}; load() makes a float32 DiT. Models of one precision share their weights."""
    from runtime import devices

    models = {}
    for dtype in sorted(dtypes, key=["bf16", "fp16", "fp32", "tf32"].index):
        same = models.get(("fp32", False)) if dtype == "tf32" else None
        models[dtype, False] = same or devices.set_precision(load(), dtype)
        if compiled:
            models[dtype, True] = common.share_weights(models[dtype, False])
            devices.compile_blocks(models[dtype, True].blocks)
    return models


def every_kind(depth):
    """A schedule of two steps: a full one, then blocks that reuse neither layer, either and both in turn."""
    import torch

    from schedule import Schedule

    kinds = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    return Schedule(torch.stack([kinds[torch.arange(depth) % 4], torch.ones(depth, 2, dtype=torch.bool)]))


def make_rows(steps, dtypes, modes, models, schedules, reference):
    """All rows. reference: the precision in which the original runs, None without it.

    The warm-up runs two steps with every kind of block, so that everything that happens once happens, or captures the
    CUDA graph.
    """
    import sampling
    from benchmarks.original import original_latents
    from diffusion import create_diffusion

    diffusion, short = create_diffusion(steps), create_diffusion(2)
    ways = [(name, mode, dtype) for dtype in dtypes for mode in modes for name in schedules]
    ways += [(name, "reference", reference) for name in schedules if reference]
    rows = []
    for name, mode, dtype in ways:
        dit, schedule = models[dtype, "compile" in mode], schedules[name]
        if "graphs" in mode:
            sampler = warm_up = sampling.make_sampler(dit, diffusion, CFG_SCALE, schedule, cuda_graphs=True)
        else:
            sample = original_latents if mode == "reference" else sampling.sample_latents
            sampler = partial(sample, dit, diffusion, cfg_scale=CFG_SCALE, schedule=schedule)
            warm_up = partial(sample, dit, short, cfg_scale=CFG_SCALE, schedule=schedule and every_kind(dit.depth))
        rows.append(Row(name, mode, dtype, dit, sampler, warm_up))
    return rows


def inputs(dit, images, device):
    """Noise z (N, C, h, w) and labels y (N,), the same in every call."""
    import torch

    generator = torch.Generator().manual_seed(0)
    z = torch.randn(images, dit.in_channels, dit.input_size, dit.input_size, generator=generator)
    return z.to(device), torch.arange(images, device=device) % dit.num_classes


def figures(row, rows, plan, images, product_rate, on_gpu):
    """The figures of a row for JSON. plan: its `Schedule`. product_rate: multiply-adds a second of plain products."""
    from runtime.devices import DTYPES

    def find(schedule, mode, dtype=row.dtype):
        found = [other for other in rows if (other.schedule, other.mode, other.dtype) == (schedule, mode, dtype)]
        return found[0] if found else None

    costs = row.dit.multiply_adds()
    work = 2 * images * plan.multiply_adds(costs).sum().item()
    rate = work / statistics.median(row.seconds)
    reference = next((other for other in rows if (other.schedule, other.mode) == (row.schedule, "reference")), None)
    full, exact = find("full", row.mode), find(row.schedule, "eager", "fp32")
    error = exact and ((row.latents - exact.latents).abs().max() / exact.latents.abs().max()).item()
    weights = sum(parameter.nbytes for parameter in row.dit.parameters())
    return {
        "schedule": row.schedule,
        "mode": row.mode,
        "dtype": row.dtype,
        "seconds": row.seconds,
        "first": row.first,
        "multiply_adds": work,
        "rate": rate,
        "matrix_product_rate": product_rate,
        "share_of_matrix_product": rate / product_rate,
        "against_reference": reference and common.median_ratio(reference.seconds, row.seconds),
        "against_full": common.median_ratio(full.seconds, row.seconds),
        "bound_against_full": plan.speedup_bound(costs),
        "error": error,
        "peak_bytes": row.peak + weights if on_gpu else None,  # on a CPU known of the whole process only
        "cache_bytes": 0 if row.schedule == "full" else row.dit.cache_bytes(2 * images, DTYPES[row.dtype]),
    }


def load(args, device):
    """A function that makes the DiT in float32, and the schedules by name."""
    from pretrained.loading import load_dit
    from pretrained.spec import model_spec
    from router import load_schedule

    spec = model_spec(args.model, args.image_size, ckpt=args.ckpt)
    schedules = {"full": None}
    if args.path:
        schedules["router"], _ = load_schedule("dynamiclayer", args.path, args.thres)
    return partial(load_dit, spec, device, None if args.ckpt else 0), schedules


def measure(args):
    """Figures of all rows: {"rows": [...]}."""
    from runtime import devices
    from runtime.errors import UserError
    from schedule import Schedule

    device, steps = devices.pick_device(args.device), args.num_sampling_steps
    on_gpu = device.type == "cuda"
    dtypes = args.dtypes or ["fp32", "bf16", *(["tf32", "fp16"] if on_gpu else [])]
    modes = args.modes or [mode for mode in MODES if on_gpu or "graphs" not in mode]
    published = devices.pick_dtype(None, device)
    if args.reference and published not in dtypes:
        raise UserError(f"--reference runs in {published}, as published: add {published} to --dtypes")
    if not on_gpu and any("graphs" in mode for mode in modes):
        raise UserError(f"CUDA graphs need a CUDA device and this is {device}: leave them out of --modes")
    load_model, schedules = load(args, device)
    models = make_models(load_model, dtypes, any("compile" in mode for mode in modes))
    dit = next(iter(models.values()))
    if "router" in schedules:
        schedules["router"].check_fits(args.path, steps, dit.depth)
    rows = make_rows(steps, dtypes, modes, models, schedules, published if args.reference else None)
    z, y = inputs(dit, args.images, device)
    for row in rows:
        _, row.first, row.peak = row.run(row.warm_up, z, y, device)
    for _ in range(args.repeats):
        for row in rows:  # in turn, so that a machine that slows down slows all
            row.latents, seconds, peak = row.run(row.sampler, z, y, device)
            row.seconds.append(seconds)
            if "graphs" not in row.mode:  # a graph takes its memory when it is captured, and keeps it
                row.peak = peak
    rates = {}
    for dtype in dtypes:
        block = devices.set_precision(models[dtype, False].blocks[0], dtype)  # turns TF32 on or off
        layers = block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2
        rates[dtype] = devices.matmul_rate(layers, 2 * args.images * dit.pos_embed.shape[1])
    plans = {name: schedule or Schedule.full(steps, dit.depth) for name, schedule in schedules.items()}
    measured = [figures(row, rows, plans[row.schedule], args.images, rates[row.dtype], on_gpu) for row in rows]
    return {"dtype": None, "rows": measured}


# Kinds of PyTorch's operations, by parts of their names.
KINDS = {
    "matrix products": ("addmm", "::mm", "bmm", "convolution"),
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention", "cudnn_attention"),
    "GELU": ("gelu",),
    "LayerNorm": ("layer_norm",),
    "modulation, gates, sums": ("addcmul", "::add", "::mul", "::sub"),
    "copies": ("copy", "::cat", "repeat", "clone"),
}


def profile(args):
    """A Markdown table of the milliseconds, and their shares, in one full step and in the cheapest cached step."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    import sampling
    from diffusion import create_diffusion
    from runtime import devices

    device = devices.pick_device(args.device)
    load_model, schedules = load(args, device)
    dit = devices.set_precision(load_model(), args.dtypes[0] if args.dtypes else devices.pick_dtype(None, device))
    schedule = schedules["router"]
    schedule.check_fits(args.path, args.num_sampling_steps, dit.depth)
    z, y = inputs(dit, args.images, device)
    denoise = sampling.make_denoiser(dit, create_diffusion(schedule.steps), y, CFG_SCALE, schedule)
    work = schedule.multiply_adds(dit.multiply_adds())
    cheapest = work.argmin().item()
    # The first step also computes the modulations of later steps: take another full step if there is one.
    full = max(
        (i for i in range(cheapest + 1, schedule.steps - 1) if work[i] == work.max()), default=schedule.steps - 1
    )
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    times = {}
    with torch.inference_mode():
        x = torch.cat([z, z])
        for i in range(schedule.steps - 1, cheapest - 1, -1):
            if i not in (full, cheapest):
                denoise(x, i)
                continue
            with torch.profiler.profile(activities=activities) as profiled:
                denoise(x, i)
                devices.synchronize(device)
            times[i] = dict.fromkeys([*KINDS, "the rest"], 0.0)
            # A kernel's time is also reported for the operation that launches it, whose name is the same on any GPU.
            for event in profiled.key_averages():
                if event.device_type == DeviceType.CPU:
                    kind = next(
                        (k for k, names in KINDS.items() if any(name in event.key for name in names)), "the rest"
                    )
                    microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
                    times[i][kind] += microseconds / 1000
    rows = []
    for kind in times[full]:
        cells = [f"{times[i][kind]:.2f} ({times[i][kind] / sum(times[i].values()):.0%})" for i in (full, cheapest)]
        rows.append([kind, *cells])
    run = int(schedule.compute[cheapest].sum())
    return common.markdown(
        rows, ["milliseconds of", f"a full step ({2 * dit.depth} layers run)", f"a cached step ({run} run)"]
    )


def table(records):
    """A title and a Markdown table with a row for each way to run, for each record."""
    return "\n\n".join(map(record_table, records))


def record_table(record):
    flags, rows = record["flags"], []
    for row in record["rows"]:
        full, reference, error, peak = (row[k] for k in ("against_full", "against_reference", "error", "peak_bytes"))
        against_full = f"{full or 0:.3f} ({row['bound_against_full']:.3f})"
        rows.append(
            {
                "schedule": row["schedule"],
                "mode": row["mode"],
                "dtype": row["dtype"],
                "seconds": f"{statistics.median(row['seconds']):.4g}",
                "against the reference": f"{reference:.3f}" if reference else "",
                "against full (bound)": "" if row["schedule"] == "full" else against_full,
                "T multiply-adds": f"{row['multiply_adds'] / 1e12:.3g}",
                "G/s": f"{row['rate'] / 1e9:.4g}",
                "plain products, G/s": f"{row['matrix_product_rate'] / 1e9:.4g}",
                "share": f"{row['share_of_matrix_product']:.1%}",
                "error": "" if error is None else f"{error:.1e}",
                "cache MB": f"{row['cache_bytes'] / 1e6:.3g}",
                "peak MB": f"{peak / 1e6:,.0f}" if peak else "",
                "first, s": f"{row['first']:.3g}",
            }
        )
    title = (
        f"{flags['ckpt'] or flags['model']}, {flags['num_sampling_steps']} steps, {flags['images']} image(s) with "
        f"guidance, {record['device']}, PyTorch {record['torch']}, {flags['repeats']} round(s)"
    )
    return f"{title}\n\n{common.markdown(rows)}"


def main(args):
    if args.profile:
        print(profile(args))
    else:
        common.run_benchmark(args, "latency-*", measure, table)


if __name__ == "__main__":
    cli.run(main, parse_args())
