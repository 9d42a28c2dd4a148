"""How long the commands of docs/tutorial.md take, each as typed, one after the other in a fresh clone.

    python -m benchmarks.tutorial --record benchmarks/results/tutorial-cpu.json
    python -m benchmarks.tutorial --table            # the table of the record, which the tutorial shows

The clone is of the last commit, in a temporary folder, and uses this environment. The images that the tutorial exports
first are made before. Times are of whole commands: importing, loading, reading and writing included.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import markdown, read_records
from runtime import cli

ROOT = Path(__file__).resolve().parent.parent


# Published, DiT-XL/2 at 256 pixels on an A5000: 8 images with guidance, the diffusion loop of 20 steps.
FULL, ROUTER = 2.869, 2.261
STEP = FULL / (2 * 8 * 20)  # of one sample in one pass through the model
# What each command computes there at least, without loading, decoding and disks; None is not known.
ESTIMATES = [
    ("8 pictures, 6 times", 6 * FULL),
    ("20,000 updates of 64 images, 4 passes each", 20_000 * 64 * 4 * STEP),
    ("8 pictures, 6 times each way", 6 * (FULL + ROUTER)),
    ("50,000 images", 50_000 / 8 * ROUTER),
    ("50,000 images", None),
]


def parse_args(argv=None):
    parser = cli.ArgumentParser(description="Seconds of each command of docs/tutorial.md.")
    cli.add_record_argument(parser)
    parser.add_argument("--table", action="store_true", help="measure nothing, print that of results/tutorial-*.json")
    return parser.parse_args(argv)


def numbered_commands():
    """(title, command) of the tutorial's numbered headings: the first command below each, on one line."""
    text = (ROOT / "docs" / "tutorial.md").read_text().replace("\\\n", " ")
    return re.findall(r"^## (\d\. [^\n]*)\n.*?^```\n([^\n]*)\n", text, re.M | re.S)


def duration(seconds):
    """Seconds as text in the unit that suits them."""
    for size, unit in (3600, "h"), (60, "min"):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"


def table(records):
    """The Markdown text of records."""
    head = ["command", *(f"small model, {record['device']}" for record in records)]
    head += ["DiT-XL/2 at 256 pixels, one A5000: estimated"]
    rows = []
    for number, (title, _) in enumerate(numbered_commands()):
        work, seconds = ESTIMATES[number]
        estimate = f"{work}: {duration(seconds) if seconds else 'not known'}"
        rows.append([title, *(duration(record["seconds"][number]) for record in records), estimate])
    return markdown(head, rows)


def measure():
    """Seconds of each command, a list. Raises UserError where one fails."""
    from runtime.errors import UserError

    bin_folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        commands = ["python -m demo.fashion_mnist", *(command for _, command in numbered_commands())]
        for command in commands:
            since = time.perf_counter()
            result = subprocess.run(["bash", "-c", command], cwd=clone, env=environment, capture_output=True, text=True)
            if result.returncode:
                raise UserError(f"`{command}` failed: {result.stderr.strip()}")
            seconds.append(time.perf_counter() - since)
            print(f"{seconds[-1]:6.1f} s  {command}", flush=True)
    return seconds[1:]


def main(args):
    if args.table:
        print(table(read_records("tutorial-*")))
        return

    from runtime.files import check_writable

    if args.record:
        check_writable(args.record)
    seconds = measure()

    import torch

    from runtime import devices, records

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # what the commands take by themselves
    measured = {"seconds": seconds}
    print(table([{"device": devices.device_name(device), **measured}]))
    if args.record:
        records.write_record(args.record, vars(args), device, measured)


if __name__ == "__main__":
    cli.run(main, parse_args())
