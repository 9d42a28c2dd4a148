"""The Inception v3 network of FID, read from TensorFlow's graph file and run by PyTorch on any device.

No TensorFlow and no converted weights are needed: `graph_file.py` reads the file, `graph_ops.py` has its operations.
Sizes come from the file, so any network of these operations and node names works. `inception_tf.py` runs the same
file in TensorFlow behind the same interface. Source of the network: Szegedy et al. 2015, arXiv:1512.00567.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from evaluation.graph_file import read_nodes
from evaluation.graph_ops import OPS
from runtime.devices import exact_float32
from runtime.errors import UserError, first_line
from runtime.memory import out_of_memory

FED = "ExpandDims"  # images replace the output of this node; the nodes before it never run
POOL, SPATIAL = "pool_3", "mixed_6/conv"  # (N, 1, 1, 2048) and (N, 17, 17, 192) in the network of 2015
WEIGHTS = "softmax/weights"  # (2048, 1008)
SPATIAL_CHANNELS = 7  # the first channels, which sFID uses
CPU_IMAGES = 16  # images at a time on a CPU: 64 take 1.1 times as long, and more memory
ALIASES = ("Identity", "CheckNumerics")  # they return their input; `Graph` looks for NaN at the end


def require(nodes, path, *names):
    """Raise UserError if a node is missing."""
    for name in names:
        if name not in nodes:
            raise UserError(f"{path} has no node {name}: it is another network, or cut off")


@dataclass(frozen=True)
class Operation:
    """Computes the value `name` as run(*inputs); afterwards the values `unneeded` can be freed."""

    name: str
    run: Callable
    inputs: list
    unneeded: list


class Builder:
    """Turns the nodes between `FED` and `outputs` (names) into `operations`, in the order in which they run.

    Constants are put on `device`. Nodes that `outputs` do not need are ignored.
    Raises UserError if a node is missing, damaged or not supported.
    """

    def __init__(self, nodes, path, device, outputs):
        self.nodes, self.path, self.device = nodes, path, device
        require(nodes, path, FED, *outputs)
        self.outputs = [self.source(name) for name in outputs]
        order = self._order()
        self._reads = Counter(self.outputs)
        for name in order:
            self._reads.update(self._inputs(name))
        self.operations, needed = [], set(self.outputs)
        for name in reversed(order):  # backwards, the first operation that reads a value is its last reader
            if name in needed and name != FED:
                run, inputs = self.build(nodes[name])
                inputs = [self.source(read) for read in inputs]
                self.operations.append(Operation(name, run, inputs, sorted(set(inputs) - needed)))
                needed.update(inputs)
        self.operations.reverse()

    def source(self, name, reader=None):
        """Name of the node that computes the value `name`, behind all aliases; reader: the node that reads it.

        Raises UserError if there is none.
        """
        seen = set()
        while True:
            if name not in self.nodes:
                raise reader.fault(f"reads {name}, which does not exist: the file is damaged")
            if name == FED or self.nodes[name].op not in ALIASES or name in seen:
                return name  # `_order` finds cycles
            seen.add(name)
            reader = self.nodes[name]
            (name,) = reader.take_inputs(1)

    def _inputs(self, name):
        node = self.nodes[name]
        return [] if name == FED else [self.source(read, node) for read in node.inputs]

    def _order(self):
        """Names of the nodes that the outputs need, each after all nodes that it reads: a depth-first search."""
        order, visited, stack = {}, set(), list(self.outputs)
        while stack:
            name = stack[-1]
            missing = [read for read in self._inputs(name) if read not in order]
            if not missing:
                order[stack.pop()] = None
            elif name in visited:
                raise self.nodes[name].fault("waits for itself: the file is damaged")
            else:
                visited.add(name)
                stack += missing
        return list(order)

    def build(self, node):
        """The function of a node and the names of the values that it takes."""
        if node.op not in OPS:
            raise node.fault(f"is an operation that is not supported; supported are {', '.join(sorted(OPS))}")
        try:
            return OPS[node.op](self, node)
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise node.fault(f"has constants that do not fit together ({error})") from error

    def constant(self, name):
        """Array of the node `name`. Raises UserError if it is missing or not a constant."""
        require(self.nodes, self.path, name)
        return self.nodes[self.source(name)].constant()

    def integers(self, name, count):
        """The `count` whole numbers of the node `name`. Raises UserError if it has others or is not a constant."""
        values = self.constant(name)
        if values.dtype.kind not in "iu" or values.size != count:
            raise self.nodes[name].fault(f"has {values.size} values of type {values.dtype}, not {count} whole numbers")
        return values.reshape(-1).tolist()

    def tensor(self, array):
        """An array on the device."""
        return torch.from_numpy(np.array(array, order="C")).to(self.device)

    def weights(self, array):
        """A float64 array as float32 on the device."""
        return self.tensor(array.astype(np.float32))

    def only_read_once(self, name, ops):
        """The node that computes the value `name` if it is one of `ops` and has a single reader, else None."""
        node = self.nodes[self.source(name)]
        return node if node.op in ops and node.name != FED and self._reads[node.name] == 1 else None


class Extractor:
    """Features and class accuracy of a graph; a backend adds `run` and `probabilities`."""

    def features(self, images):
        """One batch of images (N, H, W, 3) -> pool features (N, 2048), spatial features (N, 2023), float32.

        images: uint8 or float32, RGB from 0 to 255, of any size, which the network resizes; a tensor or an array.
        Spatial features are the first seven channels of 17 x 17 cells, cell by cell as in published statistics.
        (The sizes are those of the published network.)
        Raises UserError if shape or type of the images are wrong, or the result is not finite.
        """
        if isinstance(images, np.ndarray) and not images.flags.writeable:
            images = images.copy()  # PyTorch warns of arrays that it must not write to
        images = torch.as_tensor(images)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype not in (torch.uint8, torch.float32):
            raise UserError(
                f"images are {str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}: uint8 or float32 "
                "(N, H, W, 3) is needed"
            )
        pool, spatial = self.run(images)
        return pool.flatten(1), spatial[..., :SPATIAL_CHANNELS].flatten(1)

    def class_accuracy(self, images, labels, batch_size=100):
        """Share of images (N, H, W, 3), as for `features`, whose likeliest class is their label.

        labels: (N,), columns of `probabilities`. batch_size: images at a time.
        """
        images, labels = torch.as_tensor(images), torch.as_tensor(labels)
        batches = (self.probabilities(self.features(batch)[0]) for batch in images.split(batch_size))
        guesses = torch.cat([probabilities.argmax(1).cpu() for probabilities in batches])
        return (guesses == labels).float().mean().item()


class Graph(Extractor):
    """The network in the graph file at `path`, run by PyTorch on `device` in float32.

    outputs: names of the nodes that `run` computes. weights: the node that `probabilities` multiplies with, or None.
    Raises UserError if the file cannot be read, is not a graph, is damaged, or has operations that are not supported.
    """

    def __init__(self, path, device="cpu", outputs=(POOL, SPATIAL), weights=WEIGHTS):
        self.path, self.device = path, torch.device(device)
        builder = Builder(read_nodes(path), path, self.device, outputs)
        self.operations, self.outputs = builder.operations, builder.outputs
        self.weights = builder.tensor(builder.constant(weights)) if weights else None

    @torch.no_grad()
    def run(self, images):
        """The outputs, tensors shaped as in TensorFlow, for images (N, H, W, 3), uint8 or float32.

        On a CPU, more than `CPU_IMAGES` images are split, and the parts are joined along the first axis of each output.
        Raises UserError if a value is not finite or cannot be computed; it names the first such node.
        """
        if self.device.type != "cpu" or len(images) <= CPU_IMAGES:
            return self._run_checked(images)
        return [torch.cat(parts) for parts in zip(*map(self._run_checked, images.split(CPU_IMAGES)))]

    def _run_checked(self, images):
        outputs = self._run(images)
        # Checking at the end costs nothing, because NaN passes through all operations. (TensorFlow checks after each
        # convolution, and so also finds minus infinity before Relu makes it 0.)
        if not all(bool(output.isfinite().all()) for output in outputs):
            self._run(images, check=True)
            raise UserError(f"{self.path}: features were NaN or infinite, but not when computed again on {self.device}")
        return outputs

    def _run(self, images, check=False):
        """The outputs. check: raise UserError for the first node with a value that is not finite."""
        values = {FED: images.to(self.device).float()}  # moved first, because uint8 is a quarter as large
        with exact_float32(), torch.autocast(self.device.type, enabled=False):
            for operation in self.operations:
                try:
                    value = operation.run(*(values[name] for name in operation.inputs))
                except (RuntimeError, IndexError) as error:  # PyTorch's errors for shapes that do not fit
                    if out_of_memory(error):
                        raise
                    raise UserError(
                        f"{self.path}: node {operation.name} cannot be computed ({first_line(error)})"
                    ) from error
                if check and value.is_floating_point() and not value.isfinite().all():
                    raise UserError(f"{self.path}: node {operation.name} makes values that are NaN or infinite")
                values[operation.name] = value
                for name in operation.unneeded:
                    del values[name]
        return [values[name] for name in self.outputs]

    @torch.no_grad()
    def probabilities(self, pool):
        """Pool features (N, 2048) -> class probabilities (N, 1008), without the bias, as the Inception Score needs."""
        with exact_float32(), torch.autocast(self.device.type, enabled=False):
            return torch.softmax(pool.to(self.device) @ self.weights, dim=1)
