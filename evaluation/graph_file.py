"""TensorFlow's frozen graph files, read and written with `protobuf` alone: their messages and nodes.

The file holds a GraphDef: nodes with a name, an operation, inputs and attributes; the weights are nodes too.
"""

import functools
from math import prod
from pathlib import Path

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from runtime.errors import UserError
from runtime.files import atomic_write

# TensorFlow's messages as far as a frozen graph needs them: field, number, type; "*" marks repeated fields.
MESSAGES = {
    "GraphDef": "node 1 NodeDef*, versions 4 VersionDef",
    "VersionDef": "producer 1 int32",
    "NodeDef": "name 1 string, op 2 string, input 3 string*, attr 5 Attr*",
    "Attr": "key 1 string, value 2 AttrValue",  # a map is such pairs
    "AttrValue": "list 1 List, s 2 bytes, i 3 int64, f 4 float, b 5 bool, type 6 int32, shape 7 Shape, tensor 8 Tensor",
    "List": "s 2 bytes*, i 3 int64*, f 4 float*, b 5 bool*, type 6 int32*",
    "Shape": "dim 2 Dim*, unknown_rank 3 bool",
    "Dim": "size 1 int64",
    "Tensor": "dtype 1 int32, tensor_shape 2 Shape, tensor_content 4 bytes, float_val 5 float*, double_val 6 double*, "
    "int_val 7 int32*, int64_val 10 int64*, bool_val 11 bool*",
}
# The numbers of TensorFlow's types: NumPy's name, and the field that holds values which are not in `tensor_content`.
DTYPES = {
    1: ("float32", "float_val"),
    2: ("float64", "double_val"),
    3: ("int32", "int_val"),
    4: ("uint8", "int_val"),
    9: ("int64", "int64_val"),
    10: ("bool", "bool_val"),
}
FLOAT, INT = 1, 3  # those that are written


@functools.cache
def message_classes():
    """The classes of `MESSAGES`, name to class. They know nothing of TensorFlow's own, and may live beside them."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="graph.proto", package="graph", syntax="proto3")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        if name == "AttrValue":  # one of its fields is set; being one of several, it is written even where it is 0
            message.oneof_decl.add(name="value")
        for text in fields.split(", "):
            field, number, kind = text.split()
            label = kinds.LABEL_REPEATED if kind.endswith("*") else kinds.LABEL_OPTIONAL
            kind = kind.removesuffix("*")
            added = message.field.add(name=field, number=int(number), label=label)
            if kind in MESSAGES:
                added.type, added.type_name = kinds.TYPE_MESSAGE, f".graph.{kind}"
            else:
                added.type = kinds.Type.Value(f"TYPE_{kind.upper()}")
            if name == "AttrValue":
                added.oneof_index = 0
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"graph.{name}")) for name in MESSAGES}


def read_bytes(path):
    """The bytes of a file. Raises UserError where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def read_nodes(path):
    """The nodes of the GraphDef in the file at `path`, name to `Node`. Raises UserError where it is no such file."""
    refused = UserError(f"{path} is not a TensorFlow graph, or is cut off: fetch it again")
    try:
        graph = message_classes()["GraphDef"].FromString(read_bytes(path))
    except DecodeError as error:
        raise refused from error
    nodes = {message.name: Node(message, path) for message in graph.node}
    # Other files may pass for a message of fields that we do not know.
    if not nodes or len(nodes) < len(graph.node) or not all(node.name and node.op for node in nodes.values()):
        raise refused
    return nodes


class Node:
    """A node of the graph: name, op, the names of the nodes it reads, attributes."""

    def __init__(self, message, path):
        self.name, self.op, self._path = message.name, message.op, path
        # "name:0" is a node's first output; "^name" asks that a node runs before, and hands over nothing.
        self.inputs = [source.removesuffix(":0") for source in message.input if not source.startswith("^")]
        self.attrs = {attr.key: attr.value for attr in message.attr}

    def fault(self, text):
        """The UserError that says `text` of this node."""
        return UserError(f"{self._path}: node {self.name} ({self.op}) {text}")

    def read(self, count):
        """The names of its `count` inputs. Raises UserError where there are fewer or more."""
        if len(self.inputs) != count:
            raise self.fault(f"has {len(self.inputs)} inputs, not {count}: the file is damaged")
        return self.inputs

    def attr(self, name, field, default=None):
        """The attribute's `field` (as in AttrValue); the default where there is none. Raises UserError without both."""
        if name in self.attrs and self.attrs[name].HasField(field):
            return getattr(self.attrs[name], field)
        if default is None:
            raise self.fault(f"has no attribute {name}: the file is damaged")
        return default

    def sides(self, name):
        """Height and width of an attribute [1, height, width, 1]."""
        values = list(self.attr(name, "list").i)
        if len(values) != 4 or values[0] != 1 or values[3] != 1 or min(values) < 1:
            raise self.fault(f"has {name} {values}: only [1, height, width, 1] is known")
        return values[1:3]

    def is_same(self):
        """Whether its padding is SAME, and not VALID. Raises UserError for another one, or channels before rows."""
        padding, layout = self.attr("padding", "s"), self.attr("data_format", "s", b"NHWC")
        if padding not in (b"SAME", b"VALID") or layout != b"NHWC":
            raise self.fault(f"has padding {padding!r} and layout {layout!r}: only SAME or VALID of NHWC is known")
        return padding == b"SAME"

    def constant(self):
        """The array of a Const node. Raises UserError where it is another node, or its values are not all there."""
        if self.op != "Const":
            raise self.fault("is not a constant, where only constants are known")
        tensor = self.attr("value", "tensor")
        if tensor.dtype not in DTYPES:
            raise self.fault(f"has values of type {tensor.dtype}: known are {', '.join(t for t, _ in DTYPES.values())}")
        dtype, field = DTYPES[tensor.dtype]
        shape = [dim.size for dim in tensor.tensor_shape.dim]
        try:
            if tensor.tensor_content:
                values = np.frombuffer(tensor.tensor_content, np.dtype(dtype).newbyteorder("<")).astype(dtype)
            else:
                values = np.array(getattr(tensor, field), dtype)
                if len(values) < prod(shape):  # the last one stands for all that follow
                    values = np.pad(values, (0, prod(shape) - len(values)), "edge" if len(values) else "constant")
            if min(shape, default=1) < 0:  # NumPy would find out which number was meant
                raise ValueError
            return values.reshape(shape)
        except ValueError as error:
            raise self.fault(f"does not hold the values of its shape {shape}: the file is damaged") from error


