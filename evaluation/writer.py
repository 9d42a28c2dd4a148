"""`SampleWriter`: sampling, decoding and writing side by side, so that no batch waits for the disk."""

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch

import sampling

AHEAD = 2  # batches that may wait to be written


class SampleWriter:
    """Samples and decodes ranges of images, while a thread writes the batches before.

    sample: function (start, stop) -> latents (N, C, h, w) on the device, labels (N,) on the CPU. N may exceed
    stop - start; the rest is dropped. write: function (start, images uint8 (n, H, W, 3), labels (n,)) of arrays.
    seconds: spent so far on "sampling", "decoding" and waiting for the "disk".
    overlaps: whether decoding and copying run beside the sampling of the next batch, on a CUDA stream of their own.
    """

    def __init__(self, sample, vae, write, device):
        self._sample, self._vae, self._write, self._device = sample, vae, write, device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.overlaps = self._side is not None
        self.seconds = dict.fromkeys(("sampling", "decoding", "disk"), 0.0)

    def run(self, ranges, show=lambda: None):
        """Make all `ranges` (start, stop), one batch each; call show() after each.

        Decoded batches are written even if an exception ends the run. Raises what sample and write raise, and UserError
        if latents or pixels are not finite.
        """
        waiting = deque()

        def wait():
            since = time.perf_counter()
            arrived = waiting.popleft().result()
            self.seconds["disk"] += time.perf_counter() - max(since, arrived)

        # Each thread has a current GPU of its own. Leaving the block waits for the submitted batches.
        setup = {"initializer": torch.cuda.set_device, "initargs": [self._device]} if self._side else {}
        with ThreadPoolExecutor(1, **setup) as thread:
            # Start the thread now: if an interruption came while it is started, its batch would be lost.
            thread.submit(int).result()
            for start, stop in ranges:
                waiting.append(thread.submit(self._finish, start, *self._batch(start, stop)))
                while len(waiting) > AHEAD or waiting and waiting[0].done():
                    wait()
                show()
            while waiting:
                wait()

    def _batch(self, start, stop):
        """Images, whether they are finite, labels, and the times before and after sampling and decoding a batch."""
        marks = [self._mark()]
        latents, labels = self._sample(start, stop)
        marks.append(self._mark())
        if self._side:
            self._side.wait_stream(torch.cuda.current_stream(self._device))
            latents.record_stream(self._side)
        with torch.cuda.stream(self._side):  # None changes nothing
            marks.append(self._mark())
            decoded = sampling.decode_unchecked(self._vae, latents)
            images, finite = (part[: stop - start].to("cpu", non_blocking=True) for part in decoded)
            marks.append(self._mark())
        return images, finite, labels[: stop - start], marks

    def _finish(self, start, images, finite, labels, marks):
        """Check and write a batch, in the thread. Returns the time at which its images had arrived on the CPU."""
        if self._side:
            marks[-1].synchronize()
        arrived = time.perf_counter()
        self.seconds["sampling"] += _seconds(*marks[:2])
        self.seconds["decoding"] += _seconds(*marks[2:])
        sampling.check_finite(finite, start)
        self._write(start, images.numpy(), labels.numpy())
        return arrived

    def _mark(self):
        """The present time, on a GPU as an event of the current stream of that device."""
        if not self._side:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _seconds(start, end):
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
