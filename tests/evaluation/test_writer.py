"""The order of things in the pipeline: bounded, in parallel, and nothing finished is lost."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from evaluation.writer import AHEAD, SampleWriter

CPU = torch.device("cpu")


class Vae:
    """A VAE that decodes latents (N, 3, h, w) to themselves."""

    dtype = torch.float32
    config = SimpleNamespace(scaling_factor=1.0, block_out_channels=(1,))

    @staticmethod
    def decode(latents):
        return SimpleNamespace(sample=latents.clone())


def sample(start, stop):
    """Images that show their number, one more than asked for."""
    numbers = torch.arange(start, stop + 1)
    return (numbers / 127.5 - 1).reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2), numbers % 3


def test_every_range_is_written_once_with_its_own_images_and_labels():
    written = []
    pipeline = SampleWriter(sample, Vae, lambda *batch: written.append(batch), CPU)
    shown = []
    pipeline.run([(0, 4), (9, 10), (4, 7)], lambda: shown.append(len(written)))
    assert [start for start, _, _ in written] == [0, 9, 4] and len(shown) == 3
    for (start, images, labels), count in zip(written, (4, 1, 3)):
        assert images.shape == (count, 2, 2, 3) and images.dtype.name == "uint8"
        assert images[:, 0, 0, 0].tolist() == list(range(start, start + count))
        assert labels.tolist() == [k % 3 for k in range(start, start + count)]
    assert pipeline.seconds["sampling"] > 0 and pipeline.seconds["decoding"] > 0


def test_writing_overlaps_sampling_and_at_most_so_many_batches_wait():
    held, sampled = threading.Event(), []

    def count(start, stop):
        sampled.append(start)
        if len(sampled) == AHEAD + 1:
            threading.Timer(0.2, held.set).start()
        return sample(start, stop)

    def write(start, images, labels):
        held.wait(10)
        # The first is written when so many are waiting, and one more is being sampled at most.
        if start == 0:
            seen.append(len(sampled))

    seen = []
    pipeline = SampleWriter(count, Vae, write, CPU)
    pipeline.run([(k, k + 1) for k in range(6)])
    assert seen == [AHEAD + 1] and len(sampled) == 6
    assert pipeline.seconds["disk"] > 0.15


def test_what_the_disk_says_ends_the_run_early():
    sampled = []

    def count(start, stop):
        sampled.append(start)
        return sample(start, stop)

    def write(start, images, labels):
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        SampleWriter(count, Vae, write, CPU).run([(k, k + 1) for k in range(50)])
    assert len(sampled) <= AHEAD + 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_was_decoded_before_an_interruption_is_written(error):
    written = []

    def fail_at_3(start, stop):
        if start == 3:
            raise error
        return sample(start, stop)

    def write(start, images, labels):
        time.sleep(0.05)
        written.append(start)

    with pytest.raises(error):
        SampleWriter(fail_at_3, Vae, write, CPU).run([(k, k + 1) for k in range(6)])
    assert written == [0, 1, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_decoding_beside_the_next_batch_changes_nothing():
    written, device = [], torch.device("cuda", 0)

    def on_gpu(start, stop):
        latents, labels = sample(start, stop)
        latents = latents.to(device)
        torch.cuda._sleep(10**8)  # so that who does not wait for what comes after decodes something else
        return latents + 0, labels

    pipeline = SampleWriter(on_gpu, Vae, lambda *batch: written.append(batch), device)
    pipeline.run([(k, k + 4) for k in range(0, 40, 4)])
    assert pipeline.overlaps and [start for start, _, _ in written] == list(range(0, 40, 4))
    assert all(images[:, 0, 0, 0].tolist() == list(range(start, start + 4)) for start, images, _ in written)
