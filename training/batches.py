"""Training samples in an order and with a randomness that no process can change."""

from itertools import count

import numpy as np
import torch
from torch.utils.data import Dataset

from runtime.noise import random_stream


def draw_steps(seed, update, draws, choices):
    """The steps that `update` (from 0) draws, each one of range(choices): a list of `draws` ints."""
    return random_stream("draws", seed, update).integers(choices, size=draws).tolist()


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
    """A batch of `TrainingSamples`, or part of one, to x_start (N, C, h, w), y (N,) and noise (N, C, h, w) on the device."""
    kind = "images" if "images" in batch else "moments"
    x, y, posterior_noise, noise = (
        batch[name].to(device, non_blocking=True) for name in (kind, "y", "posterior_noise", "noise")
    )
    moments = encode(vae, x) if kind == "images" else x
    return sample_posterior(moments, posterior_noise, vae.config.scaling_factor), y, noise


class TrainingSamples(Dataset):
    """Training samples by key (k, index): entry `index` of `data` with the random numbers of sample k.

    data: `ImageSource` or `LatentSource`; shape: of a latent, (C, h, w); flips: whether half of the samples are mirrored;
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
        random = random_stream("samples", self.seed, k)
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


class BatchSampler:
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
                order = random_stream("order", self.seed, epoch).permutation(self.length)
            start = update % self.per_epoch * self.batch_size
            yield [(update * self.batch_size + s, int(order[start + s])) for s in self.part]


def ignore_signals(worker):
    """Ctrl-C and SIGTERM reach the data loading processes too; theirs to end is the main process."""
    import signal

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
