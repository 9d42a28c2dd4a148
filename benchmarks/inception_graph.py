"""Graph files to test with, random weights in the structure of the Inception v3 graph of 2015, and who runs them."""

import importlib.util

import numpy as np
import pytest

from evaluation import inception, inception_tf
from evaluation.graph_file import FLOAT, INT, GraphWriter

HAS_TENSORFLOW = importlib.util.find_spec("tensorflow") is not None
needs_tensorflow = pytest.mark.skipif(not HAS_TENSORFLOW, reason="TensorFlow is not installed: pip install tensorflow")
BACKENDS = [inception.Graph, pytest.param(inception_tf.Graph, marks=needs_tensorflow)]
TOLERANCE = 1e-5  # of the features, relative L2: what was measured is 2e-6

UINT8, STRING = 4, 7  # TensorFlow's numbers of the other types that occur
ENDS = ("", (1, 3)), ("_1", (3, 1))  # the pairs of convolutions in which the last towers end: of the name, size


def relative(actual, expected):
    """The L2 norm of the difference over that of `expected`, both tensors."""
    return float((actual - expected).double().norm() / expected.double().norm())


class GraphFile(GraphWriter):
    """A graph with random weights."""

    def __init__(self, seed=0, producer=8):
        super().__init__(producer)
        self.random = np.random.default_rng(seed)

    def drawn(self, *shape, std=1.0, mean=0.0):
        """Random float32 values."""
        return self.random.standard_normal(shape, np.float32) * np.float32(std) + np.float32(mean)

    def normal(self, name, *shape, std=1.0):
        """Adds random float32 values; returns the node's name."""
        return self.constant(name, self.drawn(*shape, std=std))

    def random_convolution(self, name, x, c_in, c_out, size=(1, 1), stride=1, padding=b"SAME"):
        """Adds `convolution` with random weights; returns the last node.

        The weights keep the variance of what goes through; the moments are such that batch norm does something.
        """
        kernel = self.drawn(*size, c_in, c_out, std=(2 / (size[0] * size[1] * c_in)) ** 0.5)
        beta, gamma, mean = (self.drawn(c_out, std=0.1, mean=mean) for mean in (0, 1, 0))
        variance = self.random.uniform(0.5, 1.5, c_out)
        return self.convolution(
            name, x, kernel, beta, gamma, mean, variance, stride=stride, padding=padding, scaled=False
        )

    def concat(self, name, *values):
        """Adds the old Concat along the channels, whose first input is the axis; returns its name."""
        axis = self.constant(f"{name}/concat_dim", np.int32(3))
        return self.node(name, "Concat", axis, *values, N={"i": len(values)}, T={"type": FLOAT})

    def head(self, x="ExpandDims", side=299):
        """Adds what is before the first convolution, the resize to `side` and the shift; returns the last node."""
        floats = {"T": {"type": FLOAT}}
        self.node("DecodeJpeg/contents", "Placeholder", dtype={"type": STRING})
        self.node("DecodeJpeg", "DecodeJpeg", "DecodeJpeg/contents", channels={"i": 3})
        self.node("Cast", "Cast", "DecodeJpeg", SrcT={"type": UINT8}, DstT={"type": FLOAT})
        self.constant("ExpandDims/dim", np.int32(0))
        self.node("ExpandDims", "ExpandDims", "Cast", "ExpandDims/dim", Tdim={"type": INT}, **floats)
        return self.resize(x, side, 128, 1 / 128)

    def tail(self, x, features, classes):
        """Adds the classifier behind the pooled features (1, 1, 1, features); returns its node of probabilities."""
        weights = self.drawn(features, classes, std=0.5 / features**0.5)
        return self.classes(x, weights, self.drawn(classes), images=1)


