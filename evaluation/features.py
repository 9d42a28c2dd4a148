"""Features of image sets: what the network of a graph file makes of them, and the statistics that metrics need."""

import hashlib
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np

from evaluation.evaluation_set import STATISTICS, ImageChecks
from evaluation.metrics import BLOCK, Moments, statistics
from runtime import released
from runtime.errors import UserError
from runtime.memory import out_of_memory

PUBLISHED_GRAPH = "classify_image_graph_def.pb"


class Network:
    """A graph file run by a backend, "torch" ("auto" means it too) or "tensorflow", on a torch.device.

    backend: its name. path: of the file; None fetches the published one where it is missing. sha256: of the file.
    sizes: of the pool features and the spatial features of an image; (2048, 2023) of the published one.
    versions: of what it computes with, {package: version}.
    batch_size: images at a time; where memory does not suffice for them half as many are tried, with a warning.
    Raises UserError where the file cannot be used, or calls itself the published one and is not.
    """

    def __init__(self, path=None, backend="torch", device="cpu", batch_size=64):
        if backend == "tensorflow":
            from evaluation.inception_tf import load_graph
        else:
            backend = "torch"
            from evaluation.inception import load_graph
        self.backend, self.path = backend, Path(path or released.fetch(PUBLISHED_GRAPH))
        self.batch_size, self._graph = batch_size, load_graph(self.path, device)
        self.versions = {name: version(name) for name in ("numpy", self.backend)}
        self.sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()
        (published,) = (file.sha256 for file in released.FILES if file.name == PUBLISHED_GRAPH)
        self.is_published = self.sha256 == published
        if self.path.name == PUBLISHED_GRAPH and not self.is_published:
            raise UserError(
                f"{self.path} has SHA-256 {self.sha256}, the published graph has {published}: move it away and fetch "
                f"it again (python download.py {PUBLISHED_GRAPH}), or give another graph another name"
            )
        # One image tells, before hours are spent, that the graph runs here and what to expect.
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
            # Here the error, which holds what was computed, is gone.
            self.batch_size = max(1, min(self.batch_size, len(images)) // 2)
            warnings.warn(f"out of memory: going on with batches of {self.batch_size}", RuntimeWarning, stacklevel=2)

    def probabilities(self, pool):
        """Pool features (N, D) -> probabilities of the classes, float32 (N, classes), without the bias."""
        import torch

        return self._graph.probabilities(torch.from_numpy(pool)).cpu().numpy()

    def check(self, images):
        """Raises UserError where what is stored in an `EvaluationSet` was made by another graph, or has other sizes."""
        theirs = images.about.get("graph", self.sha256)
        sizes = dict(zip(STATISTICS, np.repeat(self.sizes, 2).tolist())) | {"pool": self.sizes[0]}
        other = [f"{name} {array.shape}" for name, array in images.stored.items() if array.shape[-1:] != (sizes[name],)]
        if theirs != self.sha256 or other:
            reason = ", ".join(other) or f"SHA-256 {theirs}, this one has {self.sha256}"
            raise UserError(
                f"{images} holds statistics of another graph than {self.path} ({reason}): name theirs with --graph, or "
                "make the statistics again with --save-stats"
            )

    def extract(self, images, needed, progress=lambda count: None):
        """The arrays `needed` (names of `STATISTICS`, and "pool") of the images of an `EvaluationSet`, name to array.

        Means and covariances in float64, pool features float32 (N, D). progress: called with the images of each batch.
        Doubts about the images are warned of. Raises UserError where an image cannot be used.
        """
        needed, doubts, spatial = set(needed), ImageChecks(images), Moments()
        pool, done, waiting = np.empty((images.count, self.sizes[0]), np.float32), 0, []
        for batch in images.batches(self.batch_size):
            doubts.look(batch)
            pooled, cells = self.features(batch if batch.dtype == np.uint8 else batch.astype(np.float32))
            if (pooled.shape[1], cells.shape[1]) != self.sizes:
                raise UserError(
                    f"{self.path} makes {pooled.shape[1]} and {cells.shape[1]} features of {images}, of a 32x32 image "
                    f"{self.sizes[0]} and {self.sizes[1]}: a graph for the evaluator resizes its images"
                )
            pool[done : done + len(batch)] = pooled
            done += len(batch)
            if needed & {"mu_s", "sigma_s"}:
                waiting.append(cells)
                # Many at a time, because all of the covariance is written each time.
                if done == images.count or sum(map(len, waiting)) >= BLOCK:
                    spatial.add(np.concatenate(waiting))
                    waiting = []
            progress(len(batch))
        for text in doubts.texts():
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
