"""What the benchmarks share: flags, records, Markdown tables, timed rounds, programs, fresh processes."""

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

from runtime import cli, signals
from runtime.memory import peak_resident

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHIPPED = ROOT / "ckpt" / "fashion_mnist"
SHIPPED_ROUTER = SHIPPED / "DDIM20_router.pt"
# Flags of sample.py and sample_ddp.py.
SHIPPED_MODEL = ["--ckpt", SHIPPED, "--num-sampling-steps", 20, "--ddim-sample", "--device", "cpu"]


def parser(description):
    """A parser with the flags that `run_benchmark` reads."""
    result = cli.ArgumentParser(description=description)
    cli.add_record_argument(result)
    help_text = "measure nothing, print the table of the records in benchmarks/results"
    result.add_argument("--table", action="store_true", help=help_text)
    return result


def run_benchmark(args, pattern, measure, rows=None, table=None):
    """The main function of a benchmark: measure, print the table, write the record; with --table only print.

    pattern: of the names of this benchmark's records. measure: a function, args -> dict of figures for JSON.
    rows: a function, record -> rows of the table as dicts. table: instead of it a function, list of records -> text.
    """
    from runtime.errors import UserError
    from runtime.files import check_writable

    def show(records):
        print(table(records) if table else markdown([row for record in records for row in rows(record)]))

    if args.table:
        records = read_records(pattern)
        if not records:
            raise UserError(f"no record {pattern}.json in {RESULTS}: measure with --record first")
        return show(records)
    if args.record:
        check_writable(args.record)
    with signals.sigterm_interrupts():
        figures = measure(args)

    import torch  # after measuring, so that the process that starts the others is small

    from runtime.devices import device_name, pick_device
    from runtime.records import write_record

    device = pick_device(getattr(args, "device", "cpu"))
    flags = {name: value for name, value in vars(args).items() if name != "work"}
    record = {"flags": flags, "device": device_name(device), "torch": torch.__version__, **figures}
    show([json.loads(json.dumps(record))])  # as it is read from a file
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


def timed_with_memory(function, *args):
    """(result, figures) of function(*args): its seconds, and the peak memory of the process before and after it."""
    base = peak_resident()
    result, seconds = timed(function, *args)
    return result, {"seconds": seconds, "base_bytes": base, "peak_bytes": peak_resident()}


def megabytes(count):
    """A number of bytes as a cell of a table in MB."""
    return f"{count / 1e6:,.0f}"


def memory_cells(figures):
    """The cells of a table for the memory in `figures` of `timed_with_memory`."""
    base, peak = figures["base_bytes"], figures["peak_bytes"]
    return {"peak MB": megabytes(peak), "above the base MB": megabytes(peak - base)}


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


def run_program(program, *flags, processes=1, **environment):
    """`run_command` of a program of ours, e.g. sample.py, under torchrun if there are several processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return run_command(sys.executable, *(torchrun if processes > 1 else []), ROOT / program, *flags, **environment)


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
