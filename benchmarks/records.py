"""The speed-up table of the README, from the records of `sample.py --compare`: python -m benchmarks.records"""

import statistics

from benchmarks.common import markdown, read_records


def cells(record):
    """One row: the cells of a record that sample.py --compare --record wrote, by the title of their column."""
    flags, psnr = record["flags"], record["psnr_db"]
    random = flags["random_weights"]
    one_run = ", one run" if flags["repeats"] == 1 else ""
    seconds = (f"{statistics.median(runs):.2f}" for runs in record["seconds"].values())
    rates = (f"{rate:.0f}" for rate in record["g_multiply_adds_per_second"].values())
    return {
        "model": f"{flags['ckpt'] or flags['model']}{', random weights' if random else ''}",
        "steps": flags["num_sampling_steps"],
        "images": len(flags["class_labels"]),
        "plan": plan(flags),
        "layers cached": f"{record['cached_share']:.1%}",
        "bound": f"{record['bound']:.3f}",
        "speed-up (of the bound)": f"{record['speedup']:.3f} ({record['share_of_bound']:.1%}{one_run})",
        "seconds: full, plan": ", ".join(seconds),
        "G multiply-adds/s: full, plan, plain products": ", ".join(rates),
        "PSNR, dB": "equal" if psnr is None else f"{psnr:.1f}{' (latents)' if random else ''}",
        "commit": (record["commit"] or "unknown")[:7],  # none without git
    }


def plan(flags):
    """The plan of a record in words, from its flags; older records have no settings beside the router."""
    words = {"dynamiclayer": "router", "fora": f"every {flags.get('interval')} steps"}
    method = flags["accelerate_method"]
    return words.get(method, method) + (f", order {flags['forecast']}" if flags.get("forecast") else "")


def table():
    """The table as Markdown."""
    return markdown([cells(record) for record in read_records("*") if "speedup" in record])


if __name__ == "__main__":
    print(table())
