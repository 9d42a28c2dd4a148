"""The paper's table in small: speed and quality of the shipped model by method and number of steps.

    python -m benchmarks.table                             # all that is missing; hours on two cores, stop at any time
    python -m benchmarks.table --rows router-20,fora2-20   # only these, without the times
    python -m benchmarks.table --table                     # the tables and the picture of the records there are

sample_ddp.py samples each row from the same noise and labels, evaluator.py judges it against the training images, and
its figures go to results/table/ROW.json. Random layers, first and last blocks reuse exactly as many layer calls as the
router for as many steps, at the steps that it decides; FORA's share follows from its interval. The times of all rows
are measured in one process, in turn, into results/table/timing.json: on a machine that does nothing else.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import RESULTS, markdown
from runtime import cli

ROOT = Path(__file__).resolve().parent.parent


# Seen from ROOT, where the programs are started.
MODEL = "ckpt/fashion_mnist"
FOLDER = "samples/table"
JUDGES = {"reference": f"{MODEL}/reference.npz", "graph": f"{MODEL}/classifier.pb"}

SAMPLES = 5000  # of a row whose record is committed
THRESHOLD = 0.1  # of the routers
RANDOM_SEED = 0  # of the random layers
BATCH, REPEATS = 64, 3  # images of a timed batch; timed rounds after one that warms up

METHODS = {
    "ddim": "DDIM",
    "router": "router",
    "random": "random layers",
    "first": "first blocks",
    "last": "last blocks",
    "fora2": "FORA, interval 2",
    "fora3": "FORA, interval 3",
}
WITH_ROUTER = (50, 20)  # steps that there is a router for


@dataclass(frozen=True)
class Row:
    """method: of METHODS; steps: of DDIM."""

    method: str
    steps: int

    @property
    def name(self):
        return f"{self.method}-{self.steps}"

    @property
    def seeds(self):
        """Of the noise: several where the difference of two methods is what the table is for."""
        return (0, 1, 2) if self.method in ("ddim", "router") and self.steps in WITH_ROUTER else (0,)


ROWS = tuple(
    Row(method, steps)
    for steps in (50, 40, 38, 20, 16, 15, 10)
    for method in (METHODS if steps in WITH_ROUTER else ["ddim"])
)
TABLES = {
    "Fewer steps, or a router": lambda row: row.method in ("ddim", "router"),
    "Which layers are reused": lambda row: row.steps in WITH_ROUTER,
}


def row_list(text):
    """An argparse type: rows of ROWS by their names with commas between them."""
    rows = {row.name: row for row in ROWS}
    for name in text.split(","):
        if name not in rows:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(rows)}")
    return [rows[name] for name in text.split(",")]


def parse_args(argv=None):
    parser = cli.ArgumentParser(description="Speed and quality of the shipped model by method and number of steps.")
    parser.add_argument("--rows", type=row_list, metavar="ROW,ROW", help="only these, as router-20; without it all")
    parser.add_argument("--processes", type=cli.positive, default=2, help="that sample, one thread each")
    parser.add_argument(
        "--samples",
        type=cli.positive,
        default=SAMPLES,
        help=f"images of a row; other than {SAMPLES} are a trial, kept in {FOLDER}-SAMPLES",
    )
    parser.add_argument("--timing", action="store_true", help="measure the times again, or with --rows at all")
    parser.add_argument("--table", action="store_true", help="do nothing that is missing, print what there is")
    args = parser.parse_args(argv)
    trial = args.samples != SAMPLES
    args.folder = f"{FOLDER}-{args.samples}" if trial else FOLDER
    args.results = ROOT / args.folder / "results" if trial else RESULTS / "table"
    args.picture = ROOT / args.folder / "table.png" if trial else ROOT / "assets" / "table.png"
    return args


def router_path(steps):
    return f"{MODEL}/DDIM{steps}_router.pt"


def plan(row, depth):
    """The `Schedule` of a row for a model of `depth` blocks."""
    from router import Router
    from schedule import Schedule

    if row.method == "ddim":
        return Schedule.full(row.steps, depth)
    if row.method.startswith("fora"):
        return Schedule.every_nth(row.steps, depth, int(row.method[-1]))
    routed = Router.load(ROOT / router_path(row.steps)).schedule(THRESHOLD)
    place = row.steps, depth, Router.trained_steps(row.steps), int((~routed.compute).sum())
    if row.method == "random":
        return Schedule.random_layers(*place, RANDOM_SEED)
    return {"router": routed, "first": Schedule.first_blocks(*place), "last": Schedule.last_blocks(*place)}[row.method]


def sampling_flags(row, args):
    """The flags of sample_ddp.py that make a row, but for its seed, as a list of texts."""
    flags = ["--ckpt", MODEL, "--ddim-sample", "--num-fid-samples", args.samples, "--balanced-labels"]
    flags += ["--per-proc-batch-size", 50, "--sample-dir", args.folder, "--num-sampling-steps", row.steps]
    if row.method == "router":
        flags += ["--accelerate-method", "dynamiclayer", "--path", router_path(row.steps), "--thres", THRESHOLD]
    elif row.method != "ddim":
        flags += ["--accelerate-method", "schedule", "--path", schedule_path(row, args)]
    return list(map(str, flags))


def schedule_path(row, args):
    return f"{args.folder}/schedules/{row.name}.pt"


def start(*command, **environment):
    """Runs Python with a `command` from ROOT; returns what it printed, which is shown too.

    Raises UserError where it fails: it has said why.
    """
    from runtime.errors import UserError

    command = [sys.executable, *map(str, command)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
    lines = []
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    except KeyboardInterrupt:
        process.terminate()
        raise
    finally:
        process.wait()
    if process.returncode:
        program = next(Path(part).name for part in command if part.endswith(".py"))
        raise UserError(f"{program} failed, see above; the same command goes on where this one stopped")
    return "".join(lines)


def sample(row, seed, args):
    """Has sample_ddp.py make the set of a row and seed where it is not complete yet. Returns the Path of its .npz."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.processes}", "sample_ddp.py"]
    out = start(*torchrun, *sampling_flags(row, args), "--global-seed", seed, OMP_NUM_THREADS="1")
    return ROOT / re.search(r"^(?:Samples: )?(.+\.npz) (?:\(\d+ images|is there already)", out, re.M)[1]


