"""Images a second, and peak memory, of the features of FID: by PyTorch (inception.py) and by TensorFlow.

    python -m benchmarks.extraction --record benchmarks/results/extraction-cpu.json
    python -m benchmarks.extraction --table          # the table of the records there are

The images are random, and so are the weights where no --graph is given: the work does not depend on them. Both backends
run in turn, each round of each in a fresh process. The first batch is not counted: with it TensorFlow prepares its
graph. Images start as uint8 arrays, and features count when they are on the CPU. The peak is that of the whole process,
its libraries included; on a GPU it does not hold the GPU's memory. The features of both must agree to 1e-5.
"""

import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.assembly import alone
from benchmarks.common import markdown, read_records
from runtime import cli
from runtime.memory import peak_resident

ROOT = Path(__file__).resolve().parent.parent


BACKENDS = {"tensorflow": "TensorFlow", "torch": "PyTorch"}
TOLERANCE = 1e-5  # of the features, relative L2
COMPARED = 4  # images of a process, of which the features are kept


def parse_args(argv=None):
    parser = cli.ArgumentParser(description="Speed and memory of the two ways to compute the features of FID.")
    parser.add_argument("--graph", metavar="PB", help="graph file; without it one of random weights is made")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="what is measured")
    parser.add_argument("--image-size", type=cli.positive, default=256, help="pixels a side")
    parser.add_argument("--batch-size", type=cli.positive, default=64, help="images handed over at a time")
    parser.add_argument("--batches", type=cli.positive, default=4, help="timed batches of a round")
    parser.add_argument("--repeats", type=cli.positive, default=3, help="rounds, the backends in turn")
    cli.add_device_argument(parser)
    cli.add_record_argument(parser)
    parser.add_argument(
        "--table", action="store_true", help="measure nothing, print the table of results/extraction-*.json"
    )
    return parser.parse_args(argv)


def write_graph(path):
    """Writes a graph of the published structure with random weights to `path`."""
    from benchmarks.inception_graph import inception_v3

    inception_v3(path)


def measure(backend, path, args):
    """The figures of one round of one backend, a dict for JSON, and some features, two arrays.

    The process must be a fresh one.
    """
    import time

    import numpy as np

    from evaluation import inception, inception_tf
    from runtime import devices

    graph = {"torch": inception, "tensorflow": inception_tf}[backend].load_graph(path, devices.pick_device(args.device))
    shape = args.batch_size, args.image_size, args.image_size, 3
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def extract():
        return [features.cpu() for features in graph.features(images)]  # waits for a GPU

    features = [part[:COMPARED].numpy() for part in extract()]
    since = time.perf_counter()
    for _ in range(args.batches):
        extract()
    seconds = time.perf_counter() - since
    version = sys.modules[backend].__version__
    return {"seconds": seconds, "peak_bytes": peak_resident(), "version": version}, features


def check_agreement(features):
    """The largest distance, relative L2, of a backend's features to the first one's; None of one backend alone.

    features: {backend: [arrays]}. Raises RuntimeError where it is above 1e-5.
    """
    import numpy as np

    first, *others = features.values()
    pairs = [pair for other in others for pair in zip(other, first)]
    if not pairs:
        return None
    largest = float(np.max([np.linalg.norm(part - expected) / np.linalg.norm(expected) for part, expected in pairs]))
    if not largest <= TOLERANCE:  # nor NaN
        raise RuntimeError(f"the features of {' and '.join(features)} are {largest:.1e} apart, above {TOLERANCE}")
    return largest


def measure_all(args, path):
    """The figures of all backends and rounds, as a dict for JSON. Raises RuntimeError where features do not agree."""
    measured, features = {backend: [] for backend in args.backends}, {}
    for _ in range(args.repeats):
        for backend, rounds in measured.items():
            figures, features[backend] = alone(measure, backend, path, args)
            rounds.append(figures)
            rate = args.batches * args.batch_size / figures["seconds"]
            print(f"{BACKENDS[backend]}: {rate:.2f} images/s", file=sys.stderr, flush=True)
    return {"distance": check_agreement(features), "measurements": measured}


def table(records):
    """The Markdown text of records that --record wrote: a line for each backend. Ratios are to the first one's rate."""
    head = ["device", "backend", "weights", "pixels", "batch", "images/s", "ratio", "peak MB"]
    rows = []
    for record in records:
        flags = record["flags"]
        images = flags["batches"] * flags["batch_size"]
        first = next(iter(record["measurements"].values()))
        for backend, rounds in record["measurements"].items():
            # Neighbouring rounds share the state of the machine: the median of their ratios.
            ratio = statistics.median(other["seconds"] / ours["seconds"] for other, ours in zip(first, rounds))
            rows.append(
                [
                    record["device"],
                    f"{BACKENDS[backend]} {rounds[0]['version']}",
                    flags["graph"] or "random",
                    str(flags["image_size"]),
                    str(flags["batch_size"]),
                    f"{images / statistics.median(figures['seconds'] for figures in rounds):.4g}",
                    f"{ratio:.3f}",
                    f"{max(figures['peak_bytes'] for figures in rounds) / 1e6:,.0f}",
                ]
            )
    return markdown(head, rows)


def main(args):
    if args.table:
        print(table(read_records("extraction-*")))
        return

    from runtime.files import check_writable

    if args.record:
        check_writable(args.record)
    with cli.sigterm_interrupts(), tempfile.TemporaryDirectory() as folder:
        path = args.graph
        if not path:
            path = Path(folder) / "random.pb"
            alone(write_graph, path)
        measured = measure_all(args, path)

    from runtime import devices, records

    device = devices.pick_device(args.device)
    flags = vars(args) | {"graph": args.graph and Path(args.graph).name}
    print(table([{"flags": flags, "device": devices.device_name(device), **measured}]))
    if args.record:
        records.write_record(args.record, flags, device, measured)


if __name__ == "__main__":
    cli.run(main, parse_args())
