"""Speed and quality of the shipped flow model: its samplers and learned plans, beside the DiT of the same size.

    python -m benchmarks.flow              # sample and judge what has no record; an hour on two cores
    python -m benchmarks.flow --timing     # the times of all rows, in turn: on a machine that does nothing else
    python -m benchmarks.flow --table      # print the table of the records

Each row is a set of sample_ddp.py from the same noise and labels, judged as the rows of benchmarks/table.py are.
"Calls" are evaluations of the model. Records go to results/flow/ROW.json and results/flow/timing.json.
"""

import statistics

from benchmarks import common, table
from runtime import cli, signals

MODEL = "ckpt/fashion_mnist_flow"
SAMPLES, BATCH, REPEATS = 5000, 64, 3  # images of a row; images of a timed batch; timed rounds after the warm-up
# Sampler, calls and plan of each row; a plan is for the Euler sampler.
ROWS = {
    "euler-50": ("euler", 50, None),
    "euler-20": ("euler", 20, None),
    "heun-20": ("heun", 20, None),
    "sde-50": ("sde", 50, None),
    "learned-2x-50": ("euler", 50, "2x"),
    "learned-3x-50": ("euler", 50, "3x"),
}
DITS = ("ddim-50", "ddim-20")  # rows of benchmarks/table.py to compare with


def parse_args(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="only these")
    parser.add_argument("--processes", type=cli.positive, default=2, help="processes that sample, one thread each")
    parser.add_argument("--samples", type=cli.positive, default=SAMPLES, help="images of a row; fewer are a trial")
    parser.add_argument("--timing", action="store_true", help="measure the times of the rows instead")
    parser.add_argument("--table", action="store_true", help="make nothing, print the table of the records")
    args = parser.parse_args(argv)
    args.folder = "samples/flow" if args.samples == SAMPLES else f"samples/flow-{args.samples}"
    args.results = common.RESULTS / "flow" if args.samples == SAMPLES else common.ROOT / args.folder / "results"
    return args


def plan_path(name):
    """The file of a row's plan, relative to the repository, or None."""
    _, steps, plan = ROWS[name]
    return plan and f"{MODEL}/Euler{steps}_{plan}.json"


def flags_of(name, args):
    """The flags of sample_ddp.py that make a row, as a list of texts."""
    sampler, steps, plan = ROWS[name]
    flags = ["--ckpt", MODEL, "--sampler", sampler, "--num-sampling-steps", steps, "--balanced-labels"]
    flags += ["--num-fid-samples", args.samples, "--per-proc-batch-size", 50, "--sample-dir", args.folder]
    flags += ["--accelerate-method", "schedule", "--path", plan_path(name)] if plan else []
    return list(map(str, flags))


def fill(args):
    """Sample and judge the rows that have no record of these flags and this model."""
    from runtime.devices import pick_device
    from runtime.hashes import sha256_of_file
    from runtime.records import write_record

    weights = sha256_of_file(common.ROOT / MODEL / "dit.safetensors")
    for name in args.rows:
        path, flags = args.results / f"{name}.json", {"sample_ddp": flags_of(name, args)}
        record = table.read(path)
        if (record.get("flags"), record.get("weights")) != (flags, weights):
            figures = {"weights": weights} | table.judge(table.sample(flags["sample_ddp"], 0, args.processes))
            write_record(path, flags, pick_device("auto"), figures)


def measure_times(args):
    """Write timing.json: seconds of a batch with guidance for each row, and its speed-up over Euler without a plan."""
    from functools import partial

    import torch

    from pretrained.loading import load_dit
    from pretrained.spec import model_spec
    from runtime import devices
    from runtime.records import write_record
    from sampling import sample_latents
    from schedule import Schedule

    device = devices.pick_device("auto")
    spec = model_spec(ckpt=str(common.ROOT / MODEL))
    dit = devices.set_precision(load_dit(spec, device), "tf32")
    shape, generator = (dit.in_channels, dit.input_size, dit.input_size), torch.Generator().manual_seed(0)
    z, y = torch.randn(BATCH, *shape, generator=generator).to(device), torch.arange(BATCH, device=device)
    samplers, bounds = {}, {}
    for name in args.rows:
        sampler, steps, _ = ROWS[name]
        path = plan_path(name)
        schedule = path and Schedule.load(common.ROOT / path)
        bounds[name] = schedule.speedup_bound(dit.multiply_adds()) if schedule else 1.0
        how = dit, spec.make_process(steps, sampler), z, y % spec.num_classes, spec.guidance(None, 1.0), schedule
        samplers[name] = partial(sample_latents, *how)
    seconds = common.time_in_turn(samplers, REPEATS, device)
    rows = {}
    for name, some in seconds.items():
        whole = seconds.get(f"euler-{ROWS[name][1]}", some)
        rows[name] = {"seconds": some, "speedup": common.median_ratio(whole, some), "bound": bounds[name]}
    write_record(args.results / "timing.json", {"rows": args.rows}, device, {"batch": BATCH, "rows": rows})


def show(args):
    """Print the table of the records, with those of the DiT."""
    timing, rows = table.read(args.results / "timing.json").get("rows", {}), []
    dits = {name: table.read(common.RESULTS / "table" / f"{name}.json") for name in DITS}
    records = {f"DiT, {name}": record["seeds"]["0"] for name, record in dits.items() if record}
    records |= {name: table.read(args.results / f"{name}.json") for name in ROWS}
    for name, record in records.items():
        if not record:
            continue
        times, metrics = timing.get(name), record["metrics"]
        cells = {"row": name, "calls": name.rpartition("-")[2]}
        cells |= {"seconds a batch": f"{statistics.median(times['seconds']):.2f}" if times else ""}
        cells |= {key: f"{times[key]:.3f}" if times else "" for key in ("speedup", "bound")}
        cells |= {"FID": f"{metrics['fid']:.3f}", "IS": f"{metrics['inception_score']:.3f}"}
        rows.append(cells | {"class accuracy": f"{record['class_accuracy']:.2%}"})
    print(common.markdown(rows))


def main(args):
    if not args.table:
        with signals.sigterm_interrupts():
            (measure_times if args.timing else fill)(args)
    show(args)


if __name__ == "__main__":
    cli.run(main, parse_args())
