"""The records in benchmarks/results; prints the table of speed of the README: python -m benchmarks.records"""

import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def read_records(pattern):
    """The records in results/ whose names, without .json, match `pattern`, by name."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{pattern}.json"))]


def markdown(head, rows):
    """A Markdown table of texts."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def row(record):
    """The cells of one record that sample.py --compare --record wrote."""
    flags = record["flags"]
    model = flags["ckpt"] or flags["model"]
    images = len(flags["class_labels"])
    psnr = record["psnr_db"]
    return [
        f"{model}{', random weights' if flags['random_weights'] else ''}",
        f"{flags['num_sampling_steps']}",
        f"{images}",
        f"{record['cached_share']:.1%}",
        f"{record['bound']:.3f}",
        f"{record['speedup']:.3f} ({record['share_of_bound']:.1%}{', one run' if flags['repeats'] == 1 else ''})",
        ", ".join(f"{statistics.median(seconds):.2f}" for seconds in record["seconds"].values()),
        ", ".join(f"{rate:.0f}" for rate in record["g_multiply_adds_per_second"].values()),
        "equal" if psnr is None else f"{psnr:.1f}{' (latents)' if flags['random_weights'] else ''}",
        record["commit"][:7],
    ]


def table():
    """The Markdown text."""
    head = ["model", "steps", "images", "layers cached", "bound", "speed-up (of the bound)"]
    head += ["seconds: full, router", "G multiply-adds/s: full, router, plain products", "PSNR, dB", "commit"]
    return markdown(head, [row(record) for record in read_records("*") if "speedup" in record])


if __name__ == "__main__":
    print(table())
