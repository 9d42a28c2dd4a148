"""Batches of training samples that are the same for any number of processes and data loading workers.

Sample k of a training (k counts over all updates and ranks) is the same image, mirrored or not, with the same label,
dropped or not, and the same noise: its random numbers depend on the seed and k alone.
"""

import multiprocessing
import os
import shutil
import signal
import threading
from itertools import count
from multiprocessing.util import Finalize
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from runtime.errors import UserError
from runtime.noise import random_stream
from runtime.signals import end_with_parent
from sampling import scale_and_shift

SHARED_MEMORY = Path("/dev/shm")  # of Linux; Docker gives it 64 MB


def draw_steps(seed, update, draws, choices):
    """Draw `draws` ints from range(choices) for `update`, which counts from 0."""
    return random_stream("draws", seed, update).integers(choices, size=draws).tolist()


@torch.no_grad()
def encode(vae, images):
    """Encode images (N, 3, S, S) in [-1, 1] to the moments (mean, log variance) of their latents, (N, 2C, h, w)."""
    return vae.encode(images).latent_dist.parameters


def sample_posterior(moments, noise, scale, shift=0.0):
    """Sample latents (N, C, h, w) from moments (N, 2C, h, w) with standard normal noise; see `scale_and_shift`."""
    mean, log_variance = moments.chunk(2, dim=1)
    # The bounds are those of AutoencoderKL.
    return (mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise - shift) * scale


def clean_latents(batch, vae, device):
    """Turn a batch of `TrainingSamples` into x_start (N, C, h, w), y (N,) and noise (N, C, h, w) on the device."""
    kind = "images" if "images" in batch else "moments"
    x, y, posterior_noise, noise = (
        batch[name].to(device, non_blocking=True) for name in (kind, "y", "posterior_noise", "noise")
    )
    moments = encode(vae, x) if kind == "images" else x
    return sample_posterior(moments, posterior_noise, *scale_and_shift(vae)), y, noise


class TrainingSamples(Dataset):
    """Training samples by key (k, index): entry `index` of `source` with the random numbers of sample k.

    source: `ImageSource` or `LatentSource`. shape: of a latent, (C, h, w). flips: mirror half of the samples.
    label_dropout: share of labels that become the null class `num_classes`.
    """

    def __init__(self, source, seed, shape, num_classes, label_dropout, flips):
        self.source, self.seed, self.shape = source, seed, shape
        self.num_classes, self.label_dropout, self.flips = num_classes, label_dropout, flips

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        """Return "images" (3, S, S) or "moments" (2C, h, w), y (), posterior_noise and noise (C, h, w), and skipped:
        the names of unreadable files, one per line."""
        k, index = key
        random = random_stream("samples", self.seed, k)
        flip, drop = random.random(2) < (0.5 * self.flips, self.label_dropout)
        posterior_noise, noise = random.standard_normal((2, *self.shape), dtype=np.float32)
        x, label, skipped = self.source.load(index, bool(flip))
        return {
            self.source.kind: x,
            "y": self.num_classes if drop else label,
            "posterior_noise": posterior_noise,
            "noise": noise,
            "skipped": skipped,
        }


class BatchSampler:
    """The keys (k, index) of this rank's part of the batch, for every update from `first_update` on.

    length: of the data. batch_size: images per update on all ranks, a multiple of world_size. Each epoch has its own
    order and leaves out the images that fill no batch. epochs: None is endless.
    """

    def __init__(self, length, batch_size, seed, rank=0, world_size=1, first_update=0, epochs=None):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.part = range(batch_size)[rank * batch_size // world_size : (rank + 1) * batch_size // world_size]
        self.first_update, self.epochs = first_update, epochs
        self.updates_per_epoch = length // batch_size

    def epoch(self, update):
        """Return the epoch, from 0, of `update`, from 0."""
        return update // self.updates_per_epoch

    def __iter__(self):
        epoch = None
        for update in count(self.first_update):
            if self.epoch(update) == self.epochs:
                return
            if self.epoch(update) != epoch:
                epoch = self.epoch(update)
                order = random_stream("order", self.seed, epoch).permutation(self.length)
            start = update % self.updates_per_epoch * self.batch_size
            yield [(update * self.batch_size + s, int(order[start + s])) for s in self.part]


def make_loader(dataset, batches, workers, device=None):
    """Make a DataLoader with at most as many `workers` as cores; it pins memory for a CUDA device."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=min(workers, os.cpu_count() or 1),
        worker_init_fn=end_with_parent,
        pin_memory=device is not None and device.type == "cuda",
    )


def load_batches(loader):
    """Yield the batches of a DataLoader, and end its workers with the loop over them, whatever they are doing.

    Raises RuntimeError ("DataLoader worker ...") if a worker was killed, and UserError if shared memory is full.
    """
    if loader.num_workers and SHARED_MEMORY.exists() and shutil.disk_usage(SHARED_MEMORY).free < 2**20:
        raise _shared_memory_is_full()
    others = multiprocessing.active_children()
    batches = iter(loader)
    workers = [child for child in multiprocessing.active_children() if child not in others]
    # At exit too: the traceback of an error keeps this generator alive, and Python waits for workers that go on.
    end_workers = Finalize(None, _kill, [workers], exitpriority=1)
    try:
        yield from batches
    except (ConnectionError, EOFError) as error:
        # PyTorch's handler of SIGCHLD raises this too, but later, and would interrupt the saving of a checkpoint.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise RuntimeError("DataLoader worker is gone") from error
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        raise _shared_memory_is_full() from error
    finally:
        end_workers()


def _shared_memory_is_full():
    return UserError(
        f"{SHARED_MEMORY} is full, through which data loading processes return images: pass --num-workers 0, or give "
        "it more space (docker run --shm-size=8g)"
    )


def _kill(workers):
    alive = [worker for worker in workers if worker.is_alive()]
    if alive and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would take them for workers that failed
    for worker in alive:
        worker.kill()


def skipped_names(texts):
    """Return the file names in "skipped" of a batch: one text per sample, one name per line."""
    return [name for text in texts for name in text.splitlines()]
