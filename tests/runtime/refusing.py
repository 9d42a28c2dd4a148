"""A program for test_processes.py that refuses its input under torchrun."""

import os
import time

from runtime import cli
from runtime.errors import UserError

RANK = int(os.environ["RANK"])
SLOW = 3  # seconds that rank 0 needs longer than the others


def main(args):
    from runtime.processes import Processes

    def refuse():
        raise UserError("refused")

    processes = Processes()
    processes.connect()
    try:
        processes.run_everywhere(refuse)
    finally:
        time.sleep(SLOW if RANK == 0 else 0)


if __name__ == "__main__":
    parser = cli.ArgumentParser()
    parser.add_argument("fault", choices=["flags", "files", "flags of the other ranks"])
    args = parser.parse_args()
    if args.fault == "flags":
        time.sleep(SLOW if RANK == 0 else 0)
        parser.error("refused")
    if args.fault == "flags of the other ranks":
        cli.WAIT_FOR_MAIN = 0
        if RANK > 0:
            parser.error(f"refused by rank {RANK}")
        time.sleep(600)
    cli.run(main, args)
