"""Ours beside what users would pick instead: the same weights, noise and clock, in a pipeline of diffusers.

    python -m benchmarks.peers                             # all that is missing; hours on two cores, stop at any time
    python -m benchmarks.peers --rows dbcache-0.15-20      # only these, without the times
    python -m benchmarks.peers --quality                   # all rows, without the times
    python -m benchmarks.peers --timing                    # only the times: on a machine that does nothing else
    python -m benchmarks.peers --table                     # print the tables and draw the picture from the records

The peers come with `pip install -r requirements-peers.txt`; rows of those that are missing are left out. Each row
becomes results/peers/ROW.json: the layer calls that ran, as counted by hooks in a run of its own; the error of the
latents against the run that skips nothing, from the same noise; metrics of 5,000 images by the judge of
`benchmarks.table`, from the noise of its seed 0; and the statements that a user writes (`benchmarks.peer_setups`).
results/peers/noise.json has how much noise they remove at late steps, of what the full model would, and
results/peers/timing.json the seconds of the denoising loop of all rows, run in turn. `--timing --rows` measures some,
with plain diffusers among them, and keeps the other figures; each ratio is of its own run.

All rows run DDIM with the timesteps of diffusers (0, 50, ... 950 for 20 steps) and guidance on three channels.
"""

import json
import statistics
import sys
from dataclasses import dataclass, field, replace
from functools import partial

from benchmarks import common, peer_setups, table
from runtime import cli, signals

FOLDER = "samples/peers"
SAVED = 500  # images after which those of a row are saved
AT_ONCE = 50  # images of a batch; peers with a threshold decide for a whole batch
COMPARED = 64  # images whose latents are compared, and of a timed batch
REPEATS = 3  # timed rounds after the warm-up
NOISES = ((0.97, 0.5), (0.98, 1))  # factors of the predicted noise in some rows, and up to which t
# By steps: settings of MagCache that are faster than its thresholds alone make it; rows that are also made with each of
# NOISES, and those that are with the last of them.
EARLY_MAGCACHE = {
    20: ({"threshold": 1.0, "retention": 0.1}, {"threshold": 1.0, "retention": 0.05, "in_a_row": 4}),
    50: ({"threshold": 0.3, "retention": 0.1}, {"threshold": 1.0, "retention": 0.1, "in_a_row": 4}),
}
SCALED = {
    20: ("diffusers", "dbcache-0.15", "ours-fora3-f2", "ours-fora4-f2", "ours-learned-2x"),
    50: ("ours-fora3-f2", "ours-fora4-f2", "ours-learned-3x"),
}
SCALED_ONCE = {
    20: ("taylorseer-3", "firstblock-0.1", "magcache-0.12"),
    50: ("taylorseer-3", "firstblock-0.1", "firstblock-0.2"),
}
GUIDANCES = (1.5, 3.0)  # other scales than that of the model
PARITY_DB = 90  # at least, for rows that are the same by two ways
TARGETS = (0.6, 0.5, 0.4, 0.3)  # of the time of plain diffusers
LATE = 0.5  # the highest t of the steps whose noise is compared

PACKAGES = {"dbcache": "cache-dit", "smoothcache": "dit-smoothcache", "hicache": "hicache-pp"}
TITLES = {
    "plain": "diffusers",
    "dbcache": "cache-dit DBCache",
    "smoothcache": "dit-smoothcache",
    "first_block_cache": "diffusers FirstBlockCache",
    "taylorseer": "diffusers TaylorSeer",
    "magcache": "diffusers MagCache",
    "hicache": "hicache-pp",
    "our_sampler": "ours",
    "ours": "ours, in the pipeline",
}
OURS = ("our_sampler", "ours")


@dataclass(frozen=True)
class Row:
    """label: the name without steps; setup: a function of `peer_setups`; plan: a row of `table`, without steps.

    same: label of a row that makes the same images in another way, "" if there is none. Their metrics are taken from
    there if the latents agree to PARITY_DB.
    """

    label: str
    setup: str
    steps: int
    settings: dict = field(default_factory=dict, hash=False)
    plan: str = ""
    guidance: tuple = ()  # scale, and the lowest and the highest t that is guided; () is the model's scale at each t
    noise: tuple = (1, 1)  # factor of the predicted noise, and the highest t at which it applies
    same: str = ""

    @property
    def name(self):
        return f"{self.label}-{self.steps}"

    @property
    def title(self):
        words = [f"{name} {value}" for name, value in self.settings.items()]
        words += [self.plan] if self.plan else []
        words += ["guidance {} for t from {} to {}".format(*self.guidance)] if self.guidance else []
        words += ["noise x {} for t up to {}".format(*self.noise)] if self.noise != (1, 1) else []
        return ", ".join([TITLES[self.setup], *words])


