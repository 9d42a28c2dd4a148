"""The paper's table in small: speed and quality of the shipped model by method and number of steps.

    python -m benchmarks.table                             # all that is missing; hours on two cores, stop at any time
    python -m benchmarks.table --rows router-20,fora2-20   # only these, without the times
    python -m benchmarks.table --table                     # print the tables and draw the picture from the records

sample_ddp.py samples each row from the same noise and labels, evaluator.py judges it against the training images, and
its figures go to results/table/ROW.json. Random layers, first and last blocks reuse exactly as many layer calls as the
router for as many steps, at the steps that it decides; FORA's share follows from its interval, SmoothCache's from its
alpha. "-f1" and "-f2" in the name of a row are forecasts of order 1 and 2; the learned plans are shipped files, with
forecasts of order 2. The times of all rows are measured in one process, in turn, into results/table/timing.json: on a
machine that does nothing else.
"""

import argparse
import json
import re
import statistics
import sys
from dataclasses import dataclass
from functools import partial

from benchmarks import common
from runtime import cli, signals

# Relative to the repository, where the programs are launched.
MODEL = "ckpt/fashion_mnist"
FOLDER = "samples/table"
JUDGES = {"reference": f"{MODEL}/reference.npz", "graph": f"{MODEL}/classifier.pb"}

SAMPLES = 5000  # of a row whose record is committed
THRESHOLD = 0.1  # of the routers
RANDOM_SEED = 0  # of the random layers
BATCH, REPEATS = 64, 3  # images of a timed batch; timed rounds after the warm-up

METHODS = {
    "ddim": "DDIM",
    "router": "router",
    "random": "random layers",
    "first": "first blocks",
    "last": "last blocks",
    "fora2": "FORA, interval 2",
    "fora3": "FORA, interval 3",
    "smoothcache": "SmoothCache, alpha",
    "router-f2": "router, forecast",
    "fora2-f1": "every 2nd step, linear forecast",
    "fora2-f2": "every 2nd step, forecast",
    "fora3-f1": "every 3rd step, linear forecast",
    "fora3-f2": "every 3rd step, forecast",
    "fora4-f1": "every 4th step, linear forecast",
    "fora4-f2": "every 4th step, forecast",
    "learned": "learned plan",
}
# By number of steps: the target speed-ups of the learned plans whose files are shipped, and alphas of SmoothCache.
SETTINGS = {
    "learned": {50: ("2x", "3x", "4x"), 20: ("1.6x", "2x", "2.5x")},
    "smoothcache": {50: ("0.18",), 20: ("0.3",)},
}
# Methods, and some rows by name, whose small differences the text speaks of.
SEVERAL_SEEDS = ("ddim", "router", "router-f2", "fora3-f2-20", "learned-3x-50", "learned-2x-20")
WITH_ROUTER = (50, 20)  # numbers of steps that there is a router for


@dataclass(frozen=True)
class Row:
    """method: a key of METHODS; steps: of DDIM; setting: of SETTINGS, for a method that is there."""

    method: str
    steps: int
    setting: str = ""

    @property
    def name(self):
        return "-".join(filter(None, (self.method, self.setting, str(self.steps))))

    @property
    def seeds(self):
        """Seeds of the noise: several for the rows whose difference is the point of the table."""
        several = {self.method, self.name} & set(SEVERAL_SEEDS) and self.steps in WITH_ROUTER
        return (0, 1, 2) if several else (0,)


ROWS = tuple(
    Row(method, steps, setting)
    for steps in (50, 40, 38, 20, 16, 15, 10)
    for method in (METHODS if steps in WITH_ROUTER else ["ddim"])
    for setting in SETTINGS.get(method, {}).get(steps, [""])
)
FORECASTS = ("ddim", "router", *(method for method in METHODS if "-f" in method), "learned")
TABLES = [
    ("Fewer steps, or a router", lambda row: row.method in ("ddim", "router")),
    ("Which layers are reused", lambda row: row.steps in WITH_ROUTER and row.method not in FORECASTS[2:]),
    ("Forecasts, and plans at any step", lambda row: row.method in FORECASTS),
]


def row_list(text, rows):
    """An argparse type: those of `rows` that a text names, separated by commas."""
    by_name = {row.name: row for row in rows}
    for name in text.split(","):
        if name not in by_name:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(by_name)}")
    return [by_name[name] for name in text.split(",")]


