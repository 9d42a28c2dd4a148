"""Training samples: images or latents made once, in an order and with a randomness that no process can change.

Sample k of a training (k counts over all updates and processes) is the same image, mirrored or not, with the same
label dropped or not and the same noise, whichever process or data loading worker makes it: its random numbers follow
the seed and k alone.
"""

import functools
import hashlib
import io
import json
import os
from itertools import count
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from files import UserError, written_whole

PURPOSES = ("order", "draws", "samples", "images")


def stream(purpose, seed, number):
    """A NumPy generator of its own for each (purpose, seed, number); purpose: one of `PURPOSES`, the others ints."""
    # The purpose comes first and the count is fixed, since trailing zeros do not change a SeedSequence.
    return np.random.default_rng([PURPOSES.index(purpose), seed, number])


def draw_steps(seed, update, draws, choices):
    """The steps that `update` (from 0) draws, each one of range(choices): a list of `draws` ints."""
    return stream("draws", seed, update).integers(choices, size=draws).tolist()


def center_crop(image, size):
    """A PIL image of any size -> size x size pixels: the middle square, as the released models were trained.

    Halved with a box filter while twice as large as needed, then scaled bicubically (Dhariwal and Nichol 2021).
    """
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def load_image(path):
    """The picture at `path` as RGB, of whatever mode. Raises ValueError where it cannot be decoded."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255
                image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
            return image.convert("RGBA" if "transparency" in image.info else "RGB").convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow raises all of these
        raise ValueError(f"{path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error


class Images:
    """A folder of images, a folder a class, as numbers: float32 (3, S, S) in [-1, 1].

    files: [(path, label)]; S is the image size of `spec`.
    Raises UserError where there is no such folder, it has no images, or as many classes as the model has not.
    """

    kind = "images"

    def __init__(self, path, spec):
        from torchvision.datasets import ImageFolder

        if not Path(path).is_dir():
            raise UserError(f"no such folder: {path}; --data-path names a folder of images, a folder a class")
        try:
            folder = ImageFolder(path)
        except FileNotFoundError as error:
            raise UserError(f"{path} has no images, a folder a class: {str(error).splitlines()[0]}") from error
        if len(folder.classes) != spec.num_classes:
            # Labels are the alphabetical order of the folders, so a part of them would be labelled wrongly.
            raise UserError(
                f"{path} has {len(folder.classes)} classes, the model {spec.num_classes}: name the model's own data"
            )
        self.path, self.files, self.size = str(path), folder.samples, spec.image_size
        # The files are sorted by class: class c is self.starts[c] to self.starts[c + 1].
        self.starts = np.searchsorted([label for _, label in self.files], range(len(folder.classes) + 1)).tolist()

    def __len__(self):
        return len(self.files)

    def load(self, index, flip=False):
        """Image `index`, mirrored where `flip`, its label, and what could not be read in its place.

        A file that cannot be decoded gives way to the next of its class. Raises UserError where those that cannot are
        more than 1 % of all files, or all of the class.
        """
        skipped, label = [], self.files[index][1]
        start, end = self.starts[label : label + 2]
        while True:
            try:
                path = self.files[start + (index - start + len(skipped)) % (end - start)][0]
                image = center_crop(load_image(path), self.size)
                break
            except ValueError as error:
                skipped.append(str(error))
                check_skipped(skipped, self)
                if len(skipped) == end - start:
                    raise UserError(f"no image of class {label} can be read, the last was {error}") from error
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1)
        return (x.flip(-1) if flip else x), label, skipped

    def fingerprint(self):
        """A SHA-256 of the files' names and labels: tells one set of images from another."""
        root = len(self.path.rstrip(os.sep))
        names = "\n".join(f"{path[root + 1 :].replace(os.sep, '/')} {label}" for path, label in self.files)
        return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()


def check_skipped(skipped, data):
    """Raises UserError where `skipped`, images that could not be read, are more than 1 % of all of `data`."""
    if len(skipped) > 0.01 * len(data):
        raise UserError(
            f"{len(skipped)} of {len(data)} images cannot be read, more than 1 %; the first is {sorted(skipped)[0]}: "
            "replace or remove them"
        )


SHARD = 1024  # images in a file of latents: 34 MB at 256 pixels with both flips


