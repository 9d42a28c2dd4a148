"""Training data from a folder of latents: images encoded once by the VAE, for many trainings.

latents.json        which images, VAE, size, classes; whether mirrored images are there, and all are complete
labels.npy          int64, a label per image
NNNNNN.npy          a shard: float16 [images, flips, 2C, h, w], the moments of up to SHARD images, plain and mirrored
NNNNNN.skipped.json the files of that shard that could not be read
"""

import functools
import io
import json
import os
import zipfile
from math import prod
from pathlib import Path

import numpy as np
import torch

from runtime.errors import UserError
from runtime.files import atomic_write
from training.batches import encode, load_batches, make_loader, skipped_names
from training.images import check_skipped

SHARD = 1024  # images; 34 MB at 256 pixels with both flips


def shard_path(folder, shard):
    return Path(folder) / f"{shard:06d}.npy"


def prepare_latents(images, spec, folder, vae_fingerprint):
    """Make or check the folder that `extract_latents` fills with the latents of `images`, and write the labels.

    Raises UserError if it holds other files or the latents of other images or another VAE, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is no folder: pass another --extract-latents")
    about = {
        "vae": vae_fingerprint,
        "image_size": spec.image_size,
        "num_classes": spec.num_classes,
        "flips": spec.horizontal_flip,
        "images": len(images),
        "files": images.fingerprint(),
    }
    manifest = folder / "latents.json"
    if folder.exists() and any(folder.iterdir()):
        try:
            existing = json.loads(manifest.read_text())
            different = [name for name in about if existing.get(name) != about[name]]
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{folder} holds other files: pass a new folder with --extract-latents") from error
        if different:
            raise UserError(
                f"{folder} holds other latents, different in {', '.join(different)}: pass another --extract-latents"
            )
    else:
        with atomic_write(manifest) as part:
            part.write_text(json.dumps(about | {"complete": False}, indent=2) + "\n")
    with atomic_write(folder / "labels.npy") as part, part.open("wb") as file:
        np.save(file, np.array([label for _, label in images.files]))


def extract_latents(images, vae, spec, folder, rank=0, world_size=1, workers=0, batch_size=8):
    """Encode `images`, and their mirror images if the model wants them, into a folder from `prepare_latents`.

    Each rank writes every world_size-th shard, whole or not at all. Existing shards stay, so the same call continues an
    extraction. Call `finish_latents` after all ranks. Raises UserError if more than 1 % of the images cannot be read.
    """
    from tqdm import tqdm

    device = next(vae.parameters()).device
    shards = [s for s in range(rank, -(-len(images) // SHARD), world_size) if not shard_path(folder, s).exists()]
    batches = [
        range(start, min(start + batch_size, (s + 1) * SHARD, len(images)))
        for s in shards
        for start in range(s * SHARD, min((s + 1) * SHARD, len(images)), batch_size)
    ]
    moments, skipped = [], set()  # a set, since a bad file is reported for each image that skips it
    with tqdm(total=sum(map(len, batches)), unit="images", disable=None if rank == 0 else True) as bar:
        for batch, (x, _, skipped_texts) in zip(batches, load_batches(make_loader(images, batches, workers))):
            skipped |= set(skipped_names(skipped_texts))
            check_skipped(skipped, len(images))
            x = x.to(device)
            views = [encode(vae, view) for view in ((x, x.flip(-1)) if spec.horizontal_flip else (x,))]
            moments.append(torch.stack(views, dim=1).half().cpu().numpy())
            finite = np.isfinite(moments[-1]).all(axis=(1, 2, 3, 4))
            if not finite.all():
                path, _ = images.files[batch[finite.argmin()]]
                raise UserError(f"the VAE encodes {path} to values that are not finite in float16: check its weights")
            bar.update(len(batch))
            if batch.stop % SHARD == 0 or batch.stop == len(images):
                _write_shard(shard_path(folder, batch.start // SHARD), np.concatenate(moments), sorted(skipped))
                moments, skipped = [], set()


def _write_shard(path, moments, skipped):
    path.with_suffix(".skipped.json").unlink(missing_ok=True)  # of a shard that was removed
    if skipped:
        with atomic_write(path.with_suffix(".skipped.json")) as part:
            part.write_text(json.dumps(skipped))
    content = io.BytesIO()  # np.save to a file does not report a full disk
    np.save(content, moments)
    with atomic_write(path) as part:
        part.write_bytes(content.getvalue())  # a view of the buffer crashes Python 3.12.1 if writing fails


def finish_latents(images, folder):
    """Mark the latents in `folder` as complete; return the sorted names of images that others replace.

    Raises UserError if they are more than 1 % of all.
    """
    manifest = Path(folder) / "latents.json"
    skipped = {name for path in Path(folder).glob("*.skipped.json") for name in json.loads(path.read_text())}
    check_skipped(skipped, len(images))
    with atomic_write(manifest) as part:
        about = json.loads(manifest.read_text()) | {"complete": True, "skipped": sorted(skipped)}
        part.write_text(json.dumps(about, indent=2) + "\n")
    return sorted(skipped)


class LatentSource:
    """The moments of the VAE's posterior that `extract_latents` wrote: float32 (2C, h, w) per image.

    Raises UserError if the folder is incomplete, has no mirrored images and the model wants them, or belongs to another
    VAE, image size or number of classes.
    """

    kind = "moments"

    def __init__(self, folder, spec, vae_fingerprint):
        self.folder = Path(folder)
        try:
            self.about = json.loads((self.folder / "latents.json").read_text())
            labels = np.load(self.folder / "labels.npy", allow_pickle=False)
            about = {
                name: self.about[name] for name in ("vae", "image_size", "num_classes", "flips", "images", "files")
            }
            if labels.ndim != 1 or labels.dtype.kind != "i" or not isinstance(about["images"], int):
                raise ValueError("its labels or their number are no integers")
            if labels.min(initial=0) < 0 or labels.max(initial=0) >= about["num_classes"]:
                raise ValueError(f"it has labels outside 0 to {about['num_classes'] - 1}")
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{folder} is no folder of latents ({error}): write one with --extract-latents {folder}"
            ) from error
        shards = range(-(-about["images"] // SHARD))
        complete = self.about.get("complete") and all(shard_path(folder, shard).is_file() for shard in shards)
        if not complete or len(labels) != about["images"]:
            raise UserError(f"the latents in {folder} are not complete: run --extract-latents {folder} again")
        wanted = {"vae": vae_fingerprint, "image_size": spec.image_size, "num_classes": spec.num_classes}
        wanted["flips"] = spec.horizontal_flip or about["flips"]  # mirrored images need not be used
        if different := [name for name in wanted if about[name] != wanted[name]]:
            raise UserError(
                f"the latents in {folder} do not fit the model {spec.name}, different in {', '.join(different)}: "
                "extract them for this one"
            )
        self.labels = labels
        channels, *size = spec.latent_shape
        self.shape = (2 * channels, *size)

    def __len__(self):
        return len(self.labels)

    def load(self, index, flip=False):
        """Return the moments (2C, h, w) of image `index`, mirrored if `flip`, its label, and "" for skipped files.

        Raises UserError if they cannot be read.
        """
        path = shard_path(self.folder, index // SHARD)
        try:
            file, start, (_, flips, *shape) = _open_shard(self, index // SHARD)
            size = 2 * prod(shape)  # bytes
            values = os.pread(file.fileno(), size, start + (index % SHARD * flips + flip) * size)
            moments = np.frombuffer(values, np.float16).reshape(shape)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}): remove it and extract the latents again") from error
        return torch.from_numpy(moments.astype(np.float32)), int(self.labels[index]), ""

    def fingerprint(self):
        """Return the fingerprint of the images that the latents were made from."""
        return self.about["files"]


# Opening a shard for each sample takes time, and a process may have 1024 open files. Shards are not memory-mapped: if
# a mapped file is truncated, reading it kills the process. The key is the source, since a path may become another file.
@functools.lru_cache(maxsize=256)
def _open_shard(source, shard):
    """Return an open shard of a `LatentSource`, the offset of its values, and their shape.

    Raises ValueError if it is another file.
    """
    file = shard_path(source.folder, shard).open("rb")
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version of .npy")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran_order or dtype != np.float16 or shape[1:] != (1 + bool(source.about["flips"]), *source.shape):
        raise ValueError(f"it has {dtype} {shape}, the model's moments are {source.shape}")
    return file, file.tell(), shape