def parse_args(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    rows = partial(row_list, rows=ROWS)
    parser.add_argument("--rows", type=rows, metavar="ROW,ROW", help="only these, as router-20; default: all")
    parser.add_argument("--processes", type=cli.positive, default=2, help="processes that sample, one thread each")
    trial = f"images of a row; any number but {SAMPLES} is a trial, kept in {FOLDER}-SAMPLES"
    parser.add_argument("--samples", type=cli.positive, default=SAMPLES, help=trial)
    parser.add_argument("--timing", action="store_true", help="measure the times again; with --rows: measure them")
    parser.add_argument("--table", action="store_true", help="make nothing, print the tables of the records")
    args = parser.parse_args(argv)
    args.folder, args.results, assets = FOLDER, common.RESULTS / "table", common.ROOT / "assets"
    if args.samples != SAMPLES:
        args.folder = f"{FOLDER}-{args.samples}"
        assets = common.ROOT / args.folder
        args.results = assets / "results"
    args.picture = assets / "table.png"
    return args


def router_path(steps):
    return f"{MODEL}/DDIM{steps}_router.pt"


def plan(row, dit):
    """The `Schedule` of a row."""
    from pretrained.spec import model_spec
    from router import Router
    from schedule import Schedule
    from training.policies import make_schedule

    depth = dit.depth
    if row.method == "ddim":
        return Schedule.full(row.steps, depth)
    if row.method == "learned":
        return Schedule.load(common.ROOT / learned_path(row))
    if row.method == "smoothcache":
        cfg_scale = model_spec(ckpt=str(common.ROOT / MODEL)).cfg_scale
        return make_schedule("smoothcache", row.steps, depth, alpha=float(row.setting), dit=dit, cfg_scale=cfg_scale)
    if "-f" in row.method:
        method, _, order = row.method.rpartition("-f")
        return plan(Row(method, row.steps), dit).with_order(int(order))
    if row.method.startswith("fora"):
        return Schedule.every_nth(row.steps, depth, int(row.method[-1]))
    routed = Router.load(common.ROOT / router_path(row.steps)).schedule(THRESHOLD)
    place = row.steps, depth, Router.trained_steps(row.steps), int((~routed.compute).sum())
    if row.method == "random":
        return Schedule.random_layers(*place, RANDOM_SEED)
    return {"router": routed, "first": Schedule.first_blocks(*place), "last": Schedule.last_blocks(*place)}[row.method]


def learned_path(row):
    return f"{MODEL}/DDIM{row.steps}_{row.setting}.json"


def schedule_path(row, folder):
    return learned_path(row) if row.method == "learned" else f"{folder}/schedules/{row.name}.pt"


def sampling_flags(row, folder, samples):
    """The flags of sample_ddp.py that make a row, without its seed, as a list of texts."""
    flags = ["--ckpt", MODEL, "--ddim-sample", "--num-fid-samples", samples, "--balanced-labels"]
    flags += ["--per-proc-batch-size", 50, "--sample-dir", folder, "--num-sampling-steps", row.steps]
    if row.method == "router":
        flags += ["--accelerate-method", "dynamiclayer", "--path", router_path(row.steps), "--thres", THRESHOLD]
    elif row.method != "ddim":
        flags += ["--accelerate-method", "schedule", "--path", schedule_path(row, folder)]
    return list(map(str, flags))


def sample(flags, seed, processes):
    """Make sample_ddp.py complete the set of these flags and this seed. Returns the Path of its .npz."""
    flags = [*flags, "--global-seed", seed]
    out = common.run_program("sample_ddp.py", *flags, processes=processes, OMP_NUM_THREADS="1")
    return common.ROOT / re.search(r"^(?:Samples: )?(.+\.npz) (?:\(\d+ images|is there already)", out, re.M)[1]


def judge(npz):
    """Metrics of evaluator.py and the classifier for a set, as a dict for JSON."""
    import hashlib

    import numpy as np

    from evaluation.inception import Graph

    report, (reference, graph) = npz.with_suffix(".json"), JUDGES.values()
    common.run_program("evaluator.py", reference, npz, "--graph", graph, "--json", report)
    with np.load(npz) as arrays:
        images, labels = arrays["arr_0"], arrays["labels"]
    return {
        "images": len(images),
        "sha256": hashlib.sha256(images).hexdigest(),
        "metrics": json.loads(report.read_text())["metrics"],
        "class_accuracy": Graph(common.ROOT / graph).class_accuracy(images, labels),
    }


def read(path):
    """The record at `path`, {} if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def fill(args):
    """Sample, judge and time what the records lack."""
    from importlib.metadata import version

    from pretrained.loading import load_dit
    from pretrained.spec import model_spec
    from runtime import devices, released
    from runtime.hashes import sha256_of_file
    from runtime.records import write_record

    device = devices.pick_device("auto")
    spec = model_spec(ckpt=str(common.ROOT / MODEL))
    dit = devices.set_precision(load_dit(spec, device), "tf32")
    costs = dit.multiply_adds()
    judges = {name: sha256_of_file(released.find(common.ROOT / path)) for name, path in JUDGES.items()}
    versions = {name: version(name) for name in ("torch", "diffusers", "numpy")}
    # All rows with seed 0 come before some of them with other seeds.
    todo = sorted((seed, number) for number, row in enumerate(ROWS) if row in (args.rows or ROWS) for seed in row.seeds)
    for seed, row in ((seed, ROWS[number]) for seed, number in todo):
        path, schedule = args.results / f"{row.name}.json", plan(row, dit)
        described = {
            "layers": schedule.compute.numel(),
            "layers_run": int(schedule.compute.sum()),
            "g_multiply_adds": schedule.multiply_adds(costs).sum().item() / 1e9,
            "bound": schedule.speedup_bound(costs),
            "sha256": schedule.sha256(),
        }
        flags = {"sample_ddp": sampling_flags(row, args.folder, args.samples)}
        known, record = {"schedule": described, "judges": judges}, read(path)
        same = {name: record.get(name) for name in ("flags", *known)} == {"flags": flags, **known}
        seeds = record["seeds"] if same else {}  # what was sampled or judged otherwise is made again
        if str(seed) in seeds:
            continue
        print(f"{row.name}, seed {seed}:", file=sys.stderr, flush=True)
        if row.method not in ("ddim", "router", "learned"):
            schedule.save(common.ROOT / schedule_path(row, args.folder))
        seeds[str(seed)] = judge(sample(flags["sample_ddp"], seed, args.processes))
        write_record(path, flags, device, {**known, "versions": versions, "seeds": dict(sorted(seeds.items()))})
    path = args.results / "timing.json"
    if args.timing or not args.rows and list(read(path).get("rows", [])) != [row.name for row in ROWS]:
        print("times of all rows, in turn:", file=sys.stderr, flush=True)
        plans = {row: plan(row, dit) for row in ROWS}
        timing = {"batch": BATCH, "cfg_scale": spec.cfg_scale, "rows": times(spec, dit, plans, device)}
        write_record(path, {}, device, timing)


def times(spec, dit, plans, device):
    """Seconds of a batch of BATCH images with guidance, and the speed-up of each row of `plans`: {its name: {...}}.

    The speed-up is against plain DDIM of as many steps.
    """
    import torch

    from diffusion import create_diffusion
    from sampling import sample_latents

    generator = torch.Generator().manual_seed(0)
    z = torch.randn(BATCH, dit.in_channels, dit.input_size, dit.input_size, generator=generator).to(device)
    y = torch.arange(BATCH, device=device) % spec.num_classes
    samplers = {}
    for row, schedule in plans.items():
        schedule = None if row.method == "ddim" else schedule
        samplers[row] = partial(sample_latents, dit, create_diffusion(row.steps), z, y, spec.cfg_scale, schedule)
    seconds = common.time_in_turn(samplers, REPEATS, device)
    return {
        row.name: {"seconds": some, "speedup": common.median_ratio(seconds[Row("ddim", row.steps)], some)}
        for row, some in seconds.items()
    }


def cells(row, record, timing):
    """A row of the tables: of seed 0, as in all rows; the FID with its standard deviation over several seeds."""
    result, schedule = record["seeds"]["0"], record["schedule"]
    measured, metrics = timing.get("rows", {}).get(row.name), result["metrics"]
    fids = [other["metrics"]["fid"] for other in record["seeds"].values()]
    return {
        "method": f"{METHODS[row.method]} {row.setting}".rstrip(),
        "steps": row.steps,
        "layers run": f"{schedule['layers_run'] / schedule['layers']:.1%}",
        "G multiply-adds": f"{schedule['g_multiply_adds']:.3f}",
        "seconds a batch": f"{statistics.median(measured['seconds']):.2f}" if measured else "",
        "speed-up": f"{measured['speedup']:.3f}" if measured else "",
        "bound": f"{schedule['bound']:.3f}",
        "IS": f"{metrics['inception_score']:.3f}",
        "FID": f"{metrics['fid']:.3f}" + (f" ± {statistics.stdev(fids):.3f}" if len(fids) > 1 else ""),
        "sFID": f"{metrics['sfid']:.3f}",
        "precision": f"{metrics['precision']:.4f}",
        "recall": f"{metrics['recall']:.4f}",
        "class accuracy": f"{result['class_accuracy']:.2%}",
    }


def tables(records, timing):
    """The tables of `records`, {row: its record}, as Markdown by title; without rows and tables that have no record."""
    rows = {title: [cells(row, records[row], timing) for row in filter(belongs, records)] for title, belongs in TABLES}
    return {title: common.markdown(some) for title, some in rows.items() if some}


def missing(records, timing):
    """Names of what has no record: rows with their seeds, the times."""
    left = {row: [s for s in row.seeds if str(s) not in records.get(row, {}).get("seeds", {})] for row in ROWS}
    names = [f"{row.name} (seed {', '.join(map(str, seeds))})" for row, seeds in left.items() if seeds]
    untimed = [row.name for row in ROWS if row.name not in timing.get("rows", {})]
    return names + ([f"the times of {', '.join(untimed)}"] if untimed else [])


def curve(row):
    """The curve of the picture that a row belongs to, and its steps or None for a curve over steps, with its text."""
    name = re.sub(r", (interval \d|alpha)", "", METHODS[row.method])
    name = re.sub(r"\d(nd|rd|th)", "n-th", name)
    setting = row.setting or (row.method[4] if row.method.startswith("fora") else "")
    return (name, row.steps if setting else None), setting or str(row.steps)


def save_curves(records, timing, path):
    """Write a PNG: FID, logarithmic, by seconds. A method has a color; a curve is over steps, or over its settings."""
    import matplotlib
    from matplotlib.figure import Figure

    from runtime.files import atomic_write

    curves = {}
    for row, record in records.items():
        if row.name in timing["rows"]:
            seconds = statistics.median(timing["rows"][row.name]["seconds"])
            key, text = curve(row)
            curves.setdefault(key, []).append((seconds, record["seeds"]["0"]["metrics"]["fid"], text))
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(8, 6), dpi=110, layout="constrained")
        axis = figure.subplots()
    names = list(dict.fromkeys(name for name, _ in curves))
    for (name, steps), points in curves.items():
        x, y, texts = zip(*sorted(points))
        number = names.index(name)
        label = name if name not in axis.get_legend_handles_labels()[1] else None
        style = {"marker": "os^v<>DP*XphH"[number % 13], "color": f"C{number % 10}", "ls": "--" if steps == 20 else "-"}
        axis.plot(x, y, markersize=5, linewidth=0.8, label=label, **style)
        for *point, text in zip(x, y, texts):
            axis.annotate(text, point, (4, 3), textcoords="offset points", fontsize=7)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.set(xlabel=f"seconds a batch of {timing['batch']} images", ylabel="FID")
    axis.legend()
    with atomic_write(path) as part:
        figure.savefig(part, format="png", metadata={"Software": None})


def show(args):
    """Print the tables of the records, and draw their picture."""
    timing = read(args.results / "timing.json")
    records = {row: read(args.results / f"{row.name}.json") for row in ROWS}
    records = {row: record for row, record in records.items() if record}
    for title, text in tables(records, timing).items():
        print(f"\n{title}:\n\n{text}")
    if records and timing:
        save_curves(records, timing, args.picture)
        print(f"\nPicture: {args.picture}")
    left = missing(records, timing)
    if left:
        print(f"\nMissing: {'; '.join(left)}")


def main(args):
    if not args.table:
        with signals.sigterm_interrupts():
            fill(args)
    show(args)


if __name__ == "__main__":
    cli.run(main, parse_args())
