"""What a user waits for besides sampling: the command of `make demo` at this commit and at an older one, in turn.

    python -m benchmarks.startup --before 3119204^ --record benchmarks/results/startup-cpu.json
    python -m benchmarks.startup --table

Clones both commits into a temporary folder. Both use this environment, so it needs what either imports: that of the
example needs `pip install timm` besides. The first round fills the caches of files and is not counted.
"""

import re
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks import common
from runtime import cli

FLAGS = "--ckpt ckpt/fashion_mnist --num-sampling-steps 20 --ddim-sample --accelerate-method dynamiclayer"
COMMAND = ["sample.py", *FLAGS.split(), "--path", "ckpt/fashion_mnist/DDIM20_router.pt", "--thres", 0.1, "--compare"]
LOOPS = 6  # of each plan: five that are timed, after a warm-up


def parse_args(argv=None):
    parser = common.parser(__doc__)
    parser.add_argument("--before", metavar="COMMIT", default="3119204^", help="the older commit")
    parser.add_argument("--repeats", type=cli.positive, default=3, help="rounds, after a warm-up")
    return parser.parse_args(argv)


def seconds_of(clone):
    """Seconds of the whole command in a clone, and of its sampling loops."""
    printed, whole = common.timed(partial(common.run_command, sys.executable, *COMMAND, cwd=clone))
    means = re.findall(r"^Sampling time: ([\d.]+)", printed, re.M)
    return whole, LOOPS * sum(map(float, means))


def measure(args):
    commits, commands = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, commit in {"before": args.before, "now": "HEAD"}.items():
            commits[name] = common.run_command("git", "rev-parse", "--short", commit).strip()
            clone = Path(folder) / name
            common.run_command("git", "clone", "--quiet", common.ROOT, clone)
            common.run_command("git", "checkout", "--quiet", commits[name], cwd=clone)
            commands[name] = partial(seconds_of, clone)
        measured = common.in_turn(commands, args.repeats + 1)
    return {"commits": commits, "seconds": {name: some[1:] for name, some in measured.items()}}


def table(records):
    rows = []
    for record in records:
        for name, commit in record["commits"].items():
            whole, loops = zip(*record["seconds"][name])
            columns = {"whole command": whole, "loops": loops, "the rest": [a - b for a, b in zip(whole, loops)]}
            medians = {head: f"{statistics.median(seconds):.1f} s" for head, seconds in columns.items()}
            rows.append({"commit": commit} | medians)
    return common.markdown(rows)


def main(args):
    common.run_benchmark(args, "startup-*", measure, table=table)


if __name__ == "__main__":
    cli.run(main, parse_args())
