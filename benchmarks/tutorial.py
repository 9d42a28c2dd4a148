"""How long the commands of docs/tutorial.md take, each as typed, one after the other in a fresh clone.

    python -m benchmarks.tutorial --record benchmarks/results/tutorial-cpu.json
    python -m benchmarks.tutorial --table            # the table that the tutorial shows

Clones the last commit into a temporary folder, which uses this environment, and first makes the images of the demo.
Times are of whole commands: importing, loading, reading and writing included.
"""

import os
import re
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks import common
from runtime import cli

# Published, DiT-XL/2 at 256 pixels on an A5000: 8 images with guidance, the diffusion loop of 20 steps.
FULL, ROUTER = 2.869, 2.261
STEP = FULL / (2 * 8 * 20)  # of one sample in one pass through the model
# The seconds that each command computes there at least, without loading, decoding and disks; None is not known.
ESTIMATES = [
    ("8 pictures, 6 times", 6 * FULL),
    ("20,000 updates of 64 images, 4 passes each", 20_000 * 64 * 4 * STEP),
    ("8 pictures, 6 times each way", 6 * (FULL + ROUTER)),
    ("50,000 images", 50_000 / 8 * ROUTER),
    ("50,000 images", None),
]


def parse_args(argv=None):
    parser = common.parser(__doc__)
    parser.set_defaults(device="auto")  # as the commands choose it
    return parser.parse_args(argv)


def numbered_commands():
    """(title, command) of the tutorial's numbered headings: the first command below each, on one line."""
    text = (common.ROOT / "docs" / "tutorial.md").read_text().replace("\\\n", " ")
    return re.findall(r"^## (\d\. [^\n]*)\n.*?^```\n([^\n]*)\n", text, re.M | re.S)


def duration(seconds):
    """Seconds as text in the unit that suits them."""
    for size, unit in (3600, "h"), (60, "min"):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"


def measure(args):
    """Seconds of each command, a list. Raises UserError if a command fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        common.run_command("git", "clone", "--quiet", common.ROOT, clone)
        for command in ["python -m demo.fashion_mnist", *(command for _, command in numbered_commands())]:
            seconds.append(common.timed(partial(common.run_command, "bash", "-c", command, cwd=clone, PATH=path))[1])
            print(f"{seconds[-1]:6.1f} s  {command}", file=sys.stderr, flush=True)
    return {"seconds": seconds[1:]}


def table(records):
    """A Markdown table with a row for each command and a column for each record."""
    rows = []
    for (title, _), (work, estimate), *seconds in zip(numbered_commands(), ESTIMATES, *(r["seconds"] for r in records)):
        columns = {f"small model, {record['device']}": duration(some) for record, some in zip(records, seconds)}
        estimate = f"{work}: {duration(estimate) if estimate else 'not known'}"
        rows.append({"command": title, **columns, "DiT-XL/2 at 256 pixels, one A5000: estimated": estimate})
    return common.markdown(rows)


def main(args):
    common.run_benchmark(args, "tutorial-*", measure, table=table)


if __name__ == "__main__":
    cli.run(main, parse_args())
