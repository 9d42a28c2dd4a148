import multiprocessing
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from pretrained.spec import model_spec
from runtime.errors import UserError
from runtime.noise import random_stream
from runtime.signals import end_with_parent
from training.batches import BatchSampler, TrainingSamples, draw_steps, load_batches, make_loader, sample_posterior
from training.images import ImageSource


@pytest.fixture
def spec(model_folder):
    return model_spec(ckpt=str(model_folder))


def test_random_streams_differ_by_purpose_seed_and_number():
    keys = [("order", 0, 0), ("draws", 0, 0), ("samples", 0, 0), ("draws", 1, 0), ("draws", 0, 1), ("draws", 0, 2**40)]
    first, again = ([random_stream(*key).random() for key in keys] for _ in range(2))
    assert len(set(first)) == len(keys) and first == again


def test_draws_are_uniform_and_independent():
    drawn = np.array([draw_steps(3, update, 8, 10) for update in range(2000)])
    # 16,000 draws of ten steps: 1600 each, standard deviation 38.
    assert np.abs(np.bincount(drawn.ravel(), minlength=10) - 1600).max() < 160
    # Two draws of an update agree in a tenth of the updates, standard deviation 13.
    assert abs((drawn[:, 0] == drawn[:, 1]).sum() - 200) < 60


def test_an_epoch_shows_every_image_once_in_a_new_order():
    epochs = np.array([[index for _, index in keys] for keys in BatchSampler(12, 4, seed=0, epochs=2)]).reshape(2, 12)
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_share_the_batches_of_a_single_process_and_a_later_update_continues(world_size):
    alone = list(BatchSampler(20, 6, seed=5, epochs=3))
    shared = [list(BatchSampler(20, 6, 5, rank, world_size, epochs=3)) for rank in range(world_size)]
    assert alone == [sum(parts, []) for parts in zip(*shared)]
    assert list(BatchSampler(20, 6, seed=5, first_update=4, epochs=3)) == alone[4:]
    assert [k for keys in alone for k, _ in keys] == list(range(9 * 6))


def test_a_sample_is_the_same_in_any_worker_and_depends_on_k(spec, image_folder):
    samples = TrainingSamples(ImageSource(image_folder, spec), 0, (4, 4, 4), 5, 0.5, True)
    keys = [(k, 3) for k in range(40)]
    first, second = make_loader(samples, [keys[:20], keys[20:]], workers=2)
    for k in (0, 19):
        assert all(np.array_equal(samples[keys[k]][name], first[name][k]) for name in ("images", "y", "noise"))
    assert not torch.equal(first["noise"][0], first["noise"][1])
    assert not torch.equal(first["noise"], first["posterior_noise"])
    images = torch.cat([first["images"], second["images"]])
    mirrored = sum(torch.equal(x, images[0].flip(-1)) for x in images)
    assert mirrored + sum(torch.equal(x, images[0]) for x in images) == 40 and 8 < mirrored < 32
    assert 8 < (torch.cat([first["y"], second["y"]]) == 5).sum() < 32  # labels dropped, half of 40
    plain = TrainingSamples(samples.source, 0, (4, 4, 4), 5, 0.0, False)
    assert all(torch.equal(plain[key]["images"], plain[0, 3]["images"]) and plain[key]["y"] == 0 for key in keys)


def test_posterior_samples_have_the_given_moments():
    moments = torch.cat([torch.full((2000, 4, 2, 2), 3.0), torch.full((2000, 4, 2, 2), 2 * np.log(0.5))], dim=1)
    noise = torch.randn(2000, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    x = sample_posterior(moments, noise, 0.5)
    assert x.mean().item() == pytest.approx(1.5, abs=0.01) and x.std().item() == pytest.approx(0.25, abs=0.01)


def test_a_shifted_posterior_is_scaled_after_the_shift():
    moments, noise = torch.cat([torch.full((1, 4, 2, 2), 3.0), torch.zeros(1, 4, 2, 2)], dim=1), torch.ones(1, 4, 2, 2)
    assert (sample_posterior(moments, noise, 0.5, 1.0) == (3 + 1 - 1) * 0.5).all()


class Failing(Dataset):
    """Raises an error for sample 3 of 8, in the process that loads it."""

    def __init__(self, error):
        self.error = error

    def __getitem__(self, k):
        if k == 3:
            raise self.error
        return k

    def __len__(self):
        return 8


def load_all(error, **how):
    batches = load_batches(DataLoader(Failing(error), batch_size=2, **how))
    next(batches)  # the traceback keeps this generator until the process exits
    list(batches)


@pytest.mark.parametrize("text", ["unable to allocate shared memory(shm) for file </torch_1_2>: No space", "Bus error"])
def test_shared_memory_that_is_full_is_called_that(text):
    how = {"num_workers": 1, "worker_init_fn": end_with_parent}
    if "Bus" in text:
        error = RuntimeError(
            f"DataLoader worker (pid 7) is killed by signal: {text}. It is possible that dataloader's "
            "workers are out of shared memory. Please try to raise your shared memory limit."
        )
    else:
        error = RuntimeError(text)
    with pytest.raises(UserError, match="/dev/shm is full.* --num-workers 0"):
        load_all(error, **how)


def test_shared_memory_without_space_is_refused_before_workers_start(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4096))
    monkeypatch.setattr(multiprocessing.Process, "start", None)
    with pytest.raises(UserError, match="/dev/shm is full"):
        load_all(None, num_workers=1)


def test_workers_end_with_the_loop_even_if_they_ignore_signals():
    before = multiprocessing.active_children()
    batches = load_batches(DataLoader(Failing(None), batch_size=2, num_workers=2, worker_init_fn=end_with_parent))
    next(batches)
    workers = [child for child in multiprocessing.active_children() if child not in before]
    assert len(workers) == 2
    batches.close()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == -signal.SIGKILL
