"""Peak memory and time of making one .npz of a sample set: as the original implementation does it, and as we do.

    python -m benchmarks.assembly --record benchmarks/results/assembly-cpu.json
    python -m benchmarks.assembly --table

The shards hold random bytes: the work does not depend on what an image shows. The original holds all images in a list
and joins them for np.savez, so its memory grows with them; it assembles --original-images, ours as many and --images.
Both must write the same images and labels.

Each measurement is one fresh process that imports NumPy and no torch. The peak is that of the whole process, the base
its peak before the work (Python, NumPy). Times end when the file is on the disk; ours include checking and removing the
shards. They depend on what the system still caches of the shards and on how fast it hands out memory.
"""

import shutil
import tempfile
import zipfile
from pathlib import Path

from benchmarks import common
from runtime import cli
from runtime.memory import peak_resident

MEASUREMENTS = {
    "original": "original: a list of all images, joined, np.savez",
    "ours_as_many": "ours",
    "ours": "ours",
}
CLASSES = 1000


def parse_args(argv=None):
    parser = cli.ArgumentParser(description="Peak memory and time of making one .npz of a sample set.")
    parser.add_argument("--images", type=cli.positive, default=50000, help="images of the set that only ours assembles")
    parser.add_argument(
        "--original-images",
        type=cli.positive,
        default=5000,
        help="images of the set that both assemble; the original holds each twice",
    )
    parser.add_argument("--image-size", type=cli.positive, default=256, help="pixels a side")
    parser.add_argument("--shard", type=cli.positive, default=32, help="images of a shard")
    parser.add_argument("--work", metavar="DIR", default=".", help="folder for a temporary folder with the sets")
    common.add_record_and_table_arguments(parser)
    return parser.parse_args(argv)


def sample_set(folder, images, size):
    """The open `SampleSet` of `images` images in `folder`."""
    from evaluation.sample_set import SampleSet

    result = SampleSet(folder, "set", {"images": images, "image_size": size, "synthetic": True})
    result.open()
    return result


def write_shards(folder, images, size, shard):
    """Write a set of `images` images of random bytes into `folder`, in shards of `shard` images."""
    import numpy as np
    from tqdm import tqdm

    written = sample_set(folder, images, size)
    for start in tqdm(range(0, images, shard), desc="writing shards", disable=None):
        shape = min(shard, images - start), size, size, 3
        block = np.random.default_rng(start).integers(0, 256, shape, dtype=np.uint8)
        written.write(start, block, np.arange(start, start + len(block), dtype=np.int64) % CLASSES)


def original_assembly(shards, npz):
    """Make the file `npz` from the folder `shards` as the original does from the images that it gathered."""
    import os

    import numpy as np

    images, labels = [], []
    for path in sorted(shards.glob("*.npz")):
        with np.load(path) as arrays:
            images.append(arrays["images"])
            labels.append(arrays["labels"])
    np.savez(npz, arr_0=np.concatenate(images), labels=np.concatenate(labels))
    with npz.open("rb+") as file:
        os.fsync(file.fileno())  # as ours does


def assemble(original, folder, images, size):
    """Figures of assembling the set in `folder`, in the original's way or in ours, which removes the shards.

    The process must be a fresh one.
    """
    assembled = sample_set(folder, images, size)
    npz = folder / "original.npz" if original else assembled.npz
    base = peak_resident()
    if original:
        seconds = common.timed(original_assembly, assembled.shards, npz)[1]
    else:
        seconds = common.timed(assembled.assemble)[1]
    memory = {"base_bytes": base, "peak_bytes": peak_resident()}
    return {"images": images, "seconds": seconds, **memory, "npz_bytes": npz.stat().st_size}


def contents(npz):
    """{name: (size, CRC-32)} of the arrays of a set."""
    with zipfile.ZipFile(npz) as archive:
        infos = {name: archive.getinfo(f"{name}.npy") for name in ("arr_0", "labels")}
    return {name: (info.file_size, info.CRC) for name, info in infos.items()}


def check_disk(args):
    """Raise UserError if the disk of --work is too small for a set and the files that are made of it."""
    from runtime.errors import UserError

    free = shutil.disk_usage(args.work).free
    # The small set, its shards and two files, is removed before the large one, its shards and one file, is written.
    needed = max(3 * args.original_images, 2 * args.images) * 3 * args.image_size**2
    if free < needed:
        raise UserError(
            f"{args.work} has {free / 1e9:.1f} GB free, the sets need {needed / 1e9:.1f} GB: name another disk "
            "with --work, or pass smaller --images and --original-images"
        )


def measure(args):
    """Figures of all measurements. Raises RuntimeError if the two ways write other images or labels."""
    check_disk(args)
    measured = {}
    with tempfile.TemporaryDirectory(dir=args.work, prefix="assembly-") as folder:
        few = Path(folder) / "few", args.original_images, args.image_size
        common.run_alone(write_shards, *few, args.shard)
        measured["original"] = common.run_alone(assemble, True, *few)
        measured["ours_as_many"] = common.run_alone(assemble, False, *few)
        theirs, ours = (contents(few[0] / name) for name in ("original.npz", "set.npz"))
        if theirs != ours:
            raise RuntimeError(f"the original's way wrote {theirs}, ours {ours}")
        shutil.rmtree(few[0])
        many = Path(folder) / "many", args.images, args.image_size
        common.run_alone(write_shards, *many, args.shard)
        measured["ours"] = common.run_alone(assemble, False, *many)
    return {"measurements": measured}


def table(records):
    """A Markdown table with a row for each measurement of each record."""
    return common.markdown(
        [
            {
                "pixels, device": f"{record['flags']['image_size']}, {record['device']}",
                "way": MEASUREMENTS[name],
                "images": f"{figures['images']:,}",
                "seconds": f"{figures['seconds']:.3g}",
                "images/s": f"{figures['images'] / figures['seconds']:,.0f}",
                "peak MB": f"{figures['peak_bytes'] / 1e6:,.0f}",
                "above the base MB": f"{(figures['peak_bytes'] - figures['base_bytes']) / 1e6:,.0f}",
                "file MB": f"{figures['npz_bytes'] / 1e6:,.0f}",
            }
            for record in records
            for name, figures in record["measurements"].items()
        ]
    )


def main(args):
    common.run_benchmark(args, "assembly-*", measure, table)


if __name__ == "__main__":
    cli.run(main, parse_args())
