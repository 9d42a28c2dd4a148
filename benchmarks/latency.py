"""Where the time of sampling goes and what shortens it: a model with and without a router, in every way to run it.

    python -m benchmarks.latency --ckpt ckpt/fashion_mnist --path ckpt/fashion_mnist/DDIM20_router.pt --reference
    python -m benchmarks.latency --model DiT-XL/2 --path ckpt/DDIM20_router.pt --reference --quick
    python -m benchmarks.latency --ckpt ckpt/fashion_mnist --path ckpt/fashion_mnist/DDIM20_router.pt --profile
    python -m benchmarks.latency --table            # the tables of the records there are

All rows run in turn in one process, `--repeats` times, from the same noise; a ratio is the median over the rounds. The
times are those of the diffusion loop with guidance. Without --ckpt the weights are random.

"reference" does what the original implementation does. "eager" is sample.py as it is, "compile" and "graphs" are its
flags --compile and --cuda-graphs. "First" is what came before: two steps with all that is done once (compiling), or
recording a graph. "Peak" is the weights and the most that a row took beside them (a GPU's alone).
"""

from pathlib import Path

from benchmarks.common import markdown, read_records
from runtime import cli

ROOT = Path(__file__).resolve().parent.parent


CFG_SCALE = 4.0  # as published for pictures; a step takes as long with any but 1
MODES = ["eager", "compile", "graphs", "compile+graphs"]


def parse_args(argv=None):
    parser = cli.ArgumentParser(description="Seconds of the diffusion loop in every way to run it.")
    parser.add_argument("--model", default="DiT-XL/2", help="size and patch, with random weights; not with --ckpt")
    parser.add_argument(
        "--image-size", type=int, choices=[256, 512], default=256, help="pixels a side; not with --ckpt"
    )
    parser.add_argument("--ckpt", help="as sample.py takes it")
    parser.add_argument("--path", help="router file; without it only the full model runs")
    parser.add_argument("--thres", type=cli.fraction, default=0.1, help="of the router")
    parser.add_argument("--num-sampling-steps", type=cli.sampling_steps, default=20, help="denoising steps")
    parser.add_argument("--images", type=cli.positive, default=1, help="of a batch; guidance doubles it")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=["fp32", "tf32", "bf16", "fp16"],
        help="without it fp32 and bf16, on a GPU also tf32 and fp16",
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, help="without it all that the device can do")
    parser.add_argument("--reference", action="store_true", help="also as the original implementation does it")
    parser.add_argument("--repeats", type=cli.positive, default=5, help="rounds, after each row was warmed up")
    parser.add_argument("--quick", action="store_true", help="one round, eager only: minutes on a CPU")
    cli.add_device_argument(parser)
    cli.add_record_argument(parser)
    parser.add_argument(
        "--profile", action="store_true", help="only where the time of a full and of a cached step goes"
    )
    parser.add_argument("--table", action="store_true", help="measure nothing, print those of results/latency-*.json")
    args = parser.parse_args(argv)
    if args.profile and not args.path:
        parser.error("--profile needs a cached step: add --path")
    if args.quick:
        args.repeats, args.modes = 1, ["eager"]
    return args


def make_models(load, dtypes, modes):
    """{(dtype, whether compiled): DiT}; `load` makes one in float32. Models of one precision share their weights."""
    import copy

    from runtime import devices

    models = {}
    for dtype in sorted(dtypes, key=["bf16", "fp16", "fp32", "tf32"].index):
        same = next((models[d, False] for d in ("fp32", "tf32") if (d, False) in models), None)
        models[dtype, False] = dit = same if same and dtype == "tf32" else devices.set_precision(load(), dtype)
        if any("compile" in mode for mode in modes):
            compiled = copy.deepcopy(dit, {id(parameter): parameter for parameter in dit.parameters()})
            devices.compile_blocks(compiled.blocks)
            models[dtype, True] = compiled
    return models


def make_rows(args, device, dtypes, modes, models, schedules):
    """{(schedule, mode, dtype): two functions that sample}, one to warm up with, z and y -> latents.

    Two steps in which blocks reuse neither layer, either and both do once whatever is done once; a graph is recorded.
    """
    from functools import partial

    import sampling
    from diffusion import create_diffusion
    from runtime import devices

    diffusion, short = create_diffusion(args.num_sampling_steps), create_diffusion(2)
    rows = {}

    def warm(schedule):
        return schedule and every_kind(schedule.depth)

    for dtype in dtypes:
        for mode in modes:
            make = partial(sampling.make_sampler, models[dtype, "compile" in mode], cfg_scale=CFG_SCALE)
            for name, schedule in schedules.items():
                if "graphs" in mode:
                    rows[name, mode, dtype] = [make(diffusion, schedule=schedule, cuda_graphs=True)] * 2
                else:
                    rows[name, mode, dtype] = make(diffusion, schedule=schedule), make(short, schedule=warm(schedule))
    if args.reference:
        from benchmarks.original import original_latents

        published = devices.pick_dtype(None, device)
        for name, schedule in schedules.items():
            make = partial(partial, original_latents, models[published, False], cfg_scale=CFG_SCALE)
            rows[name, "reference", published] = (
                make(diffusion, schedule=schedule),
                make(short, schedule=warm(schedule)),
            )
    return rows