def inception_v3(path, narrower=1, seed=0):
    """Writes a graph of random weights with the 94 convolutions of the original; returns the path.

    narrower: what all numbers of channels are divided by; 1 makes the file of 95 MB.
    """
    file = GraphFile(seed)
    channels = {file.head(): 3}

    def convolution(name, x, c_out, *size, stride=1, padding=b"SAME"):
        c_out = max(c_out // narrower, 1)
        size = size or (1, 1)
        channels[name] = c_out
        return file.random_convolution(name, x, channels[x], c_out, size, stride, b"VALID" if stride == 2 else padding)

    def pool(name, x, op="AvgPool", stride=1):
        channels[name] = channels[x]
        return file.pool(name, op, x, 3, stride, b"VALID" if stride == 2 else b"SAME")

    def join(name, *values):
        channels[f"{name}/join"] = sum(channels[value] for value in values)
        return file.concat(f"{name}/join", *values)

    def chain(prefix, x, *layers):
        """Convolutions prefix/conv, prefix/conv_1 ... one after the other, each (channels, height, width[, stride])."""
        for number, (c_out, height, width, *stride) in enumerate(layers):
            name = f"{prefix}/conv_{number}" if number else f"{prefix}/conv"
            x = convolution(name, x, c_out, height, width, stride=stride[0] if stride else 1)
        return x

    x = convolution("conv", "Mul", 32, 3, 3, stride=2)
    x = convolution("conv_1", x, 32, 3, 3, padding=b"VALID")
    x = convolution("conv_2", x, 64, 3, 3)
    x = pool("pool", x, "MaxPool", 2)
    x = convolution("conv_3", x, 80, padding=b"VALID")
    x = convolution("conv_4", x, 192, 3, 3, padding=b"VALID")
    x = pool("pool_1", x, "MaxPool", 2)
    for block, pooled in (("mixed", 32), ("mixed_1", 64), ("mixed_2", 64)):  # 35 x 35
        x = join(
            block,
            convolution(f"{block}/conv", x, 64),
            chain(f"{block}/tower", x, (48, 1, 1), (64, 5, 5)),
            chain(f"{block}/tower_1", x, (64, 1, 1), (96, 3, 3), (96, 3, 3)),
            convolution(f"{block}/tower_2/conv", pool(f"{block}/tower_2/pool", x), pooled),
        )
    x = join(
        "mixed_3",
        convolution("mixed_3/conv", x, 384, 3, 3, stride=2),
        chain("mixed_3/tower", x, (64, 1, 1), (96, 3, 3), (96, 3, 3, 2)),
        pool("mixed_3/pool", x, "MaxPool", 2),
    )
    for block, c in (("mixed_4", 128), ("mixed_5", 160), ("mixed_6", 160), ("mixed_7", 192)):  # 17 x 17
        x = join(
            block,
            convolution(f"{block}/conv", x, 192),
            chain(f"{block}/tower", x, (c, 1, 1), (c, 1, 7), (192, 7, 1)),
            chain(f"{block}/tower_1", x, (c, 1, 1), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7)),
            convolution(f"{block}/tower_2/conv", pool(f"{block}/tower_2/pool", x), 192),
        )
    x = join(
        "mixed_8",
        chain("mixed_8/tower", x, (192, 1, 1), (320, 3, 3, 2)),
        chain("mixed_8/tower_1", x, (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3, 2)),
        pool("mixed_8/pool", x, "MaxPool", 2),
    )
    for block, op in (("mixed_9", "AvgPool"), ("mixed_10", "MaxPool")):  # 8 x 8
        one = convolution(f"{block}/tower/conv", x, 384)
        two = chain(f"{block}/tower_1", x, (448, 1, 1), (384, 3, 3))
        x = join(
            block,
            convolution(f"{block}/conv", x, 320),
            *(convolution(f"{block}/tower/mixed/conv{end}", one, 384, *size) for end, size in ENDS),
            *(convolution(f"{block}/tower_1/mixed/conv{end}", two, 384, *size) for end, size in ENDS),
            convolution(f"{block}/tower_2/conv", pool(f"{block}/tower_2/pool", x, op), 192),
        )
    file.tail(file.pool("pool_3", "AvgPool", x, 8, 1, b"VALID"), channels[x], 1008)
    return file.save(path)
