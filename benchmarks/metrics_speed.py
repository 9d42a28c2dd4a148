"""Time of the FID in two ways, and time and peak memory of precision and recall, at the sizes of an evaluation.

    python -m benchmarks.metrics_speed --record benchmarks/results/metrics-cpu.json
    python -m benchmarks.metrics_speed --table

The FID is computed from eigenvalues, as evaluation/metrics.py does, and by `scipy.linalg.sqrtm`, as the original does,
in turn in one process, from the same statistics of random features. The results must agree to 1e-6. Precision and
recall are computed once with float16 and once with float32 distances, each in a fresh process that holds both sets of
features in float32. The peak is that of the whole process, the base its peak before: Python, PyTorch and the features.

Features are combinations of a few random directions, cut at 0: as with images, some samples are inside the other set
and some outside. Times do not depend on the values.
"""

import statistics
from functools import partial

from benchmarks import common
from runtime import cli

WAYS = {
    "eigh": "FID: eigenvalues (metrics.py)",
    "sqrtm": "FID: scipy.linalg.sqrtm",
    "fp16": "precision and recall, float16 distances",
    "fp32": "precision and recall, float32 distances",
}
DIRECTIONS = 24


def parse_args(argv=None):
    parser = common.parser(__doc__)
    parser.add_argument("--reference", type=cli.positive, default=10000, help="points of the reference")
    parser.add_argument("--sample", type=cli.positive, default=50000, help="points of the samples")
    parser.add_argument("--features", type=cli.positive, default=2048, help="features of a point")
    parser.add_argument("--repeats", type=cli.positive, default=1, help="rounds of the two FIDs, in turn")
    return parser.parse_args(argv)


def random_features(seed, count, features):
    """Features float32 (count, features), at least 0; the distribution moves slightly with the seed."""
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


def random_statistics(count, features):
    """Mean and covariance of one set of `count` random points, then of another: four arrays."""
    import numpy as np

    from evaluation import metrics

    inputs = []
    for seed in (0, 1):
        # A little noise in each feature gives the covariances full rank, which sqrtm is made for.
        noise = np.random.default_rng([seed, 2]).standard_normal((count, features), dtype=np.float32)
        inputs += metrics.statistics(random_features(seed, count, features) + 0.1 * noise)
    return inputs


def measure_fid(count, features, repeats):
    """Seconds and values of both ways, {way: {...}}, from statistics of `count` points a set."""
    from evaluation import metrics

    inputs = random_statistics(count, features)
    ways = {"eigh": metrics.frechet_distance, "sqrtm": fid_by_sqrtm}
    timings = {way: partial(common.timed, function, *inputs) for way, function in ways.items()}
    results = common.in_turn(timings, repeats)
    return {way: {"seconds": [seconds for _, seconds in some], "fid": some[0][0]} for way, some in results.items()}


def measure_precision_recall(dtype, reference, sample, features):
    """Figures with distances of `dtype`. The process must be a fresh one."""
    import warnings

    from evaluation import metrics

    warnings.simplefilter("error", RuntimeWarning)
    sets = random_features(0, reference, features), random_features(1, sample, features)
    function = partial(metrics.precision_recall, dtype=dtype)
    try:
        function(*(points[:9] for points in sets))  # imports what it needs
        (precision, recall), figures = common.timed_with_memory(function, *sets)
    except RuntimeWarning as warning:  # with smaller tiles it would be another measurement
        raise MemoryError from warning
    return figures | {"seconds": [figures["seconds"]], "precision": precision, "recall": recall}


def measure(args):
    """Figures of each way. Raises RuntimeError if the two FIDs do not agree to 1e-6."""
    # More points than features, so that the covariances have full rank.
    measured = common.run_alone(measure_fid, max(args.reference, 2 * args.features), args.features, args.repeats)
    ours, theirs = (measured[way]["fid"] for way in ("eigh", "sqrtm"))
    if not abs(ours - theirs) <= 1e-6 * abs(theirs):
        raise RuntimeError(f"the FID is {ours} from eigenvalues, {theirs} from the matrix square root")
    for dtype in ("fp16", "fp32"):
        measured[dtype] = common.run_alone(measure_precision_recall, dtype, args.reference, args.sample, args.features)
    return {"measurements": measured}


def rows(record):
    """A row for each way."""
    flags = record["flags"]
    for way, figures in record["measurements"].items():
        if "fid" in figures:
            size, result = f"{flags['features']:,}", f"{figures['fid']:.8g}"
            memory = {"peak MB": "", "above the base MB": ""}
        else:
            size = f"{flags['reference']:,} x {flags['sample']:,}, {flags['features']:,}"
            result = f"{figures['precision']:.4f}, {figures['recall']:.4f}"
            memory = common.memory_cells(figures)
        seconds = f"{statistics.median(figures['seconds']):.3g}"
        yield {
            "device": record["device"],
            "way": WAYS[way],
            "size": size,
            "seconds": seconds,
            **memory,
            "result": result,
        }


def main(args):
    common.run_benchmark(args, "metrics-*", measure, rows)


if __name__ == "__main__":
    cli.run(main, parse_args())