class Latents:
    """What `extract_latents` wrote: the moments of the VAE's posterior, float32 (2C, h, w), image by image.

    Raises UserError where the folder is incomplete, of another VAE, image size or number of classes, or has no
    mirrored images and the model wants them.
    """

    kind = "moments"

    def __init__(self, folder, spec, vae_fingerprint):
        self.folder = Path(folder)
        try:
            self.about = json.loads((self.folder / "latents.json").read_text())
            labels = np.load(self.folder / "labels.npy", allow_pickle=False)
            about = {name: self.about[name] for name in ("vae", "image_size", "num_classes", "flips", "images")}
            if labels.ndim != 1 or labels.dtype.kind != "i" or not isinstance(about["images"], int):
                raise ValueError("its labels or their number are not whole numbers")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder} is no folder of latents ({error}): write one with --extract-latents {folder}"
            ) from error
        missing = [p.name for p in map(self.shard_path, range(-(-about["images"] // SHARD))) if not p.is_file()]
        if missing or len(labels) != about["images"] or not self.about.get("complete"):
            raise UserError(f"the latents in {folder} are not complete: start --extract-latents {folder} again")
        for name, wanted in (("image_size", spec.image_size), ("num_classes", spec.num_classes)):
            if about[name] != wanted:
                raise UserError(
                    f"the latents in {folder} have {name} {about[name]}, model {spec.name} {wanted}: "
                    "extract them for this model"
                )
        if about["vae"] != vae_fingerprint:
            raise UserError(
                f"the latents in {folder} were made by another VAE than {spec.vae}: extract them with this one"
            )
        if spec.horizontal_flip and not about["flips"]:
            raise UserError(f"the latents in {folder} have no mirrored images, which {spec.name} is trained on")
        if labels.min(initial=0) < 0 or labels.max(initial=0) >= spec.num_classes:
            raise UserError(f"{folder} has labels beyond 0 to {spec.num_classes - 1}: extract the latents again")
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def shard_path(self, shard):
        """The file of the `shard`-th part."""
        return self.folder / f"{shard:06d}.npy"

    # Opening a file anew for each sample would cost time, and of open ones a process may have 1024. They are not mapped
    # into memory: a map of a file that is cut off while it is read kills the process.
    @functools.lru_cache(maxsize=256)  # noqa: B019
    def _shard(self, shard):
        """A file of latents, open; where its values start; their shape. Raises ValueError where it is another file."""
        file = self.shard_path(shard).open("rb")
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("another version of .npy")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        if fortran_order or dtype != np.float16 or len(shape) != 5 or shape[1] != 1 + self.about["flips"]:
            raise ValueError(f"{dtype} {shape}")
        return file, file.tell(), shape

    def load(self, index, flip=False):
        """Moments (2C, h, w) of image `index`, mirrored where `flip`, its label, and no files that were skipped.

        Raises UserError where they cannot be read.
        """
        try:
            file, start, (_, flips, *shape) = self._shard(index // SHARD)
            size = 2 * prod(shape)  # bytes
            values = os.pread(file.fileno(), size, start + (index % SHARD * flips + flip) * size)
            moments = np.frombuffer(values, np.float16).reshape(shape)
        except (OSError, ValueError) as error:
            path = self.shard_path(index // SHARD)
            raise UserError(f"{path} cannot be read ({error}): remove it and extract the latents again") from error
        return torch.from_numpy(moments.astype(np.float32)), int(self.labels[index]), []

    def fingerprint(self):
        """A text that is another one for other images: `prepare_latents` keeps that of the files."""
        return self.about["files"]


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
        with written_whole(manifest) as part:
            part.write_text(json.dumps(about | {"complete": False}, indent=2) + "\n")
    with written_whole(folder / "labels.npy") as part, part.open("wb") as file:
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
                with written_whole(shard.with_suffix(".skipped.json")) as part:
                    part.write_text(json.dumps(unread))
            content = io.BytesIO()  # of a full disk NumPy would not say that it is full
            np.save(content, np.concatenate(parts))
            with written_whole(shard) as part:
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
    with written_whole(manifest) as part:
        about = json.loads(manifest.read_text()) | {"complete": True, "skipped": sorted(skipped)}
        part.write_text(json.dumps(about, indent=2) + "\n")
    return sorted(skipped)


def loaded(loader):
    """The batches of a DataLoader. Raises RuntimeError ("DataLoader worker ...") where one of its processes is gone."""
    import signal

    try:
        yield from loader
    except (ConnectionError, EOFError) as error:
        # PyTorch's handler raises that too, but later, in the middle of what is then being saved.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise RuntimeError("DataLoader worker is gone") from error


def names_in(texts):
    """The names in a batch's "skipped": one text a sample, a line a name."""
    return [name for text in texts for name in text.splitlines()]


@torch.no_grad()
def encode(vae, images):
    """Images (N, 3, S, S) in [-1, 1] -> the moments (mean, log variance) of their latents, (N, 2C, h, w)."""
    return vae.encode(images).latent_dist.parameters


def sample_posterior(moments, noise, scaling_factor):
    """Moments (N, 2C, h, w), standard normal noise (N, C, h, w) -> scaled latents (N, C, h, w)."""
    mean, log_variance = moments.chunk(2, dim=1)
    # The bounds are AutoencoderKL's own.
    return (mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise) * scaling_factor


def clean_latents(batch, vae, device):
    """A batch of `Samples`, or part of one, to x_start (N, C, h, w), y (N,) and noise (N, C, h, w) on the device."""
    kind = "images" if "images" in batch else "moments"
    x, y, posterior_noise, noise = (
        batch[name].to(device, non_blocking=True) for name in (kind, "y", "posterior_noise", "noise")
    )
    moments = encode(vae, x) if kind == "images" else x
    return sample_posterior(moments, posterior_noise, vae.config.scaling_factor), y, noise


class _Plain(Dataset):
    """Images in their own order, with what was skipped as a text, for `extract_latents`."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        x, _, skipped = self.images.load(index)
        return x, "\n".join(skipped)


class Samples(Dataset):
    """Training samples by key (k, index): entry `index` of `data` with the random numbers of sample k.

    data: `Images` or `Latents`; shape: of a latent, (C, h, w); flips: whether half of the samples are mirrored;
    label_dropout: the share of labels that become the null class `num_classes`.
    """

    def __init__(self, data, seed, shape, num_classes, label_dropout, flips):
        self.data, self.seed, self.shape = data, seed, shape
        self.num_classes, self.label_dropout, self.flips = num_classes, label_dropout, flips

    def __len__(self):
        return len(self.data)

    def __getitem__(self, key):
        """A dict: "images" (3, S, S) or "moments" (2C, h, w), y (), posterior_noise and noise (C, h, w), and skipped,
        the names of unreadable files, a line each."""
        k, index = key
        random = stream("samples", self.seed, k)
        flip, drop = random.random(2) < (0.5 * self.flips, self.label_dropout)
        posterior_noise, noise = random.standard_normal((2, *self.shape), dtype=np.float32)
        x, label, skipped = self.data.load(index, bool(flip))
        return {
            self.data.kind: x,
            "y": self.num_classes if drop else label,
            "posterior_noise": posterior_noise,
            "noise": noise,
            "skipped": "\n".join(skipped),
        }


class Batches:
    """A batch sampler: for every update from `first` on, the keys (k, index) of this process's part of the batch.

    length: of the data; batch_size: images of an update over all `world` processes, a multiple of their number.
    Each epoch has an order of its own; what does not fill a batch is left out. `epochs` None goes on without end.
    """

    def __init__(self, length, batch_size, seed, rank=0, world=1, first=0, epochs=None):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.part = range(batch_size)[rank * batch_size // world : (rank + 1) * batch_size // world]
        self.first, self.epochs = first, epochs
        self.per_epoch = length // batch_size  # updates

    def epoch(self, update):
        """The epoch, from 0, that `update` (from 0) belongs to."""
        return update // self.per_epoch

    def __iter__(self):
        epoch = None
        for update in count(self.first):
            if self.epoch(update) == self.epochs:
                return
            if self.epoch(update) != epoch:
                epoch = self.epoch(update)
                order = stream("order", self.seed, epoch).permutation(self.length)
            start = update % self.per_epoch * self.batch_size
            yield [(update * self.batch_size + s, int(order[start + s])) for s in self.part]


def ignore_signals(worker):
    """Ctrl-C and SIGTERM reach the data loading processes too; theirs to end is the main process."""
    import signal

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
