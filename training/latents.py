"""Encode a folder of images into latents once, for many trainings."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from runtime.errors import UserError
from runtime.files import atomic_write
from training.batches import encode, ignore_signals, loaded, names_in
from training.sources import SHARD, check_skipped


def prepare_latents(images, spec, folder, vae_fingerprint):
    """Starts or finds the folder in which `extract_latents` puts the latents of `images`.

    Raises UserError where it holds the latents of other images or of another VAE, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is no folder: name another --extract-latents")
    about = {
        "vae": vae_fingerprint,
        "image_size": spec.image_size,
        "num_classes": spec.num_classes,
        "flips": spec.horizontal_flip,
        "images": len(images),
        "files": images.fingerprint(),
    }
    manifest = folder / "latents.json"
    if manifest.exists():
        try:
            there = json.loads(manifest.read_text())
            different = [name for name in about if there.get(name) != about[name]]
        except (OSError, ValueError, AttributeError):
            different = ["the file itself"]
        if different:
            raise UserError(
                f"{manifest} is of other latents, different in {', '.join(different)}: name another --extract-latents"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} holds other files: name an empty or a new folder with --extract-latents")
    else:
        with atomic_write(manifest) as part:
            part.write_text(json.dumps(about | {"complete": False}, indent=2) + "\n")
    with atomic_write(folder / "labels.npy") as part, part.open("wb") as file:
        np.save(file, np.array([label for _, label in images.files]))


def extract_latents(images, vae, spec, folder, rank=0, world=1, workers=0, batch_size=8):
    """Encodes `images`, as they are and mirrored where the model wants it, into a folder that was prepared.

    Files of `SHARD` images, float16 [images, flips, 2C, h, w], each whole or not at all; those that are there are
    kept, so a second start goes on. Each process of `world` makes every world-th file; after all of them comes
    `finish_latents`. Raises UserError where more than 1 % of the images cannot be read.
    """
    from tqdm import tqdm

    folder = Path(folder)
    device = next(vae.parameters()).device
    shards = [s for s in range(rank, -(-len(images) // SHARD), world) if not (folder / f"{s:06d}.npy").exists()]
    batches = [
        range(start, min(start + batch_size, (s + 1) * SHARD, len(images)))
        for s in shards
        for start in range(s * SHARD, min((s + 1) * SHARD, len(images)), batch_size)
    ]
    loader = DataLoader(_Plain(images), batch_sampler=batches, num_workers=workers, worker_init_fn=ignore_signals)
    bar = tqdm(total=sum(map(len, batches)), unit="images", disable=None if rank == 0 else True)
    parts, unread = [], []
    for batch, (x, skipped) in zip(batches, loaded(loader)):
        unread += names_in(skipped)
        check_skipped(unread, images)
        x = x.to(device)
        both = [encode(vae, view) for view in ((x, x.flip(-1)) if spec.horizontal_flip else (x,))]
        parts.append(torch.stack(both, dim=1).half().cpu().numpy())
        bar.update(len(batch))
        if batch.stop % SHARD == 0 or batch.stop == len(images):
            shard = folder / f"{batch.start // SHARD:06d}.npy"
            if unread:
                with atomic_write(shard.with_suffix(".skipped.json")) as part:
                    part.write_text(json.dumps(unread))
            content = io.BytesIO()  # of a full disk NumPy would not say that it is full
            np.save(content, np.concatenate(parts))
            with atomic_write(shard) as part:
                part.write_bytes(content.getvalue())  # a view of it crashes Python 3.12.1 where writing fails
            parts, unread = [], []
    bar.close()


def finish_latents(images, folder):
    """Marks the latents in `folder` as complete. Returns the images whose place others took, a list of str.

    Raises UserError where they are more than 1 % of all.
    """
    manifest = Path(folder) / "latents.json"
    skipped = {name for path in Path(folder).glob("*.skipped.json") for name in json.loads(path.read_text())}
    check_skipped(skipped, images)
    with atomic_write(manifest) as part:
        about = json.loads(manifest.read_text()) | {"complete": True, "skipped": sorted(skipped)}
        part.write_text(json.dumps(about, indent=2) + "\n")
    return sorted(skipped)


class _Plain(Dataset):
    """Images in their own order, with what was skipped as a text, for `extract_latents`."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        x, _, skipped = self.images.load(index)
        return x, "\n".join(skipped)
