"""Graph files to test with: any nodes, and random weights in the structure of the Inception v3 graph of 2015."""

from pathlib import Path

import numpy as np

from graph_file import message_classes

FLOAT, INT, UINT8, STRING = 1, 3, 4, 7  # TensorFlow's numbers of the types that occur
NUMBERS = {"float32": FLOAT, "int32": INT}
ENDS = ("", (1, 3)), ("_1", (3, 1))  # the pairs of convolutions in which the last towers end: of the name, size


class GraphFile:
    """A GraphDef in the making. Attributes are given as the fields of AttrValue: T={"type": FLOAT}."""

    def __init__(self, seed=0, producer=8):
        self.message = message_classes()["GraphDef"](versions={"producer": producer})
        self.random = np.random.default_rng(seed)

    def node(self, name, op, *inputs, **attrs):
        """Adds a node; returns its name."""
        pairs = [{"key": key, "value": value} for key, value in attrs.items()]
        self.message.node.add(name=name, op=op, input=inputs, attr=pairs)
        return name

    def constant(self, name, values):
        """Adds an array, float32 or int32, as a node; returns its name."""
        values = np.asarray(values)
        values = values.astype({"f": np.float32, "i": np.int32}[values.dtype.kind])
        dtype, shape = NUMBERS[values.dtype.name], {"dim": [{"size": size} for size in values.shape]}
        tensor = {"dtype": dtype, "tensor_shape": shape, "tensor_content": values.tobytes()}
        return self.node(name, "Const", dtype={"type": dtype}, value={"tensor": tensor})

    def normal(self, name, *shape, std=1.0, mean=0.0):
        """Adds random float32 values; returns the node's name."""
        return self.constant(name, self.random.standard_normal(shape, np.float32) * np.float32(std) + np.float32(mean))

    def convolution(self, name, x, c_in, c_out, size=(1, 1), stride=1, padding=b"SAME", scaled=False):
        """Adds Conv2D, batch norm, the check and Relu under the names of the original; returns the last.

        The weights keep the variance of what goes through; the moments are such that batch norm does something.
        """
        self.normal(f"{name}/conv2d_params", *size, c_in, c_out, std=(2 / (size[0] * size[1] * c_in)) ** 0.5)
        strides = {"list": {"i": [1, stride, stride, 1]}}
        floats = {"T": {"type": FLOAT}}
        self.node(
            f"{name}/Conv2D", "Conv2D", x, f"{name}/conv2d_params", strides=strides, padding={"s": padding}, **floats
        )
        norm = f"{name}/batchnorm"
        self.normal(f"{norm}/beta", c_out, std=0.1)
        self.normal(f"{norm}/gamma", c_out, std=0.1, mean=1.0)
        self.normal(f"{norm}/moving_mean", c_out, std=0.1)
        self.constant(f"{norm}/moving_variance", self.random.uniform(0.5, 1.5, c_out))
        moments = [f"{norm}/{moment}" for moment in ("moving_mean", "moving_variance", "beta", "gamma")]
        attrs = {"variance_epsilon": {"f": 0.001}, "scale_after_normalization": {"b": scaled}}
        self.node(norm, "BatchNormWithGlobalNormalization", f"{name}/Conv2D", *moments, **attrs, **floats)
        self.node(f"{name}/CheckNumerics", "CheckNumerics", norm, message={"s": b"not finite"}, **floats)
        self.node(f"{name}/control_dependency", "Identity", norm, f"^{name}/CheckNumerics", **floats)
        return self.node(name, "Relu", f"{name}/control_dependency", **floats)

    def pool(self, name, op, x, size=3, stride=1, padding=b"SAME"):
        """Adds AvgPool or MaxPool; returns its name."""
        sides = {key: {"list": {"i": [1, side, side, 1]}} for key, side in (("ksize", size), ("strides", stride))}
        return self.node(name, op, x, **sides, padding={"s": padding}, T={"type": FLOAT})

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
        self.constant("ResizeBilinear/size", np.array([side, side], np.int32))
        self.node("ResizeBilinear", "ResizeBilinear", x, "ResizeBilinear/size", align_corners={"b": False}, **floats)
        self.constant("Sub/y", 128.0)
        self.node("Sub", "Sub", "ResizeBilinear", "Sub/y", **floats)
        self.constant("Mul/y", 1 / 128)
        return self.node("Mul", "Mul", "Sub", "Mul/y", **floats)

    def tail(self, x, features, classes):
        """Adds the classifier behind the pooled features (1, 1, 1, features); returns its node of probabilities."""
        floats = {"T": {"type": FLOAT}}
        self.constant("pool_3/_reshape/shape", np.array([1, features], np.int32))
        self.node("pool_3/_reshape", "Reshape", x, "pool_3/_reshape/shape", Tshape={"type": INT}, **floats)
        self.normal("softmax/weights", features, classes, std=0.5 / features**0.5)
        self.normal("softmax/biases", classes)
        turns = {"transpose_a": {"b": False}, "transpose_b": {"b": False}}
        self.node("softmax/logits/MatMul", "MatMul", "pool_3/_reshape", "softmax/weights", **turns, **floats)
        self.node("softmax/logits", "BiasAdd", "softmax/logits/MatMul", "softmax/biases", **floats)
        return self.node("softmax", "Softmax", "softmax/logits", **floats)

    def save(self, path):
        """Writes the file; returns its path."""
        path = Path(path)
        path.write_bytes(self.message.SerializeToString())
        return path


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
        return file.convolution(name, x, channels[x], c_out, size, stride, b"VALID" if stride == 2 else padding)

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
