"""Sampling, decoding and writing side by side: no batch waits until the one before it is on the disk."""

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch

import sampling

AHEAD = 2  # batches that may wait to be written


class SampleWriter:
    """Samples ranges of images, decodes them, and hands them to a thread that writes them while the next are sampled.

    sample: function (start, stop) -> latents (N, C, h, w) on the device, labels (N,) on the CPU; N may be more than
    stop - start, the rest is dropped. write: function (start, images uint8 (n, H, W, 3), labels (n,)) of arrays.
    seconds: spent so far in "sampling", "decoding" and waiting for the "disk". On a GPU images are decoded and copied
    on a stream of their own, beside the sampling of the next batch (`overlaps`).
    """

    def __init__(self, sample, vae, write, device):
        self._sample, self._vae, self._write, self._device = sample, vae, write, device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.overlaps = self._side is not None
        self.seconds = dict.fromkeys(("sampling", "decoding", "disk"), 0.0)

    def run(self, ranges, show=lambda: None):
        """All `ranges` (start, stop), one batch each; calls show() after each.

        Whatever interrupts it, what was decoded is written first. Raises what sample and write raise.
        """
        waiting = deque()

        def wait():
            since = time.perf_counter()
            arrived = waiting.popleft().result()
            self.seconds["disk"] += time.perf_counter() - max(since, arrived)

        # Each thread has a current GPU of its own. Leaving, the executor waits for what was handed over.
        setup = {"initializer": torch.cuda.set_device, "initargs": [self._device]} if self._side else {}
        with ThreadPoolExecutor(1, **setup) as writer:
            # Its thread starts before there is work: interrupted while it starts one, it would not wait for that.
            writer.submit(int).result()
            for start, stop in ranges:
                waiting.append(writer.submit(self._finish, start, *self._batch(start, stop)))
                while len(waiting) > AHEAD or waiting and waiting[0].done():
                    wait()
                show()
            while waiting:
                wait()

    def _batch(self, start, stop):
        """Images and labels of a batch, and the points in time around sampling and decoding it."""
        marks = [self._mark()]
        latents, labels = self._sample(start, stop)
        marks.append(self._mark())
        if self._side:
            self._side.wait_stream(torch.cuda.current_stream())
            latents.record_stream(self._side)
        with torch.cuda.stream(self._side):  # None leaves things as they are
            marks.append(self._mark())
            images = sampling.decode(self._vae, latents)[: stop - start].to("cpu", non_blocking=True)
            marks.append(self._mark())
        return images, labels[: stop - start], marks

    def _finish(self, start, images, labels, marks):
        """Writes a batch, in the writer's thread. Returns when its images were there to be written."""
        if self._side:
            marks[-1].synchronize()
        arrived = time.perf_counter()
        self.seconds["sampling"] += _seconds(*marks[:2])
        self.seconds["decoding"] += _seconds(*marks[2:])
        self._write(start, images.numpy(), labels.numpy())
        return arrived

    def _mark(self):
        """This moment, on a GPU that of the current stream."""
        if not self._side:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(start, end):
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
