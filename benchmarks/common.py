"""What the benchmarks share: flags, records, Markdown tables, timed rounds, other programs, fresh processes."""

import json
import multiprocessing
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from runtime import cli

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHIPPED = ROOT / "ckpt" / "fashion_mnist"


def add_record_and_table_arguments(parser):
    """The flags that `run_benchmark` reads."""
    cli.add_record_argument(parser)
    parser.add_argument(
        "--table", action="store_true", help="measure nothing, print the table of the records in benchmarks/results"
    )


def run_benchmark(args, records, measure, table):
    """The main function of a benchmark: measure, print the table, write the record; with --table only print.

    records: pattern for the names of this benchmark's records. table: a function, list of records -> text.
    measure: a function, args -> dict of figures for JSON.
    """
    from runtime.errors import UserError
    from runtime.files import check_writable

    if args.table:
        found = read_records(records)
        if not found:
            raise UserError(f"no record {records}.json in {RESULTS}: measure with --record first")
        print(table(found))
        return
    if args.record:
        check_writable(args.record)
    with cli.sigterm_interrupts():
        figures = measure(args)

    import torch  # after measuring, so that the process that starts the others is small

    from runtime.devices import device_name, pick_device
    from runtime.records import write_record

    device = pick_device(getattr(args, "device", "cpu"))
    flags = {name: value for name, value in vars(args).items() if name != "work"}
    record = {"flags": flags, "device": device_name(device), "torch": torch.__version__, **figures}
    print(table([json.loads(json.dumps(record))]))  # as it is read from a file
    if args.record:
        write_record(args.record, flags, device, figures)


def read_records(pattern):
    """The records in results/ whose names, without .json, match `pattern`; sorted by name."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{pattern}.json"))]


def markdown(rows, head=None):
    """A Markdown table. rows: dicts {title: cell}, or lists of cells with their titles in `head`."""
    if head is None:
        head, rows = list(rows[0]), [row.values() for row in rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in [head, ["---"] * len(head), *rows])


def timed(function, *args, device=None):
    """(result, seconds) of function(*args), the work on a GPU `device` included."""

    def now():
        if device is not None:
            from runtime.devices import synchronize  # imports torch

            synchronize(device)
        return time.perf_counter()

    start = now()
    return function(*args), now() - start


def in_turn(functions, repeats):
    """Results of each of `functions`, {name: [...]}, from `repeats` rounds of all.

    All run in turn, so that a machine that slows down slows all of them.
    """
    from tqdm import tqdm

    results = {name: [] for name in functions}
    for name in tqdm(list(functions) * repeats, disable=None):
        results[name].append(functions[name]())
    return results


def time_in_turn(functions, repeats, device=None):
    """Seconds of each of `functions`, {name: [...]}: `repeats` rounds of all in turn, after a warm-up round."""
    timings = {name: partial(timed, function, device=device) for name, function in functions.items()}
    return {name: [seconds for _, seconds in some[1:]] for name, some in in_turn(timings, repeats + 1).items()}


def median_ratio(numerators, denominators):
    """The median over the rounds: the two runs of one round share the state of the machine."""
    return statistics.median(a / b for a, b in zip(numerators, denominators))


def share_weights(module):
    """A copy of `module` with the same parameters."""
    import copy

    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


def run_command(*command, cwd=ROOT, **environment):
    """Run a command and return its standard output, which is shown on standard error meanwhile.

    Raises UserError if the command fails.
    """
    from runtime.errors import UserError

    command = list(map(str, command))
    process = subprocess.Popen(command, cwd=cwd, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
    lines = []
    try:
        for line in process.stdout:
            print(line, end="", file=sys.stderr, flush=True)
            lines.append(line)
    except KeyboardInterrupt:
        process.terminate()
        raise
    finally:
        process.wait()
    if process.returncode:
        raise UserError(f"exit code {process.returncode}, see above, from: {shlex.join(command)}")
    return "".join(lines)


def _only_sigterm_interrupts():
    """Leave it to the first process to end this one: Ctrl-C reaches all processes of a terminal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def run_alone(function, *args):
    """Result of function(*args) in a fresh process, which has ended when this returns or raises.

    Raises what the function raises, and UserError if the process was killed.
    """
    from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor

    from runtime.errors import UserError

    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _only_sigterm_interrupts) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            raise UserError(
                "a measurement was killed, probably for lack of memory: measure less (--help lists the flags)"
            ) from None
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.terminate()
            raise
