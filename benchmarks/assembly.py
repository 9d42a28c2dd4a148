"""Peak memory and time of making one .npz of a sample set: as the original implementation does it, and as we do.

    python -m benchmarks.assembly --record benchmarks/results/assembly-cpu.json
    python -m benchmarks.assembly --table

The shards hold random bytes: the work does not depend on what an image shows. The original holds all images in a list
and joins them for np.savez, so its memory grows with them; it assembles --original-images, ours as many and --images.
Both must write the same images and labels. The disk of --work must hold --images twice (20 GB by default).

Each measurement is one fresh process that imports NumPy and no torch. The peak is that of the whole process, the base
its peak before the work (Python, NumPy). Times end when the file is on the disk; ours include checking and removing the
shards. They depend on what the system still caches of the shards and on how fast it hands out memory.
"""

import os
import shutil
import tempfile
import zipfile
from functools import partial
from pathlib import Path

from benchmarks import common
from runtime import cli

MEASUREMENTS = {
    "original": "original: a list of all images, joined, np.savez",
    "ours_as_many": "ours",
    "ours": "ours",
}


def parse_args(argv=None):
    parser = common.parser(__doc__)
    parser.add_argument("--images", type=cli.positive, default=50000, help="images of the set that only ours assembles")
    parser.add_argument("--original-images", type=cli.positive, default=5000, help="images of the set of both ways")
    parser.add_argument("--image-size", type=cli.positive, default=256, help="pixels a side")
    parser.add_argument("--shard", type=cli.positive, default=32, help="images of a shard")
    parser.add_argument("--work", metavar="DIR", default=".", help="folder for a temporary folder with the sets")
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

    written = sample_set(folder, images, size)
    for start in range(0, images, shard):
        stop = min(start + shard, images)
        block = np.random.default_rng(start).integers(0, 256, (stop - start, size, size, 3), dtype=np.uint8)
        written.write(start, block, np.arange(start, stop, dtype=np.int64) % 1000)


def original_assembly(shards, npz):
    """Make the file `npz` from the folder `shards` as the original does from the images that it gathered."""
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
    function = partial(original_assembly, assembled.shards, npz) if original else assembled.assemble
    _, figures = common.timed_with_memory(function)
    return {"images": images, **figures, "npz_bytes": npz.stat().st_size}


def contents(npz):
    """{name: (size, CRC-32)} of the arrays of a set."""
    with zipfile.ZipFile(npz) as archive:
        infos = {name: archive.getinfo(f"{name}.npy") for name in ("arr_0", "labels")}
    return {name: (info.file_size, info.CRC) for name, info in infos.items()}


def measure(args):
    """Figures of all measurements. Raises RuntimeError if the two ways write other images or labels."""
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


def rows(record):
    """A row for each measurement."""
    for name, figures in record["measurements"].items():
        yield {
            "pixels, device": f"{record['flags']['image_size']}, {record['device']}",
            "way": MEASUREMENTS[name],
            "images": f"{figures['images']:,}",
            "seconds": f"{figures['seconds']:.3g}",
            "images/s": f"{figures['images'] / figures['seconds']:,.0f}",
            **common.memory_cells(figures),
            "file MB": common.megabytes(figures["npz_bytes"]),
        }


def main(args):
    common.run_benchmark(args, "assembly-*", measure, rows)


if __name__ == "__main__":
    cli.run(main, parse_args())
