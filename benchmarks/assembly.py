"""Peak memory and time of making one .npz of a set of samples: as the original implementation does it, and as we do.

    python -m benchmarks.assembly --record benchmarks/results/assembly-cpu.json
    python -m benchmarks.assembly --table            # the table of the records there are

The shards hold random bytes: assembling does not depend on what an image shows. The original holds all images in a list
and joins them for np.savez, so its memory grows with them; it is measured on --original-images, and ours on as many and
on --images. Both must have written the same images and labels.

Each measurement is made once, in a fresh process that imports NumPy and no torch. The peak is that of the whole
process, the base what it held before the work (Python, NumPy). The seconds end when the file is on the disk, for the
original too; ours include the checks of the shards and their removal. They say less than the peaks: what the system
still holds of the shards that were just written, and how fast it hands out memory, is in them.
"""

import shutil
from pathlib import Path

from benchmarks.common import markdown, read_records
from runtime import cli
from runtime.memory import peak_resident

ROOT = Path(__file__).resolve().parent.parent


MEASUREMENTS = {
    "original": "original: a list of all images, joined, np.savez",
    "ours_as_many": "ours",
    "ours": "ours",
}
CLASSES = 1000


def parse_args(argv=None):
    parser = cli.ArgumentParser(description="Peak memory and time of making one .npz of a set of samples.")
    parser.add_argument("--images", type=cli.positive, default=50000, help="images of the set that only ours assembles")
    parser.add_argument(
        "--original-images",
        type=cli.positive,
        default=5000,
        help="images of the set that both assemble; the original holds each twice",
    )
    parser.add_argument("--image-size", type=cli.positive, default=256, help="pixels a side")
    parser.add_argument("--shard", type=cli.positive, default=32, help="images of a shard")
    parser.add_argument(
        "--work",
        metavar="DIR",
        help="folder for the shards, new or empty, removed at the end; without it a new one in the current folder",
    )
    cli.add_record_argument(parser)
    parser.add_argument(
        "--table", action="store_true", help="measure nothing, print the table of results/assembly*.json"
    )
    return parser.parse_args(argv)


def sample_set(folder, images, size):
    """The `SampleSet` of `images` images in `folder`."""
    from evaluation.sample_set import SampleSet

    return SampleSet(folder, "set", {"images": images, "image_size": size, "synthetic": True})


def write_shards(folder, images, size, shard):
    """Writes a set of `images` images of random bytes into `folder`, `shard` of them at a time."""
    import numpy as np
    from tqdm import tqdm

    written = sample_set(folder, images, size)
    written.open()
    with tqdm(total=images, desc="writing shards", unit="image", disable=None) as bar:
        for start in range(0, images, shard):
            shape = min(shard, images - start), size, size, 3
            block = np.frombuffer(np.random.default_rng(start).bytes(int(np.prod(shape))), np.uint8).reshape(shape)
            written.write(start, block, np.arange(start, start + len(block), dtype=np.int64) % CLASSES)
            bar.update(len(block))


def original_assembly(shards, npz):
    """Makes the file `npz` of the shards in the folder `shards` as the original does from what it gathered."""
    import os

    import numpy as np

    images, labels = [], []
    for path in sorted(shards.glob("*.npz")):
        with np.load(path) as arrays:
            images.append(arrays["images"])
            labels.append(arrays["labels"])
    np.savez(npz, arr_0=np.concatenate(images), labels=np.concatenate(labels))
    # Ours does not return before the file is on the disk; the times are to mean the same.
    with npz.open("rb+") as file:
        os.fsync(file.fileno())


def measure(original, folder, images, size):
    """Assembles the set in `folder`, in the original's way or in ours. Returns the figures as a dict for JSON.

    The process must be a fresh one. Ours removes the shards.
    """
    import time

    assembled = sample_set(folder, images, size)
    npz = folder / "original.npz" if original else assembled.npz
    assembled.open()
    base, since = peak_resident(), time.perf_counter()
    if original:
        original_assembly(assembled.shards, npz)
    else:
        assembled.assemble()
    seconds = time.perf_counter() - since
    return {
        "images": images,
        "seconds": seconds,
        "base_bytes": base,
        "peak_bytes": peak_resident(),
        "npz_bytes": npz.stat().st_size,
    }


def contents(npz):
    """What the arrays of a set are: {name: (type, length, shape of an image or label, SHA-256 of the values)}."""
    import hashlib

    from evaluation.npz import read_parts
    from evaluation.sample_set import ROWS

    found = {}
    for name in ("arr_0", "labels"):
        digest, count = hashlib.sha256(), 0
        for part in read_parts(npz, name, ROWS):
            digest.update(part)
            count += len(part)
        found[name] = str(part.dtype), count, part.shape[1:], digest.hexdigest()
    return found


