"""Time of the FID in two ways, and time and peak memory of precision and recall, at the sizes of an evaluation.

    python -m benchmarks.metrics_speed --record benchmarks/results/metrics-cpu.json
    python -m benchmarks.metrics_speed --quick          # small sizes, seconds: does it run
    python -m benchmarks.metrics_speed --table          # the table of the records there are

The FID is computed from eigenvalues, as metrics.py does, and by `scipy.linalg.sqrtm`, as the original does, in turn in
one process, from the same statistics of random features. They must agree to 1e-6. Precision and recall are computed
once with float16 and once with float32 distances, each in a fresh process that holds both sets of features in float32.
The peak is that of the whole process, the base what it held before the work: Python, PyTorch and the features.

Features are combinations of a few random directions, cut at 0: as with those of images some samples are in and some out
of the other set. Times do not depend on what they are.
"""

import statistics
from pathlib import Path

from benchmarks.assembly import alone
from benchmarks.common import markdown, read_records
from runtime import cli
from runtime.memory import peak_resident

ROOT = Path(__file__).resolve().parent.parent


SIZES = {"reference": 10000, "sample": 50000, "features": 2048}
QUICK = {"reference": 300, "sample": 500, "features": 64}
WAYS = {
    "eigh": "FID: eigenvalues (metrics.py)",
    "sqrtm": "FID: scipy.linalg.sqrtm",
    "fp16": "precision and recall, float16 distances",
    "fp32": "precision and recall, float32 distances",
}
DIRECTIONS = 24


def parse_args(argv=None):
    parser = cli.ArgumentParser(
        description="Time and memory of FID, precision and recall at the sizes of an evaluation."
    )
    parser.add_argument(
        "--reference", type=cli.positive, help=f"points of the reference; without it {SIZES['reference']}"
    )
    parser.add_argument("--sample", type=cli.positive, help=f"points of the samples; without it {SIZES['sample']}")
    parser.add_argument("--features", type=cli.positive, help=f"features of a point; without it {SIZES['features']}")
    parser.add_argument("--repeats", type=cli.positive, default=1, help="rounds of the two FIDs, in turn")
    parser.add_argument("--quick", action="store_true", help=f"where no other sizes are given {tuple(QUICK.values())}")
    cli.add_record_argument(parser)
    parser.add_argument(
        "--table", action="store_true", help="measure nothing, print the table of results/metrics*.json"
    )
    args = parser.parse_args(argv)
    for name, size in (QUICK if args.quick else SIZES).items():
        if getattr(args, name) is None:
            setattr(args, name, size)
    return args


def random_features(seed, count, features):
    """Features float32 (count, features), not negative; of one distribution, for other seeds slightly moved."""
    import numpy as np

    directions = np.random.default_rng(0).standard_normal((DIRECTIONS, features), dtype=np.float32)
    weights = np.random.default_rng([seed, 1]).standard_normal((count, DIRECTIONS), dtype=np.float32)
    weights[:, 0] += 0.5 * seed
    x = weights @ directions
    x *= 0.2
    return np.maximum(x, 0, out=x)


def fid_by_sqrtm(mu1, sigma1, mu2, sigma2):
    """The FID as the original computes it."""
    import numpy as np
    from scipy.linalg import sqrtm

    root = sqrtm(sigma1 @ sigma2)
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real)


def measure_fid(count, features, repeats):
    """Seconds and values of both ways, {way: {...}}, from statistics of `count` points a set."""
    import time

    import numpy as np

    from evaluation import metrics

    inputs = []
    for seed in (0, 1):
        # A little noise of its own in each feature: the covariances have full rank, for which sqrtm is made.
        noise = np.random.default_rng([seed, 2]).standard_normal((count, features), dtype=np.float32)
        inputs += metrics.statistics(random_features(seed, count, features) + 0.1 * noise)
    measured = {way: {"seconds": []} for way in ("eigh", "sqrtm")}
    for _ in range(repeats):
        for way, function in (("eigh", metrics.frechet_distance), ("sqrtm", fid_by_sqrtm)):
            since = time.perf_counter()
            measured[way]["fid"] = function(*inputs)
            measured[way]["seconds"].append(time.perf_counter() - since)
    return measured


def measure_precision_recall(dtype, reference, sample, features):
    """Seconds, bytes and values with distances of `dtype` as a dict for JSON. The process must be a fresh one."""
    import time
    import warnings

    from evaluation import metrics

    warnings.simplefilter("error", RuntimeWarning)
    sets = random_features(0, reference, features), random_features(1, sample, features)
    base, since = peak_resident(), time.perf_counter()
    try:
        precision, recall = metrics.precision_recall(*sets, dtype=dtype)
    except RuntimeWarning as warning:  # smaller blocks would be another measurement
        raise MemoryError from warning
    seconds = time.perf_counter() - since
    return {
        "seconds": [seconds],
        "base_bytes": base,
        "peak_bytes": peak_resident(),
        "precision": precision,
        "recall": recall,
    }


def measure_all(args):
    """The figures of each way, {way: {...}}. Raises RuntimeError where the two FIDs do not agree to 1e-6."""
    # More points than features, so that the covariances have full rank.
    measured = alone(measure_fid, max(args.reference, 2 * args.features), args.features, args.repeats)
    ours, theirs = (measured[way]["fid"] for way in ("eigh", "sqrtm"))
    if not abs(ours - theirs) <= 1e-6 * abs(theirs):
        raise RuntimeError(f"the FID is {ours} from eigenvalues, {theirs} from the matrix square root")
    for dtype in ("fp16", "fp32"):
        measured[dtype] = alone(measure_precision_recall, dtype, args.reference, args.sample, args.features)
    return measured


def table(records):
    """The Markdown text of records that --record wrote: a line for each way."""
    head = ["device", "way", "size", "seconds", "peak MB", "above the base MB", "result"]
    rows = []
    for record in records:
        flags = record["flags"]
        for way, figures in record["measurements"].items():
            if "fid" in figures:
                size = f"{flags['features']:,}"
                memory = ["", ""]
                result = f"{figures['fid']:.8g}"
            else:
                size = f"{flags['reference']:,} x {flags['sample']:,}, {flags['features']:,}"
                above = figures["peak_bytes"] - figures["base_bytes"]
                memory = [f"{size_bytes / 1e6:,.0f}" for size_bytes in (figures["peak_bytes"], above)]
                result = f"{figures['precision']:.4f}, {figures['recall']:.4f}"
            seconds = f"{statistics.median(figures['seconds']):.3g}"
            rows.append([record["device"], WAYS[way], size, seconds, *memory, result])
    return markdown(head, rows)


def main(args):
    if args.table:
        print(table(read_records("metrics-*")))
        return

    from runtime.files import check_writable

    if args.record:
        check_writable(args.record)
    with cli.sigterm_interrupts():
        measured = {"measurements": measure_all(args)}

    import torch

    from runtime import devices, records

    device = torch.device("cpu")
    print(table([{"flags": vars(args), "device": devices.device_name(device), **measured}]))
    if args.record:
        flags = {name: value for name, value in vars(args).items() if name != "quick"}
        records.write_record(args.record, flags, device, measured)


if __name__ == "__main__":
    cli.run(main, parse_args())