def make_rows():
    """All rows: settings of each peer that span its range, then ours, for 20 and 50 steps."""
    rows = []
    for steps, low, high in ((20, 0.1, 0.15), (50, 0.08, 0.15)):
        rows += [Row("diffusers", "plain", steps)]
        rows += [Row(f"dbcache-{x}", "dbcache", steps, {"threshold": x}) for x in (low, high, 0.3)]
        for most in (1, 2):
            settings = {"threshold": 0.25, "in_a_row": most, "order": 1}
            rows += [Row(f"dbcache-taylorseer-{most}", "dbcache", steps, settings)]
        for alpha in {20: (0.2, 0.35), 50: (0.18, 0.25)}[steps]:
            rows += [Row(f"smoothcache-{alpha}", "smoothcache", steps, plan=f"smoothcache-{alpha}")]
        for x in (0.05, 0.1, 0.2):
            rows += [Row(f"firstblock-{x}", "first_block_cache", steps, {"threshold": x})]
        for interval in (2, 3, 5):
            rows += [Row(f"taylorseer-{interval}", "taylorseer", steps, {"interval": interval})]
            rows += [Row(f"hicache-{interval}", "hicache", steps, {"interval": interval})]
        for x in (0.06, 0.12, 0.3):
            rows += [Row(f"magcache-{x}", "magcache", steps, {"threshold": x})]
        for settings in EARLY_MAGCACHE[steps]:
            rows += [Row("magcache-" + "-".join(map(str, settings.values())), "magcache", steps, settings)]
        learned = [f"learned-{target}" for target in table.SETTINGS["learned"][steps]]
        rows += [Row("ours", "our_sampler", steps, same="diffusers")]
        for plan in ("router", "router-f2", "fora2", "fora2-f2", "fora3", "fora3-f2", "fora4-f2", *learned):
            rows += [Row(f"ours-{plan}", "our_sampler", steps, plan=plan)]
        for plan in ("router-f2", "fora3-f2", learned[1]):
            rows += [Row(f"adapter-{plan}", "ours", steps, plan=plan, same=f"ours-{plan}")]
        # Guidance and scaled noise could explain DBCache's FID (docs/peers.md).
        for scale in GUIDANCES if steps == 20 else ():
            settings = {"plan": "fora3-f2", "guidance": (scale, 0, 1)}
            rows += [Row(f"ours-fora3-f2-guidance-{scale}", "our_sampler", steps, **settings)]
        for noise in NOISES:
            labels = SCALED[steps] + (SCALED_ONCE[steps] if noise == NOISES[-1] else ())
            ending = "noise-{}-to-{}".format(*noise)
            unscaled = [row for row in rows if row.steps == steps and row.label in labels]
            rows += [replace(row, label=f"{row.label}-{ending}", noise=noise) for row in unscaled]
    return tuple(rows)


ROWS = make_rows()


def parse_args(argv=None):
    parser = cli.ArgumentParser(description=__doc__)
    rows = partial(table.row_list, rows=ROWS)
    parser.add_argument("--rows", type=rows, metavar="ROW,ROW", help="only these, as dbcache-0.15-20; default: all")
    trial = f"images of a row; any number but {table.SAMPLES} is a trial, kept in {FOLDER}-SAMPLES"
    parser.add_argument("--samples", type=cli.positive, default=table.SAMPLES, help=trial)
    parser.add_argument("--quality", action="store_true", help="make all but the times")
    parser.add_argument("--timing", action="store_true", help="measure only the times, again if they are there")
    parser.add_argument("--table", action="store_true", help="make nothing, print the tables of the records")
    args = parser.parse_args(argv)
    args.folder, args.results = common.ROOT / FOLDER, common.RESULTS / "peers"
    args.picture = common.ROOT / "assets" / "peers.png"
    if args.samples != table.SAMPLES:
        args.folder = common.ROOT / f"{FOLDER}-{args.samples}"
        args.results, args.picture = args.folder / "results", args.folder / "peers.png"
    return args


