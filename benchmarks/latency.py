"""Where the time of sampling goes and what shortens it: a model with and without a router or plans, run in every way.

    python -m benchmarks.latency --ckpt ckpt/fashion_mnist --path ckpt/fashion_mnist/DDIM20_router.pt --reference
    python -m benchmarks.latency --model DiT-XL/2 --path ckpt/DDIM20_router.pt --reference --modes eager --repeats 1
    python -m benchmarks.latency --ckpt ckpt/fashion_mnist --path ckpt/fashion_mnist/DDIM20_router.pt --profile
    python -m benchmarks.latency --table

All rows run in turn in one process, `--repeats` times, from the same noise; a ratio is the median over the rounds. The
times are those of the diffusion loop with guidance. Without --ckpt the weights are random.

"reference" does what the original implementation does. "eager" is sample.py without flags, "compile" and "graphs" are
its flags --compile and --cuda-graphs. "compile+gelu" also has its --experimental gelu, and its time and latents are set
against those of "compile". "First" is the time of the first run, of two steps or of capturing a CUDA graph.
"Peak" is the weights and what a row takes beside them at most (on a GPU only).
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import common
from runtime import cli

CFG_SCALE = 4.0  # as published for pictures; a step takes as long with any other but 1
MODES = ["eager", "compile", "graphs", "compile+graphs"]


@dataclass
class Row:
    """A way to run, and its measurements."""

    schedule: str  # "full", "router" or a plan
    mode: str  # one of MODES, perhaps with names of --experimental, as "compile+gelu"; or "reference"
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

    def differs_from(self, other):
        """The largest difference of the latents of two rows, relative to the largest value of the other."""
        return ((self.latents - other.latents).abs().max() / other.latents.abs().max()).item()


def parse_args(argv=None):
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="DiT-XL/2", help="size and patch, with random weights; not with --ckpt")
    parser.add_argument("--ckpt", help="weights or a model folder, as for sample.py")
    parser.add_argument("--path", help="router file")
    parser.add_argument("--plans", nargs="+", default=[], metavar="JSON", help="schedule files, which also run")
    cli.add_threshold_argument(parser)
    parser.add_argument("--num-sampling-steps", type=cli.sampling_steps, default=20, help="denoising steps")
    parser.add_argument("--images", type=cli.positive, default=1, help="images of a batch; guidance doubles it")
    dtypes, default = ["fp32", "tf32", "bf16", "fp16"], "default: fp32 and bf16, on a GPU also tf32 and fp16"
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, help=default)
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: all that the device can run")
    switches = [name for name in cli.EXPERIMENTAL if name != "vae-fp16"]
    also = f"{', '.join(switches)}: also run the compiled modes in bf16 with these switches of sample.py, all at once"
    parser.add_argument("--experimental", nargs="+", choices=switches, metavar="NAME", help=also)
    parser.add_argument("--reference", action="store_true", help="also run as the original implementation does")
    parser.add_argument("--repeats", type=cli.positive, default=5, help="rounds, after each row was warmed up")
    cli.add_device_argument(parser)
    profile = "only print where the time of a full and of a cached step goes"
    parser.add_argument("--profile", action="store_true", help=profile)
    args = parser.parse_args(argv)
    args.experimental = args.experimental or []
    if args.profile and not (args.path or args.plans):
        parser.error("--profile needs a cached step: add --path or --plans")
    return args


def load(args, device):
    """A function that makes the DiT in float32, and the schedules by name: "full", "router", those of plans."""
    from pretrained.loading import load_dit
    from pretrained.spec import model_spec
    from router import Router
    from runtime import released
    from schedule import Schedule

    spec, schedules = model_spec(args.model, ckpt=args.ckpt), {"full": None}
    if args.path:
        schedules["router"] = Router.load(released.find(args.path)).schedule(args.thres)
    schedules |= {Path(path).stem: Schedule.load(path, spec.depth) for path in args.plans}
    for name, schedule in schedules.items():
        if schedule:
            schedule.check_fits(args.path if name == "router" else name, args.num_sampling_steps, spec.depth)
    return partial(load_dit, spec, device, None if args.ckpt else 0), schedules


def make_models(load, kinds):
    """{kind: DiT} for `kinds`, each (dtype, whether compiled, *names of --experimental).

    load() makes a float32 DiT. Models of one precision share their weights.
    """
    from runtime import devices

    models, plain = {}, {}
    for kind in sorted(kinds):  # half precisions first: they free the float32 weights that they are made from
        dtype, compiled, *experimental = kind
        if dtype not in plain:
            same = plain.get("fp32") if dtype == "tf32" else None
            plain[dtype] = same or devices.set_precision(load(), dtype)
        models[kind] = common.share_weights(plain[dtype]) if compiled else plain[dtype]
        devices.speed_up_blocks(models[kind].blocks, experimental)
        if compiled:
            devices.compile_blocks(models[kind].blocks, experimental=experimental)
    return models


def kind_of(mode, dtype):
    """The kind of model, as for `make_models`, that a mode runs."""
    names = mode.split("+")
    return dtype, "compile" in names, *(name for name in names if name in cli.EXPERIMENTAL)


def every_kind(depth, order):
    """A schedule of two steps: a full one, then blocks that reuse neither layer, either and both in turn."""
    import torch

    from schedule import Schedule

    kinds = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    return Schedule(torch.stack([kinds[torch.arange(depth) % 4], torch.ones(depth, 2, dtype=torch.bool)]), order)


def make_rows(ways, steps, models, schedules):
    """A `Row` for each of `ways`, (schedule, mode, dtype).

    The warm-up triggers everything that happens once: two steps with every kind of block, or capturing a CUDA graph.
    """
    import sampling
    from benchmarks.original import original_latents
    from diffusion import create_diffusion

    diffusion, short = create_diffusion(steps), create_diffusion(2)
    rows = []
    for name, mode, dtype in ways:
        dit, schedule = models[kind_of(mode, dtype)], schedules[name]
        if "graphs" in mode:
            sampler = warm_up = sampling.make_sampler(dit, diffusion, CFG_SCALE, schedule, cuda_graphs=True)
        else:
            sample = original_latents if mode == "reference" else sampling.sample_latents
            sampler = partial(sample, dit, diffusion, cfg_scale=CFG_SCALE, schedule=schedule)
            warm_up = partial(
                sample, dit, short, cfg_scale=CFG_SCALE, schedule=schedule and every_kind(dit.depth, schedule.order)
            )
        rows.append(Row(name, mode, dtype, dit, sampler, warm_up))
    return rows


def inputs(dit, images, device):
    """Noise z (N, C, h, w) and labels y (N,), the same in every call."""
    import torch

    generator = torch.Generator().manual_seed(0)
    z = torch.randn(images, dit.in_channels, dit.input_size, dit.input_size, generator=generator)
    return z.to(device), torch.arange(images, device=device) % dit.num_classes


def measure(args):
    """Figures of all rows: {"rows": [...]}."""
    from runtime import devices
    from runtime.errors import UserError
    from schedule import Schedule

    device, steps = devices.pick_device(args.device, experimental=args.experimental), args.num_sampling_steps
    on_gpu = device.type == "cuda"
    dtypes = args.dtypes or ["fp32", "bf16", *(["tf32", "fp16"] if on_gpu else [])]
    modes = args.modes or [mode for mode in MODES if on_gpu or "graphs" not in mode]
    published = devices.pick_dtype(None, device)
    if args.reference and published not in dtypes:
        raise UserError(f"--reference runs in {published}, as published: add {published} to --dtypes")
    if not on_gpu and any("graphs" in mode for mode in modes):
        raise UserError(f"CUDA graphs need a CUDA device and this is {device}: leave them out of --modes")
    compiled = [mode for mode in modes if "compile" in mode]
    if args.experimental and not (compiled and "bf16" in dtypes):
        raise UserError("--experimental runs compiled and in bf16: add them to --modes and --dtypes")
    load_model, schedules = load(args, device)
    ways = [(name, mode, dtype) for dtype in dtypes for mode in modes for name in schedules]
    switches = "+".join(args.experimental)
    ways += [(name, f"{mode}+{switches}", "bf16") for mode in compiled for name in schedules if switches]
    ways += [(name, "reference", published) for name in schedules if args.reference]
    plain = {kind_of("", dtype) for dtype in dtypes}
    models = make_models(load_model, plain | {kind_of(mode, dtype) for _, mode, dtype in ways})
    dit = next(iter(models.values()))
    rows = make_rows(ways, steps, models, schedules)
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
        model = devices.set_precision(models[kind_of("", dtype)], dtype)  # turns TF32 on or off
        rates[dtype] = devices.matmul_rate(model.block_linears(), 2 * args.images * dit.pos_embed.shape[1])
    plans = {name: schedule or Schedule.full(steps, dit.depth) for name, schedule in schedules.items()}
    found = dict(zip(ways, rows))
    return {"dtype": None, "rows": [figures(way, found, plans, published, args.images, rates) for way in ways]}


def figures(way, rows, plans, published, images, rates):
    """The figures of the row of a way, for JSON.

    rows: {way: `Row`}. plans: {name: `Schedule`}. published: precision of the reference.
    rates: {dtype: multiply-adds a second of plain products}.
    """
    from runtime.devices import DTYPES

    schedule, mode, dtype = way
    row, plan, costs = rows[way], plans[schedule], rows[way].dit.multiply_adds()
    work = 2 * images * plan.multiply_adds(costs).sum().item()
    rate = work / statistics.median(row.seconds)
    reference, exact = rows.get((schedule, "reference", published)), rows.get((schedule, "eager", "fp32"))
    without = "+".join(name for name in mode.split("+") if name not in cli.EXPERIMENTAL)
    plain = rows[schedule, without, dtype] if without != mode else None
    weights = sum(parameter.nbytes for parameter in row.dit.parameters())
    return {
        "schedule": schedule,
        "mode": mode,
        "dtype": dtype,
        "seconds": row.seconds,
        "first": row.first,
        "multiply_adds": work,
        "rate": rate,
        "matrix_product_rate": rates[dtype],
        "share_of_matrix_product": rate / rates[dtype],
        "against_reference": reference and common.median_ratio(reference.seconds, row.seconds),
        "against_full": common.median_ratio(rows["full", mode, dtype].seconds, row.seconds),
        "bound_against_full": plan.speedup_bound(costs),
        "error": exact and row.differs_from(exact),
        "against_plain": plain and common.median_ratio(plain.seconds, row.seconds),
        "error_against_plain": plain and row.differs_from(plain),
        # On a CPU the peak is known of the whole process only.
        "peak_bytes": row.peak + weights if row.latents.is_cuda else None,
        "cache_bytes": 0 if schedule == "full" else row.dit.cache_bytes(2 * images, DTYPES[dtype], plan.order),
    }


# Kinds of PyTorch's operations, by parts of their names; what fits none is "the rest".
KINDS = {
    "matrix products": ("addmm", "::mm", "bmm", "convolution"),
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention", "cudnn_attention"),
    "GELU": ("gelu",),
    "LayerNorm": ("layer_norm",),
    "modulation, gates, sums": ("addcmul", "::add", "::mul", "::sub"),
    "copies": ("copy", "::cat", "repeat", "clone"),
    "the rest": ("",),
}


def profile(args):
    """A Markdown table of the milliseconds, and their shares, in one full step and in the cheapest cached step."""
    import torch

    import sampling
    from diffusion import create_diffusion
    from runtime import devices

    device = devices.pick_device(args.device)
    load_model, schedules = load(args, device)
    dit = devices.set_precision(load_model(), args.dtypes[0] if args.dtypes else devices.pick_dtype(None, device))
    schedule = list(schedules.values())[1]  # the first after the full run
    z, y = inputs(dit, args.images, device)
    denoise = sampling.make_denoiser(dit, create_diffusion(schedule.steps), y, CFG_SCALE, schedule)
    work, first = schedule.multiply_adds(dit.multiply_adds()), schedule.steps - 1
    cheapest = work.argmin().item()
    # The first step also computes the modulations of later steps: take another full step if there is one.
    full = max((i for i in range(cheapest + 1, first) if work[i] == work.max()), default=first)
    times = {}
    with torch.inference_mode():
        x = torch.cat([z, z])
        for i in range(first, cheapest - 1, -1):
            step = partial(denoise, x, i)
            times[i] = milliseconds(step, device) if i in (full, cheapest) else step()
    run = schedule.compute[cheapest].sum()
    steps = [(f"a full step ({2 * dit.depth} layers run)", full), (f"a cached step ({run} run)", cheapest)]
    rows = []
    for kind in KINDS:
        cells = {head: f"{times[i][kind]:.2f} ({times[i][kind] / sum(times[i].values()):.0%})" for head, i in steps}
        rows.append({"milliseconds of": kind, **cells})
    return common.markdown(rows)


def milliseconds(step, device):
    """Milliseconds that step() spends in each of KINDS."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from runtime import devices

    on_gpu = device.type == "cuda"
    with profiler(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
        step()
        devices.synchronize(device)
    times = dict.fromkeys(KINDS, 0.0)
    # A kernel's time is also reported for the operation that launches it, whose name is the same on any GPU.
    for event in profiled.key_averages():
        if event.device_type == DeviceType.CPU:
            kind = next(kind for kind, names in KINDS.items() if any(name in event.key for name in names))
            times[kind] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000
    return times


def table(records):
    """A title and a Markdown table with a row for each way to run, for each record."""
    return "\n\n".join(f"{title(record)}\n\n{common.markdown(list(map(cells, record['rows'])))}" for record in records)


def title(record):
    flags = record["flags"]
    return (
        f"{flags['ckpt'] or flags['model']}, {flags['num_sampling_steps']} steps, {flags['images']} image(s) with "
        f"guidance, {record['device']}, PyTorch {record['torch']}, {flags['repeats']} round(s)"
    )


def cells(row):
    full, plain = row["schedule"] == "full", row.get("against_plain")
    return {
        **{name: row[name] for name in ("schedule", "mode", "dtype")},
        "seconds": f"{statistics.median(row['seconds']):.4g}",
        "against the reference": f"{row['against_reference']:.3f}" if row["against_reference"] else "",
        "against full (bound)": "" if full else f"{row['against_full']:.3f} ({row['bound_against_full']:.3f})",
        "T multiply-adds": f"{row['multiply_adds'] / 1e12:.3g}",
        "G/s": f"{row['rate'] / 1e9:.4g}",
        "plain products, G/s": f"{row['matrix_product_rate'] / 1e9:.4g}",
        "share": f"{row['share_of_matrix_product']:.1%}",
        "error": "" if row["error"] is None else f"{row['error']:.1e}",
        "against plain (error)": f"{plain:.3f} ({row['error_against_plain']:.1e})" if plain else "",
        "cache MB": f"{row['cache_bytes'] / 1e6:.3g}",
        "peak MB": common.megabytes(row["peak_bytes"]) if row["peak_bytes"] else "",
        "first, s": f"{row['first']:.3g}",
    }


def main(args):
    if args.profile:
        print(profile(args))
    else:
        common.run_benchmark(args, "latency-*", measure, table=table)


if __name__ == "__main__":
    cli.run(main, parse_args())
