"""Fashion-MNIST as an ImageFolder of 32x32 RGB PNGs: demo/data/{train,test}/<class>/<index>.png

    python -m demo.fashion_mnist [--source DIR]        # 12 s on a laptop; 70,000 files, 280 MB on disk

The 28x28 pixels keep their values; a black border of two pixels makes the sides 32.
Source of the images: Xiao et al. 2017, arXiv:1708.07747 (MIT licence).
"""

import gzip
import struct
import zlib
from pathlib import Path

from runtime import cli

HERE = Path(__file__).resolve().parent
SYSTEM = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
CLASSES = "t-shirt trouser pullover dress coat sandal shirt sneaker bag ankle-boot".split()


def parse_args(argv=None):
    parser = cli.ArgumentParser(description="Export Fashion-MNIST as an ImageFolder of 32x32 RGB images.")
    source = f"folder of the four original .gz files; default: {SYSTEM} if present, else they are downloaded"
    parser.add_argument("--source", type=Path, help=source)
    parser.add_argument("--out", type=Path, default=HERE / "data", help="folder to write train/ and test/ into")
    return parser.parse_args(argv)


def find_source(source, out):
    """The folder that holds the four files. Raises UserError if there is none and no network."""
    from runtime.errors import UserError

    if source is None and SYSTEM.is_dir():
        source = SYSTEM
    if source is None:
        from torchvision.datasets import FashionMNIST

        try:
            FashionMNIST(out, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"Fashion-MNIST could not be downloaded ({error}): install Debian's dataset-fashion-mnist, "
                "or name a folder of its four .gz files with --source"
            ) from error
        source = out / "FashionMNIST" / "raw"
    missing = [name for names in FILES.values() for name in names if not (source / name).is_file()]
    if missing:
        raise UserError(f"{source} lacks {', '.join(missing)}: name the folder of the four files with --source")
    return source


def read_idx(path):
    """The uint8 array in an IDX file. Raises UserError if the file is damaged."""
    import numpy as np

    from runtime.errors import UserError

    try:
        data = gzip.decompress(path.read_bytes())
        magic, dims = data[:3], data[3]
        shape = struct.unpack_from(f">{dims}I", data, 4)
        array = np.frombuffer(data, np.uint8, offset=4 + 4 * dims)
        if magic != b"\0\0\x08":
            raise ValueError("it does not hold bytes")
        return array.reshape(shape)
    except (OSError, EOFError, zlib.error, IndexError, struct.error, ValueError) as error:
        raise UserError(f"{path} is not a complete IDX file of bytes ({error}): fetch it again") from error


def main(args):
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    source = find_source(args.source, args.out)
    for split, names in FILES.items():
        images, labels = (read_idx(source / name) for name in names)
        images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
        # The digit in front makes ImageFolder's alphabetical labels those of the data set.
        folders = [args.out / split / f"{label}_{name}" for label, name in enumerate(CLASSES)]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for k, (image, label) in enumerate(zip(tqdm(images, desc=split, disable=None), labels)):
            Image.fromarray(np.stack([image] * 3, axis=-1)).save(folders[label] / f"{k:05d}.png", compress_level=1)
    print(f"wrote {args.out}/train and {args.out}/test")


if __name__ == "__main__":
    cli.run(main, parse_args())
