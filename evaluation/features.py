"""Features of evaluation sets, computed by the network of a graph file, and their statistics."""

import contextlib
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np

from evaluation.evaluation_set import STATISTICS, ImageChecks
from evaluation.metrics import TILE, Moments, statistics
from runtime import released
from runtime.errors import UserError
from runtime.hashes import sha256_of_file
from runtime.memory import out_of_memory

PUBLISHED_GRAPH = "classify_image_graph_def.pb"


class Network:
    """The network of a graph file, run by a backend on a torch.device.

    path: None downloads the published graph if it is missing. backend: "torch" (also as "auto") or "tensorflow".
    batch_size: images at a time; halved, with a warning, if memory runs out.
    sizes: numbers of pool and of spatial features, (2048, 2023) for the published graph.
    sha256: of the file. versions: {package: version} of what computes.
    Raises UserError if the file cannot be used, or has the published name but other bytes.
    """

    def __init__(self, path=None, backend="torch", device="cpu", batch_size=64):
        if backend == "tensorflow":
            from evaluation.inception_tf import Graph
        else:
            backend = "torch"
            from evaluation.inception import Graph
        self.backend, self.path = backend, Path(path or released.fetch(PUBLISHED_GRAPH))
        self.batch_size, self._graph = batch_size, Graph(self.path, device)
        self.versions = {name: version(name) for name in ("numpy", self.backend)}
        self.sha256 = sha256_of_file(self.path)
        (published,) = (file.sha256 for file in released.FILES if file.name == PUBLISHED_GRAPH)
        self.is_published = self.sha256 == published
        if self.path.name == PUBLISHED_GRAPH and not self.is_published:
            raise UserError(
                f"{self.path} has SHA-256 {self.sha256}, the published graph has {published}: move it away and fetch "
                f"it again (python download.py {PUBLISHED_GRAPH}), or rename it if it is another graph"
            )
        # A first image shows, before hours are spent, that the graph runs here.
        self.sizes = tuple(values.shape[1] for values in self.features(np.zeros((1, 32, 32, 3), np.uint8)))

    def features(self, images):
        """images (N, H, W, 3) -> pool and spatial features, float32 arrays (N, D) and (N, D_s); see inception.py."""
        while True:
            try:
                parts = [
                    [values.cpu().numpy() for values in self._graph.features(images[start : start + self.batch_size])]
                    for start in range(0, len(images), self.batch_size)
                ]
                return [np.concatenate(values) for values in zip(*parts)]
            except (MemoryError, RuntimeError) as error:
                if self.batch_size == 1 or not out_of_memory(error):
                    raise
            # Outside the handler, because the error keeps the tensors of the failed attempt alive.
            self.batch_size = max(1, min(self.batch_size, len(images)) // 2)
            warnings.warn(f"out of memory: going on with batches of {self.batch_size}", RuntimeWarning, stacklevel=2)

    def probabilities(self, pool):
        """Pool features (N, D) -> class probabilities, float32 (N, classes), without the bias."""
        import torch

        return self._graph.probabilities(torch.from_numpy(pool)).cpu().numpy()

    def check_stored(self, images):
        """Raise UserError if an `EvaluationSet` stores statistics of another graph, or of other sizes."""
        theirs = images.about.get("graph", self.sha256)
        sizes = dict(zip(STATISTICS, np.repeat(self.sizes, 2).tolist())) | {"pool": self.sizes[0]}
        other = [f"{name} {array.shape}" for name, array in images.stored.items() if array.shape[-1:] != (sizes[name],)]
        if theirs != self.sha256 or other:
            reason = ", ".join(other) or f"SHA-256 {theirs}, not {self.sha256}"
            raise UserError(
                f"{images} holds statistics of another graph than {self.path} ({reason}): name theirs with --graph, or "
                "make the statistics again with --save-stats"
            )

    def extract(self, images, needed, progress=lambda count: None):
        """The arrays `needed` (of `STATISTICS` and "pool") from the images of an `EvaluationSet`, as {name: array}.

        Means and covariances are float64, pool features float32 (N, D). progress: called with each batch's length.
        Warns of images that look like a mistake. Raises UserError if an image cannot be used.
        """
        needed, checks, spatial = set(needed), ImageChecks(images), Moments()
        pool, done, waiting = np.empty((images.count, self.sizes[0]), np.float32), 0, []
        with contextlib.closing(images.batches(self.batch_size)) as batches:  # or a reader that waits outlives Ctrl-C
            for batch in batches:
                checks.add(batch)
                pooled, cells = self.features(batch if batch.dtype == np.uint8 else batch.astype(np.float32))
                if (pooled.shape[1], cells.shape[1]) != self.sizes:
                    raise UserError(
                        f"{self.path} makes {pooled.shape[1]} and {cells.shape[1]} features from {images}, but "
                        f"{self.sizes[0]} and {self.sizes[1]} from a 32x32 image: a graph for the evaluator must "
                        "resize its images"
                    )
                pool[done : done + len(batch)] = pooled
                done += len(batch)
                if needed & {"mu_s", "sigma_s"}:
                    waiting.append(cells)
                    # Many at a time, because each addition rewrites the whole covariance.
                    if done == images.count or sum(map(len, waiting)) >= TILE:
                        spatial.add(np.concatenate(waiting))
                        waiting = []
                progress(len(batch))
        for text in checks.doubts():
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        arrays = {"pool": pool}
        try:
            if needed & {"mu", "sigma"}:
                arrays |= zip(("mu", "sigma"), statistics(pool))
            if needed & {"mu_s", "sigma_s"}:
                arrays |= zip(("mu_s", "sigma_s"), spatial.statistics())
        except ValueError as error:
            raise UserError(f"{images}: {error}") from error
        return {name: arrays[name] for name in needed}
