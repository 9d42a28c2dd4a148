"""The Inception v3 network of FID, read from TensorFlow's frozen graph file and run by PyTorch on any device.

A small interpreter runs the operations that occur in it: neither TensorFlow nor a converted copy of the weights is
needed (`graph_file.py` reads the file). Sizes come from the file, so that any network of these operations and node
names serves. `inception_tf.py` runs the same file in TensorFlow behind the same interface.

A value has the shape that it has in TensorFlow, images (N, H, W, C). Seen through `permute(0, 3, 1, 2)`, such a tensor
is what PyTorch calls channels-last, so that nothing is copied on the way into a convolution.

Sources: the operations are TensorFlow's; Szegedy et al. 2015, arXiv:1512.00567 (the network).
"""

import contextlib
import functools
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from evaluation.graph_file import DTYPES, message_classes, read_nodes
from runtime.errors import UserError
from runtime.memory import out_of_memory

FED = "ExpandDims"  # images take the place of this node's output; what it would be made from never runs
POOL, SPATIAL = "pool_3", "mixed_6/conv"  # (N, 1, 1, 2048) and (N, 17, 17, 192) in the network of 2015
WEIGHTS = "softmax/weights"  # (2048, 1008)
SPATIAL_CHANNELS = 7  # the first ones, of which sFID's statistics are made
CPU_IMAGES = 16  # that a CPU computes at a time: in one go 64 take 1.1 times as long, and more memory


@dataclass(frozen=True)
class Step:
    """One operation of a plan: `run` makes the value `name` from the values `inputs`, of which `last` then go."""

    name: str
    run: callable
    inputs: tuple
    last: tuple


class Plan:
    """The steps from the value `fed` to the values `outputs` (names), in order; constants lie on `device`.

    memory_format: how images lie in memory at the convolutions, and from there on.
    What `outputs` do not need is not looked at. Raises UserError where a node is missing, or is more than we know.
    """

    # They hand on their input. That it has no NaN, which the second asks for, `Graph` sees to.
    ALIASES = ("Identity", "CheckNumerics")

    def __init__(self, nodes, path, device, fed, outputs, memory_format):
        self.nodes, self.path, self.device, self.fed, self.memory_format = nodes, path, device, fed, memory_format
        self.require(fed, *outputs)
        self.outputs = [self.source(name) for name in outputs]
        order = self._order()
        # How often a value is read, the caller included.
        self.uses = {name: self.outputs.count(name) for name in order}
        for name in itertools.chain.from_iterable(self._sources(name) for name in order):
            self.uses[name] += 1
        wanted, steps = set(self.outputs), []
        for name in reversed(order):
            if name in wanted and name != fed:
                run, inputs = self.build(nodes[name])
                inputs = tuple(map(self.source, inputs))
                # Backwards, the first to want a value is its last reader.
                last = tuple(sorted(set(inputs) - wanted))
                wanted.update(inputs)
                steps.append(Step(name, run, inputs, last))
        self.steps = steps[::-1]

    def require(self, *names):
        """Raises UserError where one of the nodes is not there."""
        for name in names:
            if name not in self.nodes:
                raise UserError(f"{self.path} has no node {name}: it is another network, or cut off")

    def source(self, name, reader=None):
        """The node that makes the value `name`, behind all nodes that only hand it on. reader: the node that wants it.

        Raises UserError where there is none.
        """
        seen = set()
        while True:
            if name not in self.nodes:
                raise reader.fault(f"reads {name}, which is not there: the file is damaged")
            if name == self.fed or self.nodes[name].op not in self.ALIASES or name in seen:
                return name  # a circle is found by `_order`
            seen.add(name)
            reader = self.nodes[name]
            (name,) = reader.read(1)

    def _sources(self, name):
        node = self.nodes[name]
        return [] if name == self.fed else [self.source(needed, node) for needed in node.inputs]

    def _order(self):
        """The names of the nodes that the outputs need, each after all that it reads."""
        order, state, stack = [], {}, list(self.outputs)
        while stack:
            name = stack[-1]
            if state.get(name) is None:
                state[name] = "open"
                inputs = self._sources(name)
                if any(state.get(needed) == "open" for needed in inputs):
                    raise self.nodes[name].fault("waits for itself: the file is damaged")
                stack += [needed for needed in inputs if needed not in state]
            else:
                stack.pop()
                if state[name] == "open":
                    state[name] = "done"
                    order.append(name)
        return order

    def build(self, node):
        """The function of a node and the names of the values it takes."""
        if node.op not in OPS:
            raise node.fault(f"is an operation that is not known here; known are {', '.join(sorted(OPS))}")
        try:
            return OPS[node.op](self, node)
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise node.fault(f"has constants that do not fit together ({error})") from error

    def constant(self, name):
        """The array of the node `name`. Raises UserError where it is not there, or not constant."""
        self.require(name)
        return self.nodes[self.source(name)].constant()

    def integers(self, name, count=None):
        """The whole numbers of the node `name`, a list. Raises UserError where it has others, or is not constant.

        count: how many there have to be.
        """
        values = self.constant(name)
        if values.dtype.kind not in "iu" or values.size != (values.size if count is None else count):
            raise self.nodes[name].fault(
                f"has {values.size} values of type {values.dtype}, not whole numbers as needed"
            )
        return values.reshape(-1).tolist()

    def tensor(self, array):
        """An array on the device."""
        return torch.from_numpy(np.array(array, order="C")).to(self.device)

    def weights(self, array):
        """A float64 array as float32 on the device."""
        return self.tensor(array.astype(np.float32))

    def only_for_us(self, name, ops):
        """The node that makes the value `name`, where it is one of `ops` and nobody else reads it; else None."""
        node = self.nodes[self.source(name)]
        return node if node.op in ops and node.name != self.fed and self.uses[node.name] == 1 else None


