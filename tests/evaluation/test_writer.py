"""`SampleWriter`: in parallel, bounded, and nothing finished is lost."""

import threading
import time
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from evaluation.writer import AHEAD, SampleWriter
from runtime.errors import UserError

CPU = torch.device("cpu")


class Vae:
    """A VAE that decodes latents (N, 3, h, w) to themselves."""

    dtype = torch.float32
    config = SimpleNamespace(scaling_factor=1.0, block_out_channels=(1,))

    @staticmethod
    def decode(latents):
        return SimpleNamespace(sample=latents.clone())


def sample(start, stop):
    """Images whose pixels are their number, one more than requested."""
    numbers = torch.arange(start, stop + 1)
    return (numbers / 127.5 - 1).reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2), numbers % 3


def test_every_range_is_written_once_with_its_own_images_and_labels():
    written, shown = [], []
    writer = SampleWriter(sample, Vae, lambda *batch: written.append(batch), CPU)
    writer.run([(0, 4), (9, 10), (4, 7)], lambda: shown.append(len(written)))
    assert [start for start, _, _ in written] == [0, 9, 4] and len(shown) == 3
    for (start, images, labels), count in zip(written, (4, 1, 3)):
        assert images.shape == (count, 2, 2, 3) and images.dtype.name == "uint8"
        assert images[:, 0, 0, 0].tolist() == list(range(start, start + count))
        assert labels.tolist() == [k % 3 for k in range(start, start + count)]
    assert writer.seconds["sampling"] > 0 and writer.seconds["decoding"] > 0


def test_writing_runs_beside_sampling_and_a_bounded_number_of_batches_waits():
    full, sampled, seen = threading.Event(), [], []

    def count(start, stop):
        sampled.append(start)
        if len(sampled) == AHEAD + 1:
            threading.Timer(0.2, full.set).start()  # time in which a fault would sample more
        return sample(start, stop)

    def write(start, images, labels):
        assert full.wait(120)
        seen.append(len(sampled))

    writer = SampleWriter(count, Vae, write, CPU)
    writer.run([(k, k + 1) for k in range(6)])
    assert seen[0] == AHEAD + 1 and len(sampled) == len(seen) == 6
    assert writer.seconds["disk"] > 0


@pytest.mark.parametrize("batches", [50, 1])
def test_a_failed_write_ends_the_run_early(batches):
    sampled, full = [], Mock(side_effect=OSError("full"))
    writer = SampleWriter(lambda *k: sampled.append(k) or sample(*k), Vae, lambda *_: time.sleep(0.05) or full(), CPU)
    with pytest.raises(OSError, match="full"):
        writer.run([(k, k + 1) for k in range(batches)])
    assert len(sampled) <= AHEAD + 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_batches_decoded_before_an_interruption_are_written(error):
    written, latents = [], Mock(side_effect=[*(sample(k, k + 1) for k in range(3)), error])
    writer = SampleWriter(latents, Vae, lambda k, *_: time.sleep(0.05) or written.append(k), CPU)
    with pytest.raises(error):
        writer.run([(k, k + 1) for k in range(6)])
    assert written == [0, 1, 2]


@pytest.mark.gpu
def test_decoding_beside_the_next_batch_changes_nothing():
    written, device = [], torch.device("cuda", 0)

    def on_gpu(start, stop):
        latents, labels = sample(start, stop)
        latents = latents.to(device)
        torch.cuda._sleep(10**8)  # decoding that does not wait for the addition reads something else
        return latents + 0, labels

    writer = SampleWriter(on_gpu, Vae, lambda *batch: written.append(batch), device)
    writer.run([(k, k + 4) for k in range(0, 40, 4)])
    assert writer.overlaps and [start for start, _, _ in written] == list(range(0, 40, 4))
    assert all(images[:, 0, 0, 0].tolist() == list(range(start, start + 4)) for start, images, _ in written)


def test_a_batch_that_is_not_finite_is_refused_and_those_before_it_are_written():
    def overflows(start, stop):
        latents, labels = sample(start, stop)
        return latents.masked_fill(latents == 5 / 127.5 - 1, float("nan")), labels

    written = []
    writer = SampleWriter(overflows, Vae, lambda start, *_: written.append(start), CPU)
    with pytest.raises(UserError, match="latents of image 5 are not finite"):
        writer.run([(0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 12)])
    assert set(written) >= {0, 2} and 4 not in written