def every_kind(depth):
    """A schedule of two steps: a full one, then blocks that reuse neither layer, either and both in turn."""
    import torch

    from schedule import Schedule

    kinds = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    return Schedule(torch.stack([kinds[torch.arange(depth) % 4], torch.ones(depth, 2, dtype=torch.bool)]))


def inputs(dit, images, device):
    """Noise z (N, C, h, w) and labels y (N,), always the same."""
    import torch

    generator = torch.Generator().manual_seed(0)
    z = torch.randn(images, dit.in_channels, dit.input_size, dit.input_size, generator=generator)
    return z.to(device), torch.arange(images, device=device) % dit.num_classes


def measure(args, device, dtypes, modes, load, schedules):
    """The figures of all rows, a list of dicts for JSON."""
    import statistics
    import time

    import torch

    from runtime import devices
    from schedule import Schedule

    models = make_models(load, dtypes, modes)
    dit = next(iter(models.values()))
    if "router" in schedules:
        schedules["router"].check_fits(args.path, args.num_sampling_steps, dit.depth)
    rows = make_rows(args, device, dtypes, modes, models, schedules)
    z, y = inputs(dit, args.images, device)

    def timed(row, warm=False):
        """Latents, seconds, and the bytes that were taken at most meanwhile, beyond what was there before."""
        devices.set_precision(z, row[2])  # the TF32 of the process
        before = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = devices.peak_memory(device)
        devices.synchronize(device)
        start = time.perf_counter()
        latents = rows[row][warm](z, y)
        devices.synchronize(device)
        return latents, time.perf_counter() - start, devices.peak_memory(device) - before

    seconds, latents, first, peaks = {row: [] for row in rows}, {}, {}, {}
    for row in rows:
        _, first[row], peaks[row] = timed(row, warm=True)
    for _ in range(args.repeats):
        for row in rows:  # in turn, so that a machine that slows down slows all
            latents[row], elapsed, peak = timed(row)
            seconds[row].append(elapsed)
            if "graphs" not in row[1]:  # whose memory is taken when they are recorded, and kept
                peaks[row] = peak
    if device.type == "cuda":
        for name, mode, dtype in rows:
            weights = models[dtype, "compile" in mode].parameters()
            peaks[name, mode, dtype] += sum(parameter.nbytes for parameter in weights)
    else:  # there the peak is that of the process, and says nothing about a row
        peaks = dict.fromkeys(rows)
    products = {}
    for dtype in dict.fromkeys(row[2] for row in rows):
        devices.set_precision(z, dtype)
        block, tokens = models[dtype, False].blocks[0], dit.pos_embed.shape[1]
        layers = block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2
        products[dtype] = devices.matmul_rate(layers, 2 * args.images * tokens)

    def ratio(slow, fast):
        # Neighbouring runs share the state of the machine: the median of their ratios.
        return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast])) if slow in seconds else None

    costs = dit.multiply_adds()
    plans = {name: plan or Schedule.full(args.num_sampling_steps, dit.depth) for name, plan in schedules.items()}
    published = devices.pick_dtype(None, device)
    exact = {name: latents[row] for name in plans for row in [(name, "eager", "fp32")] if row in latents}
    figures = []
    for row in rows:
        name, mode, dtype = row
        work = 2 * args.images * plans[name].multiply_adds(costs).sum().item()
        rate = work / statistics.median(seconds[row])
        error = None
        if name in exact:
            error = ((latents[row] - exact[name]).abs().max() / exact[name].abs().max()).item()
        figures.append(
            {
                "schedule": name,
                "mode": mode,
                "dtype": dtype,
                "seconds": seconds[row],
                "first": first[row],
                "multiply_adds": work,
                "rate": rate,
                "matrix_product_rate": products[dtype],
                "share_of_matrix_product": rate / products[dtype],
                "against_reference": ratio((name, "reference", published), row),
                "against_full": ratio(("full", mode, dtype), row),
                "bound_against_full": plans[name].speedup_bound(costs),
                "error": error,
                "peak_bytes": peaks[row],
                "cache_bytes": dit.cache_bytes(2 * args.images, devices.DTYPES[dtype]) if name != "full" else 0,
            }
        )
    return figures


# What the operations of PyTorch that a step spends its time in belong to, by parts of their names.
KINDS = {
    "matrix products": ("addmm", "::mm", "bmm", "convolution"),
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention", "cudnn_attention"),
    "GELU": ("gelu",),
    "LayerNorm": ("layer_norm",),
    "modulation, gates, sums": ("addcmul", "::add", "::mul", "::sub"),
    "copies": ("copy", "::cat", "repeat", "clone"),
}


