"""How much faster two processes sample than one, and what share of their time is neither sampling nor decoding.

    python -m benchmarks.scaling --record benchmarks/results/scaling-fashion-cpu.json
    python -m benchmarks.scaling --table            # the table of the records there are

Runs sample_ddp.py as a user does, alone and under torchrun, in turn: the shipped model, DDIM-20 with its router, one
thread a process, so that two processes have twice the machine that one has. What a run says of itself is what counts:
images a second from the first batch to the last shard, and the shares of the time until the .npz is there, for process
0. Importing PyTorch and loading the model come before, once a start; "whole command" has them too.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import markdown, read_records
from runtime import cli

ROOT = Path(__file__).resolve().parent.parent


MODEL = ROOT / "ckpt" / "fashion_mnist"


def parse_args(argv=None):
    parser = cli.ArgumentParser(description="Scaling of sample_ddp.py from one process to two.")
    parser.add_argument("--images", type=cli.positive, default=2000, help="images of a run")
    parser.add_argument("--per-proc-batch-size", type=cli.positive, default=32, help="images sampled at a time")
    parser.add_argument("--repeats", type=cli.positive, default=3, help="runs of each kind, in turn")
    cli.add_record_argument(parser)
    parser.add_argument(
        "--table", action="store_true", help="measure nothing, print the table of results/scaling-*.json"
    )
    return parser.parse_args(argv)


def run(args, processes):
    """What sample_ddp.py records of one run by `processes` processes, with the "command_seconds" around it.

    Raises UserError where it fails.
    """
    from runtime.errors import UserError

    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(torchrun if processes > 1 else []), ROOT / "sample_ddp.py", "--ckpt", MODEL]
        command += ["--num-sampling-steps", 20, "--ddim-sample", "--accelerate-method", "dynamiclayer"]
        command += ["--path", MODEL / "DDIM20_router.pt", "--thres", 0.1, "--num-fid-samples", args.images]
        command += ["--per-proc-batch-size", args.per_proc_batch_size, "--device", "cpu", "--sample-dir", folder]
        command += ["--record", record]
        since = time.perf_counter()
        result = subprocess.run(
            list(map(str, command)), env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        seconds = time.perf_counter() - since
        if result.returncode:
            raise UserError(f"sample_ddp.py failed: {' '.join(result.stderr.split()[-40:])}")
        return json.loads(record.read_text()) | {"command_seconds": seconds}


def figures(runs):
    """What was measured, as a dict for JSON; runs: {processes: [records of runs]}, run in turn."""
    one, two = ([run["images_per_second"] for run in runs[processes]] for processes in (1, 2))

    def shares(run):
        return run["shares"] | {"sampling and decoding": run["shares"]["sampling"] + run["shares"]["decoding"]}

    return {
        "images": runs[1][0]["images"],
        "images_per_second": {1: one, 2: two},
        # Neighbouring runs share the state of the machine: the median of their ratios.
        "scaling": statistics.median(b / a for a, b in zip(one, two)),
        "shares": {processes: [shares(run) for run in some] for processes, some in runs.items()},
        "seconds": {processes: [run["seconds"] for run in some] for processes, some in runs.items()},
        "command_seconds": {processes: [run["command_seconds"] for run in some] for processes, some in runs.items()},
    }


def table(records):
    """The Markdown text of records that --record wrote: a line for each number of processes."""
    head = ["device", "images", "processes, one thread each", "images/s", "ratio"]
    head += ["sampling and decoding", "everything else", "seconds", "whole command"]
    rows = []
    for record in records:
        for processes in ("1", "2"):
            share = statistics.median(run["sampling and decoding"] for run in record["shares"][processes])
            rows.append(
                [
                    record["device"],
                    f"{record['images']:,}",
                    processes,
                    f"{statistics.median(record['images_per_second'][processes]):.2f}",
                    f"{record['scaling']:.3f}" if processes == "2" else "1",
                    f"{share:.2%}",
                    f"{1 - share:.2%}",
                    f"{statistics.median(record['seconds'][processes]):.1f}",
                    f"{statistics.median(record['command_seconds'][processes]):.1f}",
                ]
            )
    return markdown(head, rows)


def main(args):
    if args.table:
        print(table(read_records("scaling-*")))
        return

    from runtime.files import check_writable

    if args.record:
        check_writable(args.record)
    runs = {1: [], 2: []}
    for _ in range(args.repeats):
        for processes, some in runs.items():  # in turn, so that a machine that slows down slows both
            some.append(run(args, processes))
            print(f"{processes} processes: {some[-1]['images_per_second']:.2f} images/s", flush=True)

    import torch

    from runtime import devices, records

    torch.set_num_threads(1)
    device = torch.device("cpu")
    measured = json.loads(json.dumps(figures(runs)))  # as a record: names are texts
    print(table([{"device": devices.device_name(device), **measured}]))
    if args.record:
        records.write_record(args.record, vars(args), device, measured)


if __name__ == "__main__":
    cli.run(main, parse_args())
