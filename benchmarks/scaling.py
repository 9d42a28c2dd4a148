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
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks import common
from runtime import cli


def parse_args(argv=None):
    parser = cli.ArgumentParser(description="Scaling of sample_ddp.py from one process to two.")
    parser.add_argument("--images", type=cli.positive, default=2000, help="images of a run")
    parser.add_argument("--per-proc-batch-size", type=cli.positive, default=32, help="images sampled at a time")
    parser.add_argument("--repeats", type=cli.positive, default=3, help="rounds of both runs, in turn")
    common.add_record_and_table_arguments(parser)
    return parser.parse_args(argv)


def run(args, processes):
    """The record of sample_ddp.py of one run by `processes` processes, with its "command_seconds" added."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [
            sys.executable,
            *(torchrun if processes > 1 else []),
            common.ROOT / "sample_ddp.py",
            "--ckpt",
            common.SHIPPED,
        ]
        command += ["--num-sampling-steps", 20, "--ddim-sample", "--accelerate-method", "dynamiclayer"]
        command += ["--path", common.SHIPPED / "DDIM20_router.pt", "--thres", 0.1, "--num-fid-samples", args.images]
        command += ["--per-proc-batch-size", args.per_proc_batch_size, "--device", "cpu", "--sample-dir", folder]
        command += ["--record", record]
        seconds = common.timed(partial(common.run_command, *command, OMP_NUM_THREADS="1"))[1]
        return json.loads(record.read_text()) | {"command_seconds": seconds}


def figures(runs):
    """The figures of `runs`, {processes: [records of the rounds]}."""

    def each(value):
        return {processes: [value(run) for run in some] for processes, some in runs.items()}

    def shares(run):
        return run["shares"] | {"sampling and decoding": run["shares"]["sampling"] + run["shares"]["decoding"]}

    rates = each(lambda run: run["images_per_second"])
    return {
        "images": runs[1][0]["images"],
        "images_per_second": rates,
        "scaling": common.median_ratio(rates[2], rates[1]),
        "shares": each(shares),
        "seconds": each(lambda run: run["seconds"]),
        "command_seconds": each(lambda run: run["command_seconds"]),
    }


def measure(args):
    import torch

    runs = common.in_turn({processes: partial(run, args, processes) for processes in (1, 2)}, args.repeats)
    torch.set_num_threads(1)  # which the record states
    return figures(runs)


def table(records):
    """A Markdown table with a row for each number of processes of each record."""
    rows = []
    for record in records:
        for processes in ("1", "2"):
            share = statistics.median(run["sampling and decoding"] for run in record["shares"][processes])
            rows.append(
                {
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
            )
    return common.markdown(rows)


def main(args):
    common.run_benchmark(args, "scaling-*", measure, table)


if __name__ == "__main__":
    cli.run(main, parse_args())
