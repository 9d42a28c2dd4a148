"""A program for test_processes.py whose ranks exchange a message and end; then it prints how many threads Gloo has."""

import atexit
import contextlib
from pathlib import Path

from runtime import cli
from runtime.errors import UserError


def print_threads():
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            names.append(path.read_text())
    print(f"threads: {sum('gloo' in name for name in names)}")


def main(args):
    from runtime.processes import Processes

    atexit.register(print_threads)  # the first one registered is the last one called
    processes = Processes()
    processes.connect()
    from torch.distributed import nn  # as AdamW does: `nn` holds the group that exists when it is imported

    assert nn
    processes.gather("message")
    if args.end == "refusal":
        raise UserError("refused")
    processes.disconnect()


if __name__ == "__main__":
    parser = cli.ArgumentParser()
    parser.add_argument("end", choices=["success", "refusal"])
    cli.run(main, parser.parse_args())
