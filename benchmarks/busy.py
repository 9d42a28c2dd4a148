"""What another job on the machine costs: sample.py beside busy loops, for several waits of OpenMP's threads.

    python -m benchmarks.busy --record benchmarks/results/busy-cpu.json
    python -m benchmarks.busy --table

After each part of its work an OpenMP thread spins before it sleeps. If other jobs hold a core, the spinning threads
take the time of the thread that they wait for. GOMP_SPINCOUNT limits it: 300000 turns is the default of libgomp, 1000
that of our programs (runtime/cli.py). All cells run in turn, each in a fresh process: ten images of the shipped model,
DDIM-20 with guidance, all cores. A busy loop is a Python process that never sleeps. Figures are the seconds of the
sampling loop, medians over the rounds.
"""

import re
import statistics
import sys
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from subprocess import Popen

from benchmarks import common
from runtime import cli

SPIN_COUNTS = {300000: "300,000 (libgomp)", 1000: "1,000 (ours)", 0: "0"}
BUSY_LOOPS = {0: "idle", 1: "one busy loop", 2: "two busy loops"}


def parse_args(argv=None):
    parser = common.parser(__doc__)
    parser.add_argument("--repeats", type=cli.positive, default=3, help="rounds of all cells, in turn")
    return parser.parse_args(argv)


@contextmanager
def busy_loops(count):
    """Keep `count` cores busy in this block."""
    loops = [Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def sampling_seconds(spin_count, count):
    """Seconds of the sampling loop of sample.py, after its warm-up, beside `count` busy loops."""
    flags = [*common.SHIPPED_MODEL, "--class-labels", *range(10), "--repeats", 1]
    with tempfile.TemporaryDirectory() as folder, busy_loops(count):
        flags += ["--out", Path(folder) / "out.png"]
        out = common.run_program("sample.py", *flags, GOMP_SPINCOUNT=str(spin_count))
    return float(re.search(r"^Sampling time: ([\d.]+)", out, re.M)[1])


def measure(args):
    """{"seconds": {spin count: {busy loops: [seconds of each round]}}}"""
    cells = [(spin_count, count) for count in BUSY_LOOPS for spin_count in SPIN_COUNTS]
    seconds = common.in_turn({cell: partial(sampling_seconds, *cell) for cell in cells}, args.repeats)
    return {"seconds": {spin: {count: seconds[spin, count] for count in BUSY_LOOPS} for spin in SPIN_COUNTS}}


def rows(record):
    """A row for each spin count."""
    for spin_count, cells in record["seconds"].items():
        medians = {BUSY_LOOPS[int(count)]: f"{statistics.median(some):.2f}" for count, some in cells.items()}
        yield {"device": record["device"], "GOMP_SPINCOUNT": SPIN_COUNTS[int(spin_count)], **medians}


def main(args):
    common.run_benchmark(args, "busy-*", measure, rows)


if __name__ == "__main__":
    cli.run(main, parse_args())