def answer(connection, function, args):
    """In a process that `alone` started: sends (result, None), or (None, what the user is to be told)."""
    import signal

    # Ctrl-C reaches all processes of a terminal: the first one ends this one, and says so once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from runtime.errors import UserError

    try:
        connection.send((function(*args), None))
    except KeyboardInterrupt:
        pass
    except MemoryError:
        connection.send((None, "too little memory: measure less (--help lists the flags)"))
    except (UserError, OSError) as error:
        connection.send((None, str(error)))


def alone(function, *args):
    """What function(*args) returns, in a fresh process that has ended when this returns or raises."""
    import signal
    from multiprocessing import get_context

    from runtime.errors import UserError

    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(theirs, function, args), daemon=True)
    process.start()
    try:
        theirs.close()  # so that the end of the process is the end of what can be received
        result, told = ours.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:
            raise UserError(
                "a measurement was killed: for want of memory, measure less (--help lists the flags)"
            ) from None
        raise RuntimeError(f"{function.__name__} failed, exit code {process.exitcode}") from None
    except KeyboardInterrupt:
        process.terminate()
        raise
    finally:
        process.join()
    if told:
        raise UserError(told)
    return result


def check_place(args):
    """Raises UserError where --work holds something, or the disk is too small for a set and what is made of it."""
    from runtime.errors import UserError

    work = Path(args.work or ".").resolve()
    try:
        if args.work and work.exists() and any(work.iterdir()):
            raise UserError(
                f"--work {args.work} is not empty and would be removed: name a folder that is not there yet"
            )
        free = shutil.disk_usage(work if work.exists() else work.parent).free
    except OSError as error:
        raise UserError(f"--work {args.work} cannot be used: {error.strerror}; name another folder") from error
    # The set that both assemble, shards and two files, is gone before the other one, shards and a file, is written.
    needed = max(3 * args.original_images, 2 * args.images) * 3 * args.image_size**2
    if free < needed:
        raise UserError(
            f"{work} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB will be written at a time: name another disk "
            "with --work, or pass smaller --images and --original-images"
        )


def make_work(name):
    """The folder `name`, made where it is not there, or a new one in the current folder."""
    import tempfile

    from runtime.errors import UserError

    try:
        if not name:
            return Path(tempfile.mkdtemp(dir=".", prefix="assembly-")).resolve()
        work = Path(name).resolve()
        work.mkdir(exist_ok=True)
        return work
    except OSError as error:
        raise UserError(f"cannot write {name or 'here'}: {error.strerror}; name another folder with --work") from error


def measure_all(args, work):
    """The figures of each measurement, {name: {...}}, made in the folder `work`.

    Raises RuntimeError where the two ways do not write the same images and labels.
    """
    measured = {}
    few = work / "few", args.original_images, args.image_size
    alone(write_shards, *few, args.shard)
    measured["original"] = alone(measure, True, *few)
    measured["ours_as_many"] = alone(measure, False, *few)
    theirs, ours = (alone(contents, work / "few" / name) for name in ("original.npz", "set.npz"))
    if theirs != ours:
        raise RuntimeError(f"the original's way wrote {theirs}, ours {ours}")
    shutil.rmtree(work / "few")
    many = work / "many", args.images, args.image_size
    alone(write_shards, *many, args.shard)
    measured["ours"] = alone(measure, False, *many)
    return measured


def table(records):
    """The Markdown text of records that --record wrote: a line a measurement."""
    head = ["pixels, device", "way", "images", "seconds", "images/s", "peak MB", "above the base MB", "file MB"]
    rows = []
    for record in records:
        for name, figures in record["measurements"].items():
            rows.append(
                [
                    f"{record['flags']['image_size']}, {record['device']}",
                    MEASUREMENTS[name],
                    f"{figures['images']:,}",
                    f"{figures['seconds']:.3g}",
                    f"{figures['images'] / figures['seconds']:,.0f}",
                    f"{figures['peak_bytes'] / 1e6:,.0f}",
                    f"{(figures['peak_bytes'] - figures['base_bytes']) / 1e6:,.0f}",
                    f"{figures['npz_bytes'] / 1e6:,.0f}",
                ]
            )
    return markdown(head, rows)


def main(args):
    if args.table:
        print(table(read_records("assembly-*")))
        return

    from runtime.files import check_writable

    check_place(args)
    if args.record:
        check_writable(args.record)
    work = make_work(args.work)
    try:
        with cli.sigterm_interrupts():
            measured = {"measurements": measure_all(args, work)}
    finally:
        shutil.rmtree(work, ignore_errors=True)  # what cannot be removed is a mount point, empty then

    import torch

    from runtime import devices, records

    device = torch.device("cpu")
    print(table([{"flags": vars(args), "device": devices.device_name(device), **measured}]))
    if args.record:
        flags = {name: value for name, value in vars(args).items() if name != "work"}
        records.write_record(args.record, flags, device, measured)


if __name__ == "__main__":
    cli.run(main, parse_args())
