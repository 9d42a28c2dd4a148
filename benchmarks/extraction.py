"""Images a second and peak memory of the features of FID: by PyTorch and by TensorFlow.

    python -m benchmarks.extraction --record benchmarks/results/extraction-cpu.json
    python -m benchmarks.extraction --table

The images are random, and so are the weights without --graph: the work does not depend on them. The backends run in
turn, each time in a fresh process. The first batch is not timed, because TensorFlow prepares its graph with it. Images
start as uint8 arrays, features end on the CPU. The peak is that of the whole process with its libraries, without a
GPU's memory. The features of the backends must agree to 1e-5.
"""

import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks import common
from runtime import cli
from runtime.memory import peak_resident

BACKENDS = {"tensorflow": "TensorFlow", "torch": "PyTorch"}
TOLERANCE = 1e-5  # of the features, relative L2
COMPARED = 4  # images whose features are compared


def parse_args(argv=None):
    parser = common.parser(__doc__)
    parser.add_argument("--graph", metavar="PB", help="graph file; without it a network of random weights is made")
    parser.add_argument("--image-size", type=cli.positive, default=256, help="pixels a side")
    parser.add_argument("--batch-size", type=cli.positive, default=64, help="images of a batch")
    parser.add_argument("--batches", type=cli.positive, default=4, help="timed batches of a round")
    parser.add_argument("--repeats", type=cli.positive, default=3, help="rounds, the backends in turn")
    cli.add_device_argument(parser)
    return parser.parse_args(argv)


def measure_backend(backend, path, args):
    """Figures of one round of a backend, and the features of a few images, two arrays.

    The process must be a fresh one.
    """
    import numpy as np

    from evaluation import inception, inception_tf
    from runtime import devices

    graph = {"torch": inception, "tensorflow": inception_tf}[backend].Graph(path, devices.pick_device(args.device))
    shape = args.batch_size, args.image_size, args.image_size, 3
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def extract():
        return [features.cpu() for features in graph.features(images)]  # waits for a GPU

    features = [part[:COMPARED].numpy() for part in extract()]
    seconds = sum(common.timed(extract)[1] for _ in range(args.batches))
    version = sys.modules[backend].__version__
    return {"seconds": seconds, "peak_bytes": peak_resident(), "version": version}, features


def measure(args):
    """Figures of both backends in all rounds. Raises RuntimeError if the features do not agree."""
    import numpy as np

    from benchmarks.inception_graph import inception_v3

    with tempfile.TemporaryDirectory() as folder:
        path = args.graph or common.run_alone(inception_v3, Path(folder) / "random.pb")
        runs = {backend: partial(common.run_alone, measure_backend, backend, path, args) for backend in BACKENDS}
        results = common.in_turn(runs, args.repeats)
    pairs = zip(*(rounds[-1][1] for rounds in results.values()))
    distance = float(np.max([np.linalg.norm(part - expected) / np.linalg.norm(expected) for expected, part in pairs]))
    if not distance <= TOLERANCE:  # or NaN
        raise RuntimeError(f"the features of the backends are {distance:.1e} apart, above {TOLERANCE}")
    measured = {backend: [figures for figures, _ in rounds] for backend, rounds in results.items()}
    return {"distance": distance, "measurements": measured}


def rows(record):
    """A row for each backend; ratios are to TensorFlow's rate."""
    flags, measured = record["flags"], record["measurements"]
    seconds = {backend: [figures["seconds"] for figures in rounds] for backend, rounds in measured.items()}
    for backend, rounds in measured.items():
        rate = flags["batches"] * flags["batch_size"] / statistics.median(seconds[backend])
        yield {
            "device": record["device"],
            "backend": f"{BACKENDS[backend]} {rounds[0]['version']}",
            "weights": Path(flags["graph"]).name if flags["graph"] else "random",
            "pixels": flags["image_size"],
            "batch": flags["batch_size"],
            "images/s": f"{rate:.4g}",
            "ratio": f"{common.median_ratio(seconds['tensorflow'], seconds[backend]):.3f}",
            "peak MB": common.megabytes(max(figures["peak_bytes"] for figures in rounds)),
        }


def main(args):
    common.run_benchmark(args, "extraction-*", measure, rows)


if __name__ == "__main__":
    cli.run(main, parse_args())