def projection(tensor, onto):
    """How often `onto` fits into a tensor that is projected onto it."""
    return ((tensor * onto).sum() / onto.square().sum()).item()


class Bench:
    """The shipped model, and the functions that sample with it, one for each row."""

    def __init__(self):
        from pretrained.loading import load_dit, load_vae
        from pretrained.spec import model_spec
        from runtime import devices

        self.device = devices.pick_device("cpu")
        self.spec = model_spec(ckpt=str(common.ROOT / table.MODEL))
        self.dit = devices.set_precision(load_dit(self.spec, self.device), "tf32")
        self.vae = load_vae(self.spec, self.device)
        self._full = {}  # latents of plain diffusers, by number of steps

    def noise(self, first, count):
        """`ImageNoise` of the images from number `first` on."""
        from runtime.noise import ImageNoise

        shape = (self.dit.in_channels, self.dit.input_size, self.dit.input_size)
        return ImageNoise(0, range(first, first + count), shape, self.spec.num_classes, self.device, balanced=True)

    def plan(self, row):
        """The `Schedule` of a row, None without a plan."""
        if not row.plan:
            return None
        method, _, setting = row.plan.partition("-")
        named = (row.plan, row.steps) if row.plan in table.METHODS else (method, row.steps, setting)
        return table.plan(table.Row(*named), self.dit)

    def sampler(self, row):
        """(model, function (noise, progress=None) -> latents) of a row. progress: as in `sample_latents`."""
        import torch

        from models import Guidance

        scale, low, high = row.guidance or (self.spec.cfg_scale, 0, 1)
        scale, plan = Guidance(scale, interval=(low, high)), self.plan(row)
        setup = getattr(peer_setups, row.setup)
        if row.setup == "our_sampler":
            settings = {"cfg_scale": scale, "schedule": plan, "noise_scale": row.noise}
            return self.dit, lambda noise, **extra: setup(self.dit, row.steps, noise.z, noise.y, **settings, **extra)
        torch.manual_seed(0)  # MagCache calibrates with noise of its own
        pipe = peer_setups.make_pipeline(self.dit, self.vae)
        settings = dict(row.settings)
        if row.setup == "smoothcache":
            computed = plan.compute.flip(0)[:, 0].int().T.tolist()
            settings["schedule"] = dict(zip(("attn1", "ff"), computed))
        elif plan is not None:
            settings["schedule"] = plan
        context = setup(pipe, row.steps, **settings) or peer_setups.nullcontext

        def sample(noise, **extra):
            with context():
                labels = noise.y.tolist()
                settings = {"num_inference_steps": row.steps, "latents": noise.z, "noise_scale": row.noise}
                return pipe(labels, scale, **settings, **extra)

        return pipe.transformer, sample

    def count(self, row):
        """Latents of COMPARED images, and the layers that ran, bool [steps, depth, 2], the first step first."""
        model, sample = self.sampler(row)
        return peer_setups.count_layers(model, partial(sample, self.noise(0, COMPARED)), row.steps, self.dit.depth)

    def late_noise(self, row):
        """How much noise a row in the pipeline removes at t <= LATE, of what the full model would for the same inputs.

        At each step the predicted noise is projected onto the full model's. DDIM moves x by that noise times the fall
        of sigma, the ratio of noise to data, so the mean over the steps has these weights.
        """
        full, ratios, sigmas = peer_setups.make_pipeline(self.dit, self.vae), [], []
        signal = full.scheduler.alphas_cumprod.tolist()

        def compare(x, t, labels, noise):
            if t / 1000 <= LATE:
                ratios.append(projection(noise, full.predict_noise(x, t, labels, self.spec.cfg_scale)))
                sigmas.append((1 / signal[t] - 1) ** 0.5)

        self.sampler(row)[1](self.noise(0, COMPARED), observe=compare)
        falls = [sigma - after for sigma, after in zip(sigmas, [*sigmas[1:], 0])]
        return sum(fall * ratio for fall, ratio in zip(falls, ratios)) / sigmas[0]

    def full(self, steps):
        """Latents of plain diffusers for the noise of `count`."""
        if steps not in self._full:
            self._full[steps] = self.sampler(Row("diffusers", "plain", steps))[1](self.noise(0, COMPARED))
        return self._full[steps]

    def figures(self, row):
        """What a row skips, its error, and the lines that it takes, as a dict for JSON.

        Raises UserError if it makes other images than the row that it should be the same as.
        """
        from runtime.errors import UserError
        from runtime.pictures import psnr

        latents, ran = self.count(row)
        full = self.full(row.steps)
        value_range = (full.max() - full.min()).item()
        decibels = psnr(latents, full, value_range)
        if row.same:
            other = next(other for other in ROWS if (other.label, other.steps) == (row.same, row.steps))
            agreement = psnr(latents, self.count(other)[0], value_range)
            if agreement < PARITY_DB:
                raise UserError(f"{row.name} and {other.name} agree to {agreement:.1f} dB, {PARITY_DB} are expected")
        return {
            "statements": peer_setups.statements_of_user(getattr(peer_setups, row.setup)),
            "skipped": 1 - ran.float().mean().item(),
            "ran": [" ".join(f"{a:d}{m:d}" for a, m in step) for step in ran.tolist()],
            "error": (latents - full).square().mean().item(),
            "psnr_db": None if decibels == float("inf") else decibels,
            "variance": latents.var().item(),
        }

    def save_images(self, row, count, path, made_by):
        """Sample `count` images with balanced labels into an .npz, which is written every SAVED images.

        One that is there and has fewer is continued, if it was `made_by` the same settings, a dict for JSON.
        """
        import numpy as np
        from tqdm import tqdm

        from runtime.files import atomic_write
        from sampling import decode

        (_, sample), made_by = self.sampler(row), json.dumps(made_by)
        images, labels = [], []
        if path.exists():
            with np.load(path) as begun:
                if "made_by" in begun and begun["made_by"] == made_by and len(begun["labels"]) <= count:
                    images, labels = [begun["arr_0"]], [begun["labels"]]
        done = sum(map(len, labels))
        for first in tqdm(range(done, count, AT_ONCE), desc=row.name, disable=None):
            noise = self.noise(first, min(AT_ONCE, count - first))
            images.append(decode(self.vae, sample(noise)).numpy())
            labels.append(noise.labels.numpy())
            done += len(labels[-1])
            if done == count or done % SAVED == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(path) as part, part.open("wb") as file:
                    np.savez(file, arr_0=np.concatenate(images), labels=np.concatenate(labels), made_by=made_by)

    def times(self, rows):
        """Seconds of the denoising loop of COMPARED images, of plain diffusers too, and their ratio: {row: {...}}.

        All rows of as many steps run in turn.
        """
        noise, result = self.noise(0, COMPARED), {}
        for steps in sorted({row.steps for row in rows}):
            samplers = {row.name: partial(self.sampler(row)[1], noise) for row in rows if row.steps == steps}
            seconds = common.time_in_turn(samplers, REPEATS, self.device)
            plain = seconds[f"diffusers-{steps}"]
            for name, some in seconds.items():
                result[name] = {"seconds": some, "plain": plain, "ratio": common.median_ratio(some, plain)}
        return result