def judge(npz):
    """What evaluator.py and the classifier say of a set, as a dict for JSON."""
    import hashlib

    import numpy as np

    from evaluation.inception import load_graph

    report = npz.with_suffix(".json")
    start("evaluator.py", JUDGES["reference"], npz, "--graph", JUDGES["graph"], "--json", report)
    with np.load(npz) as arrays:
        images, labels = arrays["arr_0"], arrays["labels"]
    return {
        "images": len(images),
        "sha256": hashlib.sha256(images).hexdigest(),
        "metrics": json.loads(report.read_text())["metrics"],
        "class_accuracy": load_graph(ROOT / JUDGES["graph"]).class_accuracy(images, labels),
    }


def read(path):
    """The record at `path`, or {} where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def fingerprints():
    """The SHA-256 of the files that judge. Raises UserError where one is missing."""
    import hashlib

    from runtime import released

    return {name: hashlib.sha256(released.find(ROOT / path).read_bytes()).hexdigest() for name, path in JUDGES.items()}


def describe(schedule, costs):
    """What a schedule runs, as a dict for JSON; costs: of the model, as `DiT.multiply_adds` returns them."""
    return {
        "layers": schedule.compute.numel(),
        "layers_run": int(schedule.compute.sum()),
        "g_multiply_adds": schedule.multiply_adds(costs).sum().item() / 1e9,
        "bound": schedule.speedup_bound(costs),
        "sha256": schedule.sha256(),
    }


def fill(args):
    """Samples, judges and times what is missing in the records."""
    from importlib.metadata import version

    from pretrained.loading import load_dit
    from pretrained.spec import model_spec
    from runtime import devices, records

    device = devices.pick_device("auto")
    spec = model_spec(ckpt=str(ROOT / MODEL))
    dit = devices.set_precision(load_dit(spec, device), "tf32")
    plans = {row: plan(row, dit.depth) for row in ROWS}
    judges, versions = fingerprints(), {name: version(name) for name in ("torch", "diffusers", "timm", "numpy")}
    # All rows once come before some of them with other seeds.
    todo = sorted([(seed, number) for number, row in enumerate(ROWS) for seed in row.seeds])
    for seed, row in ((seed, ROWS[number]) for seed, number in todo if ROWS[number] in (args.rows or ROWS)):
        path = args.results / f"{row.name}.json"
        known = {"schedule": describe(plans[row], dit.multiply_adds()), "judges": judges}
        flags, record = {"sample_ddp": sampling_flags(row, args)}, read(path)
        same = {name: record.get(name) for name in ("flags", *known)} == {"flags": flags, **known}
        seeds = record["seeds"] if same else {}  # what was sampled or judged otherwise is made again
        if str(seed) in seeds:
            continue
        print(f"{row.name}, seed {seed}:", flush=True)
        if row.method not in ("ddim", "router"):
            plans[row].save(ROOT / schedule_path(row, args))
        seeds = dict(sorted((seeds | {str(seed): judge(sample(row, seed, args))}).items()))
        figures = {**known, "versions": versions, "seeds": seeds}
        records.write_record(path, flags, device, figures)
    path = args.results / "timing.json"
    if args.timing or not args.rows and list(read(path).get("rows", [])) != [row.name for row in ROWS]:
        print("times of all rows, in turn:", flush=True)
        timing = {"batch": BATCH, "cfg_scale": spec.cfg_scale, "rows": times(spec, dit, plans, device)}
        records.write_record(path, {}, device, timing)


def times(spec, dit, plans, device):
    """Seconds of a batch of BATCH images, with guidance, and the speed-up of each row of `plans`: {its name: {...}}."""
    import time

    import torch
    from tqdm import tqdm

    import sampling
    from diffusion import create_diffusion
    from runtime import devices

    generator = torch.Generator().manual_seed(0)
    z = torch.randn(BATCH, dit.in_channels, dit.input_size, dit.input_size, generator=generator).to(device)
    y = torch.arange(BATCH, device=device) % spec.num_classes
    seconds = {row: [] for row in plans}
    for repeat, row in tqdm([(k, row) for k in range(REPEATS + 1) for row in plans], unit="batch", disable=None):
        schedule = None if row.method == "ddim" else plans[row]
        diffusion = create_diffusion(row.steps)
        devices.synchronize(device)
        since = time.perf_counter()
        sampling.sample_latents(dit, diffusion, z, y, spec.cfg_scale, schedule)
        devices.synchronize(device)
        if repeat:  # the first round warms up
            seconds[row].append(time.perf_counter() - since)
    return {row.name: {"seconds": some, "speedup": speedup(seconds, row)} for row, some in seconds.items()}


def speedup(seconds, row):
    """How much faster a row is than plain DDIM of as many steps; seconds: {row: those of each round}."""
    # Of one round, in which both shared the state of the machine.
    return statistics.median(full / ours for full, ours in zip(seconds[Row("ddim", row.steps)], seconds[row]))


def cells(row, record, timing):
    """A row of the tables: of seed 0, as all rows are, the FID with its standard deviation over the seeds there are."""
    result, schedule = record["seeds"]["0"], record["schedule"]
    measured, metrics = timing.get("rows", {}).get(row.name), result["metrics"]
    fids = [other["metrics"]["fid"] for other in record["seeds"].values()]
    return [
        METHODS[row.method],
        f"{row.steps}",
        f"{schedule['layers_run'] / schedule['layers']:.1%}",
        f"{schedule['g_multiply_adds']:.3f}",
        f"{statistics.median(measured['seconds']):.2f}" if measured else "",
        f"{measured['speedup']:.3f}" if measured else "",
        f"{schedule['bound']:.3f}",
        f"{metrics['inception_score']:.3f}",
        f"{metrics['fid']:.3f}" + (f" ± {statistics.stdev(fids):.3f}" if len(fids) > 1 else ""),
        f"{metrics['sfid']:.3f}",
        f"{metrics['precision']:.4f}",
        f"{metrics['recall']:.4f}",
        f"{result['class_accuracy']:.2%}",
    ]


def tables(records, timing):
    """The Markdown texts of `records`, {row: its record}, by title; what there is no record of is left out."""
    head = ["method", "steps", "layers run", "G multiply-adds", "seconds a batch", "speed-up", "bound"]
    head += ["IS", "FID", "sFID", "precision", "recall", "class accuracy"]
    rows = {
        title: [cells(row, record, timing) for row, record in records.items() if belongs(row)]
        for title, belongs in TABLES.items()
    }
    return {title: markdown(head, some) for title, some in rows.items() if some}


def missing(records, timing):
    """Names of what there is no record of: rows with their seeds, the times."""
    left = {row: [s for s in row.seeds if str(s) not in records.get(row, {}).get("seeds", {})] for row in ROWS}
    names = [f"{row.name} (seed {', '.join(map(str, seeds))})" for row, seeds in left.items() if seeds]
    untimed = [row.name for row in ROWS if row.name not in timing.get("rows", {})]
    return names + ([f"the times of {', '.join(untimed)}"] if untimed else [])


def show(args):
    """Prints the tables of the records there are, and draws their picture."""
    from training.plots import save_curves

    timing = read(args.results / "timing.json")
    records = {row: read(args.results / f"{row.name}.json") for row in ROWS}
    records = {row: record for row, record in records.items() if record}
    for title, text in tables(records, timing).items():
        print(f"\n{title}:\n\n{text}")
    curves = {}
    for row, record in records.items():
        if row.name in timing.get("rows", {}):
            seconds = statistics.median(timing["rows"][row.name]["seconds"])
            fid = record["seeds"]["0"]["metrics"]["fid"]
            curves.setdefault(METHODS[row.method], []).append((seconds, fid, str(row.steps)))
    if curves:
        save_curves(curves, f"seconds a batch of {timing['batch']} images", "FID", args.picture)
        print(f"\nPicture: {args.picture}")
    left = missing(records, timing)
    if left:
        print(f"\nMissing: {'; '.join(left)}")


def main(args):
    if not args.table:
        with cli.sigterm_interrupts():
            fill(args)
    show(args)


if __name__ == "__main__":
    cli.run(main, parse_args())