def same_padding(size, kernel, stride):
    """Rows (or columns) that padding SAME adds (before, after) `size` of them: the odd one comes after."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def padded(x, kernel, strides, same, value=0.0):
    """x (N, C, H, W) and what PyTorch has still to pad: where both ends need the same, no copy is made."""
    if not same:
        return x, (0, 0)
    (top, bottom), (left, right) = map(same_padding, x.shape[2:], kernel, strides)
    if (top, left) == (bottom, right):
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom), value=value), (0, 0)


def resize_bilinear(x, height, width):
    """x (N, H, W, C) -> float32 (N, height, width, C), bilinear as TensorFlow did it first.

    Pixel i of the output is taken from i * in / out, without the half-pixel shift, all in float32 and in this order
    of operations: on a CPU the result is TensorFlow's bit for bit.
    """
    x = x.float()

    def positions(size, out):
        scale = float(np.float32(size) / np.float32(out))
        source = torch.arange(out, dtype=torch.float32, device=x.device) * scale
        low = source.floor()
        return low.long(), (low + 1).clamp(max=size - 1).long(), source - low

    def between(dim, low, high, weight):
        start = x.index_select(dim, low)
        # Not torch.lerp, nor addcmul, which may round otherwise.
        return x.index_select(dim, high).sub_(start).mul_(weight).add_(start)

    low, high, weight = positions(x.shape[2], width)
    x = between(2, low, high, weight[:, None])
    low, high, weight = positions(x.shape[1], height)
    return between(1, low, high, weight[:, None, None])


def _resize(plan, node):
    x, size = node.read(2)
    if node.attr("align_corners", "b", False) or node.attr("half_pixel_centers", "b", False):
        raise node.fault("aligns corners or has half-pixel centers, where only neither is known")
    height, width = plan.integers(size, 2)
    return lambda x: resize_bilinear(x, height, width), [x]


def _convolution(plan, node, scale=1.0, shift=None):
    """Conv2D; scale, shift: float64 (C_out,), what its output is multiplied with, and what is added then."""
    x, kernel = node.read(2)
    kernel = plan.constant(kernel)  # (height, width, C_in, C_out)
    if kernel.ndim != 4:
        raise node.fault(f"has weights of shape {kernel.shape}, not (height, width, C_in, C_out)")
    if list(node.attr("dilations", "list", LIST_OF_ONES).i) != [1] * 4:
        raise node.fault("has dilations, which are not known here")
    size, strides, same = kernel.shape[:2], node.sides("strides"), node.is_same()
    weights = plan.weights((kernel * np.float64(1) * scale).transpose(3, 2, 0, 1))
    memory_format = plan.memory_format  # a function that knew the plan would keep the whole file in memory
    weights = weights.contiguous(memory_format=memory_format)
    bias = None if shift is None else plan.weights(shift)

    def run(x):
        x = x.permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
        x, padding = padded(x, size, strides, same)
        return F.conv2d(x, weights, bias, strides, padding).permute(0, 2, 3, 1)

    return run, [x]


def _affine(plan, x, scale, shift):
    """x * scale + shift for each channel, float64 (C,): within the convolution that makes x, where that is possible."""
    convolution = plan.only_for_us(x, ("Conv2D",))
    if convolution:
        return _convolution(plan, convolution, scale, shift)
    scale, shift = plan.weights(scale), plan.weights(shift)
    return lambda x: torch.addcmul(shift, x, scale), [x]


def _batch_norm(plan, node):
    x, *moments = node.read(5)
    mean, variance, beta, gamma = (plan.constant(name).astype(np.float64) for name in moments)
    scale = 1 / np.sqrt(variance + node.attr("variance_epsilon", "f"))
    if node.attr("scale_after_normalization", "b"):
        scale *= gamma
    return _affine(plan, x, scale, beta - mean * scale)


def _bias_add(plan, node):
    x, bias = node.read(2)
    bias = plan.constant(bias).astype(np.float64)
    return _affine(plan, x, np.ones_like(bias), bias)


def _relu(plan, node):
    (x,) = node.read(1)
    before = plan.only_for_us(x, ("Conv2D", "BatchNormWithGlobalNormalization", "BiasAdd"))
    if not before:
        return torch.relu, [x]
    run, inputs = plan.build(before)
    return lambda *values: run(*values).relu_(), inputs  # nobody else has the tensor that is overwritten


def _max_pool(plan, node):
    (x,) = node.read(1)
    size, strides, same = node.sides("ksize"), node.sides("strides"), node.is_same()

    def run(x):
        x, padding = padded(x.permute(0, 3, 1, 2), size, strides, same, -torch.inf)
        return F.max_pool2d(x, size, strides, padding).permute(0, 2, 3, 1)

    return run, [x]


def _average_pool(plan, node):
    """AvgPool: the mean of those pixels of the window that are in the image."""
    (x,) = node.read(1)
    size, strides, same = node.sides("ksize"), node.sides("strides"), node.is_same()

    def run(x):
        x = x.permute(0, 3, 1, 2)
        inside, padding = padded(x, size, strides, same)
        if inside is x:
            mean = F.avg_pool2d(x, size, strides, padding, count_include_pad=False)
        else:
            there, _ = padded(torch.ones_like(x[:1, :1]), size, strides, same)
            sums, counts = (F.avg_pool2d(values, size, strides, divisor_override=1) for values in (inside, there))
            mean = sums / counts
        return mean.permute(0, 2, 3, 1)

    return run, [x]


def _concat(plan, node, axis_at):
    """Concat and ConcatV2, which differ in where the axis is: the first input (0) or the last one (-1)."""
    names = list(node.inputs)
    if len(names) < 2:
        raise node.fault(f"has {len(names)} inputs, fewer than 2: the file is damaged")
    (axis,) = plan.integers(names.pop(axis_at), 1)

    def run(*values):
        if values[0].ndim != 4:
            return torch.cat(values, axis)
        # In PyTorch's order of axes the result lies in memory as the values do.
        return torch.cat([x.permute(0, 3, 1, 2) for x in values], (0, 2, 3, 1)[axis]).permute(0, 2, 3, 1)

    return run, names


def _matmul(plan, node):
    def turned(side):
        return node.attr(f"transpose_{side}", "b", False)

    turn_a, turn_b = turned("a"), turned("b")
    return lambda a, b: torch.matmul(a.T if turn_a else a, b.T if turn_b else b), node.read(2)


def _reshape(plan, node):
    x, shape = node.read(2)
    shape = plan.integers(shape)
    return lambda x: x.reshape(shape), [x]


def _expand_dims(plan, node):
    x, dim = node.read(2)
    (dim,) = plan.integers(dim, 1)
    return lambda x: x.unsqueeze(dim), [x]


def _squeeze(plan, node):
    dims = tuple(node.attr("squeeze_dims", "list", NO_LIST).i)
    return lambda x: x.squeeze(dims) if dims else x.squeeze(), node.read(1)


def _cast(plan, node):
    number = node.attr("DstT", "type")
    if number not in DTYPES:
        raise node.fault(f"casts to type {number}: known are {', '.join(name for name, _ in DTYPES.values())}")
    dtype = getattr(torch, DTYPES[number][0])
    return lambda x: x.to(dtype), node.read(1)


def _constant(plan, node):
    tensor = plan.tensor(node.constant())
    return lambda: tensor, []


def _placeholder(plan, node):
    raise node.fault(f"has no value: images go to {plan.fed}")


LIST_OF_ONES, NO_LIST = message_classes()["List"](i=[1] * 4), message_classes()["List"]()
# Each takes the plan and the node, and returns a function of tensors with the names of the values it takes.
OPS = {
    "AvgPool": _average_pool,
    "BatchNormWithGlobalNormalization": _batch_norm,
    "BiasAdd": _bias_add,
    "Cast": _cast,
    "Concat": functools.partial(_concat, axis_at=0),
    "ConcatV2": functools.partial(_concat, axis_at=-1),
    "Const": _constant,
    "Conv2D": _convolution,
    "ExpandDims": _expand_dims,
    "MatMul": _matmul,
    "MaxPool": _max_pool,
    "Mul": lambda plan, node: (torch.mul, node.read(2)),
    "Placeholder": _placeholder,
    "Relu": _relu,
    "Reshape": _reshape,
    "ResizeBilinear": _resize,
    "Softmax": lambda plan, node: (functools.partial(torch.softmax, dim=-1), node.read(1)),
    "Squeeze": _squeeze,
    "Sub": lambda plan, node: (torch.sub, node.read(2)),
}


@contextlib.contextmanager
def exact_float32():
    """In this block products of float32 are computed in float32, whatever was allowed before: TF32 costs 4e-4."""
    if hasattr(torch.backends.cudnn, "conv"):  # since 2.9; the older flags cannot be read where somebody uses these
        backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul
        backends += torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul
        before = [backend.fp32_precision for backend in backends]
        for backend in backends:
            backend.fp32_precision = "ieee"
        try:
            yield
        finally:
            for backend, precision in zip(backends, before):
                backend.fp32_precision = precision
    else:
        before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32 = before[0]
            torch.set_float32_matmul_precision(before[1])


class Extractor:
    """What is asked of the network, whoever runs it: a backend has `run` and `probabilities`."""

    def features(self, images):
        """images (N, H, W, 3) -> pool features (N, 2048) and spatial features (N, 2023), float32, for one batch.

        images: uint8 or float32, RGB from 0 to 255, of any size; a tensor or an array. The network resizes them.
        The spatial features are the first seven channels of 17 x 17 cells, cell by cell, as the published statistics
        have them. (The three sizes are the published network's.)
        Raises UserError where the images are no such images, or the result is NaN or infinite.
        """
        if isinstance(images, np.ndarray) and not images.flags.writeable:
            images = images.copy()  # PyTorch warns of what it must not write to
        images = torch.as_tensor(images)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype not in (torch.uint8, torch.float32):
            raise UserError(
                f"images are {str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}: uint8 or float32 "
                "(N, H, W, 3) is needed"
            )
        pool, spatial = self.run(images)
        return pool.flatten(1), spatial[..., :SPATIAL_CHANNELS].flatten(1)

    def class_accuracy(self, images, labels, batch_size=100):
        """The share of images that the network puts in their class: images (N, H, W, 3) as for `features`, labels (N,).

        labels: whole numbers, columns of `probabilities`. batch_size: images at a time.
        """
        images, labels = torch.as_tensor(images), torch.as_tensor(labels)
        batches = (self.probabilities(self.features(batch)[0]) for batch in images.split(batch_size))
        guesses = torch.cat([probabilities.argmax(1).cpu() for probabilities in batches])
        return (guesses == labels).float().mean().item()


class Graph(Extractor):
    """The operations between the node `fed` and the nodes `outputs` of a graph file, on `device`, in float32.

    weights: the node of the weights that `probabilities` multiplies with; None where it is not asked for.
    memory_format: how images lie in memory; a CPU takes 1.5 times as long with the other one.
    """

    def __init__(
        self,
        path,
        device="cpu",
        fed=FED,
        outputs=(POOL, SPATIAL),
        weights=WEIGHTS,
        memory_format=torch.channels_last,
    ):
        self.path, self.device, self.fed = path, torch.device(device), fed
        plan = Plan(read_nodes(path), path, self.device, fed, outputs, memory_format)
        self.steps, self.outputs = plan.steps, plan.outputs
        self.weights = plan.tensor(plan.constant(weights)) if weights else None

    @torch.no_grad()
    def run(self, images):
        """The outputs, a list of tensors shaped as in TensorFlow, for images (N, H, W, 3), uint8 or float32.

        Of more than `CPU_IMAGES` images on a CPU each has to have its own part of all outputs, along the first axis.
        Raises UserError where they are NaN or infinite, or cannot be computed, and names the node where that began.
        """
        if self.device.type != "cpu" or len(images) <= CPU_IMAGES:
            return self._run_checked(images)
        return [torch.cat(parts) for parts in zip(*map(self._run_checked, images.split(CPU_IMAGES)))]

    def _run_checked(self, images):
        outputs = self._run(images)
        # Looked for at the end, where it costs nothing: NaN goes through all operations. (TensorFlow looks behind each
        # convolution, and so sees also what is below all numbers and becomes 0 by Relu.)
        if not all(bool(output.isfinite().all()) for output in outputs):
            self._run(images, self._check_finite)
            raise UserError(f"{self.path}: features were NaN or infinite, but not when computed again on {self.device}")
        return outputs

    def _run(self, images, look=None):
        # Copied first: an image is a quarter as large before it is float32.
        values = {self.fed: images.to(self.device).float()}
        with exact_float32(), torch.autocast(self.device.type, enabled=False):
            for step in self.steps:
                try:
                    values[step.name] = step.run(*(values[name] for name in step.inputs))
                except (RuntimeError, IndexError) as error:  # shapes that do not fit, as PyTorch says it
                    if out_of_memory(error):
                        raise
                    reason = str(error).partition("\n")[0]
                    raise UserError(f"{self.path}: node {step.name} cannot be computed ({reason})") from error
                if look:
                    look(step, values[step.name])
                for name in step.last:
                    del values[name]
        return [values[name] for name in self.outputs]

    def _check_finite(self, step, value):
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{self.path}: node {step.name} makes values that are NaN or infinite")

    @torch.no_grad()
    def probabilities(self, pool):
        """Pool features (N, 2048) -> the probabilities of all classes (N, 1008), without the bias, as for the IS."""
        with exact_float32(), torch.autocast(self.device.type, enabled=False):
            return torch.softmax(pool.to(self.device) @ self.weights, dim=1)


def load_graph(path, device="cpu"):
    """The network in the graph file at `path`, run by PyTorch on `device`.

    Raises UserError where it cannot be read, is no such graph, is cut off, or has operations that are not known here.
    """
    return Graph(path, device)
