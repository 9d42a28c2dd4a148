"""How much faster two processes sample than one, and which share of their time is neither sampling nor decoding.

    python -m benchmarks.scaling --record benchmarks/results/scaling-fashion-cpu.json
    python -m benchmarks.scaling --table

Runs sample_ddp.py as a user does, alone and under torchrun, in turn: the shipped model, DDIM-20 with its router, one
thread a process, so that two processes have twice the machine. The figures are those of sample_ddp.py: images a second
from the first batch to the last shard, and the shares of process 0's time until the .npz is there. Importing PyTorch
and loading the model come before that, once a launch; "whole command" includes them.
"""

import json
import statistics
import tempfile
from functools import partial
from pathlib import Path

from benchmarks import common
from runtime import cli


def parse_args(argv=None):
    parser = common.parser(__doc__)
    parser.add_argument("--images", type=cli.positive, default=2000, help="images of a run")
    parser.add_argument("--per-proc-batch-size", type=cli.positive, default=32, help="images sampled at a time")
    parser.add_argument("--repeats", type=cli.positive, default=3, help="rounds of both runs, in turn")
    return parser.parse_args(argv)


def run(args, processes):
    """The record of sample_ddp.py of one run by `processes` processes, with its "command_seconds" added."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        flags = [*common.SHIPPED_MODEL, "--accelerate-method", "dynamiclayer", "--path", common.SHIPPED_ROUTER]
        flags += ["--num-fid-samples", args.images, "--per-proc-batch-size", args.per_proc_batch_size]
        flags += ["--sample-dir", folder, "--record", record]
        command = partial(common.run_program, "sample_ddp.py", *flags, processes=processes, OMP_NUM_THREADS="1")
        seconds = common.timed(command)[1]
        return json.loads(record.read_text()) | {"command_seconds": seconds}


def measure(args):
    import torch

    runs = common.in_turn({processes: partial(run, args, processes) for processes in (1, 2)}, args.repeats)
    torch.set_num_threads(1)  # which the record states
    for some in runs.values():
        for record in some:
            shares = record["shares"]
            shares["sampling and decoding"] = shares["sampling"] + shares["decoding"]
    names = "images_per_second", "shares", "seconds", "command_seconds"
    figures = {name: {count: [record[name] for record in some] for count, some in runs.items()} for name in names}
    rates = figures["images_per_second"]
    return {"images": args.images, "scaling": common.median_ratio(rates[2], rates[1]), **figures}


def rows(record):
    """A row for each number of processes."""
    for processes in ("1", "2"):
        share = statistics.median(run["sampling and decoding"] for run in record["shares"][processes])
        yield {
            "device": record["device"],
            "images": f"{record['images']:,}",
            "processes, one thread each": processes,
            "images/s": f"{statistics.median(record['images_per_second'][processes]):.2f}",
            "ratio": f"{record['scaling']:.3f}" if processes == "2" else "1",
            "sampling and decoding": f"{share:.2%}",
            "everything else": f"{1 - share:.2%}",
            "seconds": f"{statistics.median(record['seconds'][processes]):.1f}",
            "whole command": f"{statistics.median(record['command_seconds'][processes]):.1f}",
        }


def main(args):
    common.run_benchmark(args, "scaling-*", measure, rows)


if __name__ == "__main__":
    cli.run(main, parse_args())
