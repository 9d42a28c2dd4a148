"""Graph files with random weights, among them one with the structure of the Inception v3 graph of 2015."""

import numpy as np

from evaluation.graph_file import FLOAT, FLOATS, INT, GraphWriter

UINT8, STRING = 4, 7  # TensorFlow's numbers of the other types that occur


class RandomGraph(GraphWriter):
    """A `GraphWriter` that draws weights."""

    def __init__(self, seed=0, producer=8):
        super().__init__(producer)
        self.random = np.random.default_rng(seed)

    def normal(self, *shape, std=1.0, mean=0.0):
        """Random float32 values."""
        return self.random.standard_normal(shape, np.float32) * np.float32(std) + np.float32(mean)

    def random_convolution(self, name, x, c_in, c_out, size=(1, 1), stride=1, padding=b"SAME"):
        """Add `convolution` with weights that keep the variance of x, and a batch norm that is not the identity."""
        kernel = self.normal(*size, c_in, c_out, std=(2 / (size[0] * size[1] * c_in)) ** 0.5)
        beta, gamma, mean = (self.normal(c_out, std=0.1, mean=mean) for mean in (0, 1, 0))
        moments = beta, gamma, mean, self.random.uniform(0.5, 1.5, c_out)
        return self.convolution(name, x, kernel, *moments, stride=stride, padding=padding, scaled=False)

    def head(self, side=299):
        """Add the nodes before the first convolution: decoding, the resize to `side`, and the shift."""
        self.node("DecodeJpeg/contents", "Placeholder", dtype={"type": STRING})
        self.node("DecodeJpeg", "DecodeJpeg", "DecodeJpeg/contents", channels={"i": 3})
        self.node("Cast", "Cast", "DecodeJpeg", SrcT={"type": UINT8}, DstT={"type": FLOAT})
        self.constant("ExpandDims/dim", np.int32(0))
        self.node("ExpandDims", "ExpandDims", "Cast", "ExpandDims/dim", Tdim={"type": INT}, **FLOATS)
        return self.resize("ExpandDims", side, 128, 1 / 128)

    def tail(self, x, features, classes):
        """Add the classifier of pooled features x (1, 1, 1, features)."""
        weights = self.normal(features, classes, std=0.5 / features**0.5)
        return self.classes(x, weights, self.normal(classes), images=1)


def inception_v3(path, narrower=1, seed=0):
    """Write a graph with random weights and the 94 convolutions of the original; return `path`.

    narrower: divides all numbers of channels; 1 makes a file of 95 MB.
    """
    graph = RandomGraph(seed)
    channels = {graph.head(): 3}

    def convolution(name, x, c_out, height, width, stride=1, padding=b"SAME"):
        channels[name] = max(c_out // narrower, 1)
        padding = b"VALID" if stride == 2 else padding
        return graph.random_convolution(name, x, channels[x], channels[name], (height, width), stride, padding)

    def pool(name, x, op, stride):
        channels[name] = channels[x]
        return graph.pool(name, op, x, 3, stride, b"VALID" if stride == 2 else b"SAME")

    def mixed(name, x, *towers, pooled=None, forked=False, op="AvgPool"):
        """A block: towers of layers (channels, height, width[, stride]) and a pool of x, side by side.

        pooled: channels of a convolution after the pool; None is a maximum pool of stride 2 and no convolution.
        forked: whether all towers but the first end in a pair of convolutions, 1x3 and 3x1.
        """
        values = []
        for prefix, layers in zip((name, f"{name}/tower", f"{name}/tower_1"), towers):
            value = x
            for number, layer in enumerate(layers):
                value = convolution(f"{prefix}/conv_{number}".removesuffix("_0"), value, *layer)
            if forked and prefix != name:
                values.append(convolution(f"{prefix}/mixed/conv", value, 384, 1, 3))
                value = convolution(f"{prefix}/mixed/conv_1", value, 384, 3, 1)
            values += [value] if layers else []
        if pooled:
            value = pool(f"{name}/tower_2/pool", x, op, 1)
            values.append(convolution(f"{name}/tower_2/conv", value, pooled, 1, 1))
        else:
            values.append(pool(f"{name}/pool", x, "MaxPool", 2))
        channels[f"{name}/join"] = sum(channels[value] for value in values)
        axis = graph.constant(f"{name}/join/concat_dim", np.int32(3))  # the old Concat: the axis comes first
        return graph.node(f"{name}/join", "Concat", axis, *values, N={"i": len(values)}, **FLOATS)

    x = convolution("conv", "Mul", 32, 3, 3, 2)
    x = convolution("conv_1", x, 32, 3, 3, padding=b"VALID")
    x = pool("pool", convolution("conv_2", x, 64, 3, 3), "MaxPool", 2)
    x = convolution("conv_3", x, 80, 1, 1, padding=b"VALID")
    x = pool("pool_1", convolution("conv_4", x, 192, 3, 3, padding=b"VALID"), "MaxPool", 2)
    for name, pooled in (("mixed", 32), ("mixed_1", 64), ("mixed_2", 64)):  # 35 x 35
        towers = [(64, 1, 1)], [(48, 1, 1), (64, 5, 5)], [(64, 1, 1), (96, 3, 3), (96, 3, 3)]
        x = mixed(name, x, *towers, pooled=pooled)
    x = mixed("mixed_3", x, [(384, 3, 3, 2)], [(64, 1, 1), (96, 3, 3), (96, 3, 3, 2)])
    for name, c in (("mixed_4", 128), ("mixed_5", 160), ("mixed_6", 160), ("mixed_7", 192)):  # 17 x 17
        long = [(c, 1, 1), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7)]
        x = mixed(name, x, [(192, 1, 1)], [(c, 1, 1), (c, 1, 7), (192, 7, 1)], long, pooled=192)
    last = [(192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3, 2)]
    x = mixed("mixed_8", x, [], [(192, 1, 1), (320, 3, 3, 2)], last)
    for name, op in (("mixed_9", "AvgPool"), ("mixed_10", "MaxPool")):  # 8 x 8
        towers = [(320, 1, 1)], [(384, 1, 1)], [(448, 1, 1), (384, 3, 3)]
        x = mixed(name, x, *towers, pooled=192, forked=True, op=op)
    graph.tail(graph.pool("pool_3", "AvgPool", x, 8, 1, b"VALID"), channels[x], 1008)
    return graph.save(path)