def profile(dit, schedule, args, device):
    """The Markdown table of the shares of time in one full and in the cheapest cached step, with their milliseconds."""
    from functools import partial

    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    import sampling
    from diffusion import create_diffusion
    from runtime import devices

    diffusion = create_diffusion(args.num_sampling_steps)
    z, y = inputs(dit, args.images, device)
    denoise = sampling.make_denoiser(dit, diffusion, y, CFG_SCALE, schedule)
    work = schedule.multiply_adds(dit.multiply_adds())
    cheapest = work.argmin().item()
    # Not the first, if there is another: it also computes the modulations of the steps after it.
    between = [i for i in range(cheapest + 1, schedule.steps - 1) if work[i] == work.max()]
    full = max(between, default=schedule.steps - 1)
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    activity = partial(torch.profiler.profile, activities=activities)
    times = {}
    with torch.inference_mode():
        x = torch.cat([z, z])
        for i in range(schedule.steps - 1, cheapest - 1, -1):
            if i not in (full, cheapest):
                denoise(x, i)
                continue
            with activity() as profiled:
                denoise(x, i)
                devices.synchronize(device)
            times[i] = shares = dict.fromkeys([*KINDS, "the rest"], 0.0)
            # What kernels take is told of the operations that launch them, too, and these have the same names anywhere.
            for event in (event for event in profiled.key_averages() if event.device_type == DeviceType.CPU):
                kind = next((k for k, parts in KINDS.items() if any(part in event.key for part in parts)), "the rest")
                shares[kind] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000
    rows = []
    for kind in times[full]:
        cells = [f"{times[i][kind]:.2f} ({times[i][kind] / sum(times[i].values()):.0%})" for i in (full, cheapest)]
        rows.append([kind, *cells])
    run = int(schedule.compute[cheapest].sum())
    head = ["milliseconds of", f"a full step ({2 * dit.depth} layers run)", f"a cached step ({run} run)"]
    return markdown(head, rows)


def table(record):
    """The Markdown text of one record: a title, then a line a row."""
    import statistics

    def number(value, form):
        return "" if value is None else format(value, form)

    flags = record["flags"]
    head = ["schedule", "mode", "dtype", "seconds", "against the reference", "against full (bound)", "T multiply-adds"]
    head += ["G/s", "plain products, G/s", "share", "error", "cache MB", "peak MB", "first, s"]
    rows = []
    for row in record["rows"]:
        against_full = f"{number(row['against_full'], '.3f')} ({row['bound_against_full']:.3f})"
        rows.append(
            [
                row["schedule"],
                row["mode"],
                row["dtype"],
                f"{statistics.median(row['seconds']):.4g}",
                number(row["against_reference"], ".3f"),
                "" if row["schedule"] == "full" else against_full,
                f"{row['multiply_adds'] / 1e12:.3g}",
                f"{row['rate'] / 1e9:.4g}",
                f"{row['matrix_product_rate'] / 1e9:.4g}",
                f"{row['share_of_matrix_product']:.1%}",
                number(row["error"], ".1e"),
                f"{row['cache_bytes'] / 1e6:.3g}",
                number(row["peak_bytes"] and row["peak_bytes"] / 1e6, ",.0f"),
                f"{row['first']:.3g}",
            ]
        )
    title = (
        f"{flags['ckpt'] or flags['model']}, {flags['num_sampling_steps']} steps, {flags['images']} image(s) with "
        f"guidance, {record['device']}, PyTorch {record['torch']}, {flags['repeats']} round(s)"
    )
    return f"{title}\n\n{markdown(head, rows)}"


def main(args):
    if args.table:
        print("\n\n".join(table(record) for record in read_records("latency-*")))
        return

    import torch

    from pretrained.loading import load_dit
    from pretrained.spec import model_spec
    from router import load_schedule
    from runtime import devices, records
    from runtime.errors import UserError
    from runtime.files import check_writable

    device = devices.pick_device(args.device)
    if args.record:
        check_writable(args.record)
    on_gpu = device.type == "cuda"
    dtypes = args.dtypes or ["fp32", "bf16", *(["tf32", "fp16"] if on_gpu else [])]
    published = devices.pick_dtype(None, device)
    if args.reference and published not in dtypes:
        raise UserError(f"--reference is in {published} as published: add that to --dtypes")
    modes = args.modes or [mode for mode in MODES if on_gpu or "graphs" not in mode]
    if not on_gpu and any("graphs" in mode for mode in modes):
        raise UserError(f"CUDA graphs need a CUDA device and this is {device}: leave them out of --modes")
    schedules = {"full": None}
    spec = model_spec(args.model, args.image_size, ckpt=args.ckpt)
    if args.path:
        schedules["router"], _ = load_schedule("dynamiclayer", args.path, args.thres)
    load = lambda: load_dit(spec, device, None if args.ckpt else 0)  # noqa: E731
    if args.profile:
        dit = devices.set_precision(load(), (args.dtypes or [published])[0])
        schedules["router"].check_fits(args.path, args.num_sampling_steps, dit.depth)
        print(profile(dit, schedules["router"], args, device))
        return
    rows = measure(args, device, dtypes, modes, load, schedules)
    record = {"flags": vars(args), "device": devices.device_name(device), "torch": torch.__version__, "rows": rows}
    print(table(record))
    if args.record:
        records.write_record(args.record, vars(args), device, {"dtype": None, "rows": rows})


if __name__ == "__main__":
    cli.run(main, parse_args())