class GraphWriter:
    """A graph in the making: each method adds nodes, and returns the name of the last one. No random numbers here.

    A node reads others by their names. Attributes are given as the fields of AttrValue: T={"type": FLOAT}.
    producer: the version that the file names; newer ones than 8 have no BatchNormWithGlobalNormalization.
    """

    def __init__(self, producer=8):
        self.message = message_classes()["GraphDef"](versions={"producer": producer})

    def node(self, name, op, *inputs, **attrs):
        """Adds any node."""
        pairs = [{"key": key, "value": value} for key, value in attrs.items()]
        self.message.node.add(name=name, op=op, input=inputs, attr=pairs)
        return name

    def constant(self, name, values):
        """Adds an array of any shape: float32, or int32 where it holds whole numbers."""
        values = np.asarray(values)
        number, dtype = {"f": (FLOAT, "<f4"), "i": (INT, "<i4")}[values.dtype.kind]
        shape = {"dim": [{"size": size} for size in values.shape]}
        tensor = {"dtype": number, "tensor_shape": shape, "tensor_content": values.astype(dtype).tobytes()}
        return self.node(name, "Const", dtype={"type": number}, value={"tensor": tensor})

    def resize(self, x, side, shift, scale):
        """Adds ResizeBilinear of x (N, H, W, C) to `side` pixels, minus `shift`, times `scale`: the node is Mul."""
        floats = {"T": {"type": FLOAT}}
        size = self.constant("ResizeBilinear/size", np.array([side, side]))
        x = self.node("ResizeBilinear", "ResizeBilinear", x, size, align_corners={"b": False}, **floats)
        x = self.node("Sub", "Sub", x, self.constant("Sub/y", float(shift)), **floats)
        return self.node("Mul", "Mul", x, self.constant("Mul/y", float(scale)), **floats)

    def convolution(
        self, name, x, kernel, beta, gamma, mean, variance, *, stride=1, padding=b"SAME", epsilon=1e-3, scaled=True
    ):
        """Adds Conv2D, batch norm, the check for NaN and Relu, named as in the graph of 2015.

        kernel: (height, width, C_in, C_out); the batch norm's four arrays: (C_out,).
        epsilon: what is added to the variance. scaled: whether gamma is used.
        """
        floats = {"T": {"type": FLOAT}}
        kernel = self.constant(f"{name}/conv2d_params", kernel)
        strides = {"list": {"i": [1, stride, stride, 1]}}
        x = self.node(f"{name}/Conv2D", "Conv2D", x, kernel, strides=strides, padding={"s": padding}, **floats)
        norm = f"{name}/batchnorm"
        arrays = {"moving_mean": mean, "moving_variance": variance, "beta": beta, "gamma": gamma}
        moments = [self.constant(f"{norm}/{moment}", values) for moment, values in arrays.items()]
        attrs = {"variance_epsilon": {"f": epsilon}, "scale_after_normalization": {"b": scaled}}
        self.node(norm, "BatchNormWithGlobalNormalization", x, *moments, **attrs, **floats)
        check = self.node(f"{name}/CheckNumerics", "CheckNumerics", norm, message={"s": b"not finite"}, **floats)
        x = self.node(f"{name}/control_dependency", "Identity", norm, f"^{check}", **floats)
        return self.node(name, "Relu", x, **floats)

    def pool(self, name, op, x, size=3, stride=1, padding=b"SAME"):
        """Adds AvgPool or MaxPool of x (N, H, W, C) over windows of size x size; returns the node's name."""
        sides = {key: {"list": {"i": [1, side, side, 1]}} for key, side in (("ksize", size), ("strides", stride))}
        return self.node(name, op, x, **sides, padding={"s": padding}, T={"type": FLOAT})

    def classes(self, x, weights, biases=None, images=-1):
        """Adds the classes' probabilities behind pooled features x (N, 1, 1, C): the node is softmax.

        weights: (C, classes); biases: (classes,). images: the N that the graph is declared for, -1 for any.
        """
        floats, turns = {"T": {"type": FLOAT}}, {"transpose_a": {"b": False}, "transpose_b": {"b": False}}
        shape = self.constant("pool_3/_reshape/shape", np.array([images, len(weights)]))
        x = self.node("pool_3/_reshape", "Reshape", x, shape, Tshape={"type": INT}, **floats)
        weights = self.constant("softmax/weights", weights)
        x = self.node("softmax/logits/MatMul", "MatMul", x, weights, **turns, **floats)
        if biases is not None:
            x = self.node("softmax/logits", "BiasAdd", x, self.constant("softmax/biases", biases), **floats)
        return self.node("softmax", "Softmax", x, **floats)

    def save(self, path):
        """Writes the file, whole or not at all; returns its path. Raises UserError where it cannot be written."""
        with atomic_write(path) as part:
            part.write_bytes(self.message.SerializeToString())
        return Path(path)