def installed():
    """{package: its version} of the peers that are there. Prints a line about those that are not."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in PACKAGES.values():
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    if missing := sorted({*PACKAGES.values()} - {*found}):
        way = "pip install -r requirements-peers.txt"
        print(f"Not installed, their rows are left out: {', '.join(missing)} ({way})", file=sys.stderr)
    return found


def quality_of(label, steps, args):
    """The metrics in the record of a row. Raises UserError if there is none."""
    from runtime.errors import UserError

    name = f"{label}-{steps}"
    if not (record := table.read(args.results / f"{name}.json")):
        raise UserError(f"{name} has no record yet: add it to --rows, or leave out --rows")
    return record["quality"]


def fill(args):
    """Make what the records lack."""
    from importlib.metadata import version

    from runtime.hashes import sha256_of_file
    from runtime.records import write_record

    found = installed()
    rows = [row for row in args.rows or ROWS if PACKAGES.get(row.setup) in {*found, None}]
    bench = Bench()
    judges = {name: sha256_of_file(common.ROOT / path) for name, path in table.JUDGES.items()}
    versions = {name: version(name) for name in ("torch", "diffusers")}
    for row in rows if not args.timing else []:
        path = args.results / f"{row.name}.json"
        flags = {"row": row.name, "samples": args.samples}
        made_by = {"setup": row.setup, "settings": row.settings, "plan": row.plan, "steps": row.steps}
        made_by |= {"guidance": list(row.guidance), "noise": list(row.noise)}
        known = made_by | {"judges": judges}
        record = table.read(path)
        if {name: record.get(name) for name in ("flags", *known)} == {"flags": flags, **known}:
            continue  # what was made otherwise is made again
        print(f"{row.name}:", file=sys.stderr, flush=True)
        figures = bench.figures(row)
        if row.same:
            figures["quality"] = quality_of(row.same, row.steps, args)
        else:
            npz = args.folder / f"{row.name}.npz"
            bench.save_images(row, args.samples, npz, made_by)
            figures["quality"] = table.judge(npz)
        peer = {package: found[package] for package in [PACKAGES.get(row.setup)] if package}
        figures["versions"] = versions | peer
        write_record(path, flags, bench.device, known | figures)
    compared = [row for row in rows if row.setup not in ("plain", "our_sampler") and row.noise == (1, 1)]
    path, known = args.results / "noise.json", table.read(args.results / "noise.json").get("rows", {})
    missing = [row for row in compared if row.name not in known]
    if missing and not (args.timing or args.rows):
        print("noise that they remove:", file=sys.stderr, flush=True)
        write_record(path, {}, bench.device, {"rows": known | {row.name: bench.late_noise(row) for row in missing}})
    path = args.results / "timing.json"
    complete = {row.name for row in rows} <= table.read(path).get("rows", {}).keys()
    if args.timing or not (args.quality or args.rows or complete):
        import torch

        print("times of all rows, in turn:", file=sys.stderr, flush=True)
        known = table.read(path).get("rows", {}) if args.rows else {}
        plain = {row.name: known[row.name] for row in rows if row.label == "diffusers" and row.name in known}
        timing = {"batch": COMPARED, "threads": torch.get_num_threads(), "rows": known | bench.times(rows) | plain}
        write_record(path, {}, bench.device, timing)


def cells(row, record, timing):
    """A row of the table."""
    measured, quality = timing.get("rows", {}).get(row.name), record["quality"]
    metrics, decibels = quality["metrics"], record["psnr_db"]
    return {
        "row": row.title,
        "statements": record["statements"],
        "skipped": f"{record['skipped']:.1%}",
        "seconds": f"{statistics.median(measured['seconds']):.2f}" if measured else "",
        "of diffusers": f"{measured['ratio']:.2f}" if measured else "",
        "error": f"{record['error']:.1e}",
        "PSNR, dB": f"{decibels:.1f}" if decibels is not None else "equal",
        "FID": f"{metrics['fid']:.3f}",
        "sFID": f"{metrics['sfid']:.3f}",
        "IS": f"{metrics['inception_score']:.3f}",
        "precision": f"{metrics['precision']:.4f}",
        "recall": f"{metrics['recall']:.4f}",
        "class accuracy": f"{quality['class_accuracy']:.2%}",
    }


def best(records, timing, steps, target, ours, scaled=False):
    """The row of ours, or of the peers, with the lowest FID in at most `target` of plain diffusers' time, or None.

    scaled: of those that scale the predicted noise, else of those that do not.
    """
    able = [
        row
        for row in records
        if row.steps == steps
        and (row.setup in OURS, row.noise != (1, 1), row.guidance) == (ours, scaled, ())
        and timing.get("rows", {}).get(row.name, {}).get("ratio", float("inf")) <= target
    ]
    return min(able, key=lambda row: records[row]["quality"]["metrics"]["fid"], default=None)


def at_equal_time(records, timing):
    """Rows of the table of our best rows beside the best peer, as dicts."""
    rows = []
    for steps in sorted({row.steps for row in records}):
        for target in TARGETS:
            for scaled in (False, True):
                for whose, ours in {"peer": False, "ours": True}.items():
                    if row := best(records, timing, steps, target, ours, scaled):
                        short = cells(row, records[row], timing)
                        kept = {name: short[name] for name in ("row", "of diffusers", "seconds", "FID", "error")}
                        whose += ", noise scaled" if scaled else ""
                        rows.append({"steps": steps, "at most": target, "whose": whose} | kept)
    return rows


def noise_and_fid(records, noise):
    """Rows of the table of the late noise that a row removes and its FID, least noise first, as dicts."""
    rows = [row for row in records if row.name in noise.get("rows", {})]
    return [
        {
            "steps": row.steps,
            "row": row.title,
            "late noise": f"{noise['rows'][row.name]:.3f}",
            "FID": f"{records[row]['quality']['metrics']['fid']:.3f}",
        }
        for row in sorted(rows, key=lambda row: (row.steps, noise["rows"][row.name]))
    ]


def rank_correlations(records, noise):
    """{steps: Spearman's rank correlation of late noise and FID}, for three rows and more."""
    from scipy.stats import spearmanr

    result = {}
    for steps in sorted({row.steps for row in records}):
        rows = [row for row in records if row.steps == steps and row.name in noise.get("rows", {})]
        pairs = [(noise["rows"][row.name], records[row]["quality"]["metrics"]["fid"]) for row in rows]
        if len(pairs) > 2:
            result[steps] = spearmanr(*zip(*pairs)).statistic
    return result


def tables(records, timing, noise):
    """The tables of `records`, {row: its record}, as Markdown by title."""
    result = {}
    for steps in sorted({row.steps for row in records}):
        some = [cells(row, record, timing) for row, record in records.items() if row.steps == steps]
        result[f"{steps} steps"] = common.markdown(some)
    if compared := at_equal_time(records, timing):
        result["The best at equal time"] = common.markdown(compared)
    if predicted := noise_and_fid(records, noise):
        result["Late noise and FID"] = common.markdown(predicted)
    return result


def save_picture(records, timing, path):
    """Write a PNG: FID by time relative to plain diffusers, a plot for each number of steps.

    Rows that scale the predicted noise are hollow.
    """
    import matplotlib
    from matplotlib.figure import Figure

    from runtime.files import atomic_write

    timed = [row for row in records if row.name in timing["rows"] and not row.guidance]
    steps = sorted({row.steps for row in timed})
    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(figsize=(6 * len(steps), 4.5), dpi=110, layout="constrained")
        for axis, count in zip(figure.subplots(1, len(steps), squeeze=False)[0], steps):
            for number, (setup, marker) in enumerate(zip(TITLES, "*osD^v<>P")):
                size = 9 if setup in OURS else 7
                for scaled, fill in ((False, "full"), (True, "none")):
                    kind = setup, count, scaled
                    some = [row for row in timed if (row.setup, row.steps, row.noise != (1, 1)) == kind]
                    x = [timing["rows"][row.name]["ratio"] for row in some]
                    y = [records[row]["quality"]["metrics"]["fid"] for row in some]
                    style = {"color": f"C{number}", "fillstyle": fill, "label": None if scaled else TITLES[setup]}
                    axis.plot(x, y, marker, markersize=size, **style)
            axis.set(title=f"{count} steps", xlabel="time, of plain diffusers", ylabel="FID (hollow: scaled noise)")
            axis.legend()
    with atomic_write(path) as part:
        figure.savefig(part, format="png", metadata={"Software": None})


def show(args):
    """Print the tables of the records, and draw their picture."""
    timing = table.read(args.results / "timing.json")
    records = {row: table.read(args.results / f"{row.name}.json") for row in ROWS}
    missing = [row.name for row, record in records.items() if not record]
    records = {row: record for row, record in records.items() if record}
    noise = table.read(args.results / "noise.json")
    for title, text in tables(records, timing, noise).items():
        print(f"\n{title}:\n\n{text}")
    for steps, value in rank_correlations(records, noise).items():
        print(f"\nRank correlation of late noise and FID, {steps} steps: {value:.2f}")
    if records and timing:
        save_picture(records, timing, args.picture)
        print(f"\nPicture: {args.picture}")
    untimed = [row.name for row in records if row.name not in timing.get("rows", {})]
    if missing or untimed:
        print(f"\nMissing: {', '.join(missing) or 'no row'}; untimed: {', '.join(untimed) or 'none'}")


def main(args):
    if not args.table:
        with signals.sigterm_interrupts():
            fill(args)
    show(args)


if __name__ == "__main__":
    cli.run(main, parse_args())
