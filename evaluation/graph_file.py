"""TensorFlow's frozen graph files, read and written without TensorFlow.

The file holds a GraphDef: nodes with a name, an operation, inputs and attributes. Weights are nodes too.
"""

import functools
from math import prod
from pathlib import Path

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from runtime.errors import UserError
from runtime.files import atomic_write

# The parts of TensorFlow's messages that a frozen graph needs: field, number, type; "*" marks repeated fields.
MESSAGES = {
    "GraphDef": "node 1 NodeDef*, versions 4 VersionDef",
    "VersionDef": "producer 1 int32",
    "NodeDef": "name 1 string, op 2 string, input 3 string*, attr 5 Attr*",
    "Attr": "key 1 string, value 2 AttrValue",  # protobuf stores a map as such pairs
    "AttrValue": "list 1 List, s 2 bytes, i 3 int64, f 4 float, b 5 bool, type 6 int32, shape 7 Shape, tensor 8 Tensor",
    "List": "s 2 bytes*, i 3 int64*, f 4 float*, b 5 bool*, type 6 int32*",
    "Shape": "dim 2 Dim*, unknown_rank 3 bool",
    "Dim": "size 1 int64",
    "Tensor": "dtype 1 int32, tensor_shape 2 Shape, tensor_content 4 bytes, float_val 5 float*, double_val 6 double*, "
    "int_val 7 int32*, int64_val 10 int64*, bool_val 11 bool*",
}
# TensorFlow's number of a type: NumPy's name, and the field of values that are not in `tensor_content`.
DTYPES = {
    1: ("float32", "float_val"),
    2: ("float64", "double_val"),
    3: ("int32", "int_val"),
    4: ("uint8", "int_val"),
    9: ("int64", "int64_val"),
    10: ("bool", "bool_val"),
}
REPEATED = 2**24  # most bytes of a constant that a graph gives as a value to repeat: a small file could fill the memory
FLOAT, INT = 1, 3  # the types that `GraphWriter` writes
FLOATS = {"T": {"type": FLOAT}}  # the attribute of operations on float32


@functools.cache
def message_classes():
    """{name: class} of `MESSAGES`, in a pool of their own so that they do not clash with TensorFlow's."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="graph.proto", package="graph", syntax="proto3")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        if name == "AttrValue":  # as a member of a oneof, a field is written even if it is 0
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


def read_nodes(path):
    """{name: Node} of the graph file at `path`. Raises UserError if it is not a graph file."""
    not_a_graph = UserError(f"{path} is not a TensorFlow graph, or is cut off: fetch it again")
    try:
        graph = message_classes()["GraphDef"].FromString(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except DecodeError as error:
        raise not_a_graph from error
    nodes = {message.name: Node(message, path) for message in graph.node}
    # Other files may parse as a message of unknown fields.
    if not nodes or len(nodes) < len(graph.node) or not all(node.name and node.op for node in nodes.values()):
        raise not_a_graph
    return nodes


class Node:
    """A node of the graph: name, op, inputs (names of the nodes that it reads), attrs."""

    def __init__(self, message, path):
        self.name, self.op, self._path = message.name, message.op, path
        # "name:0" is a node's first output; "^name" only demands that a node runs before this one.
        self.inputs = [source.removesuffix(":0") for source in message.input if not source.startswith("^")]
        self.attrs = {attr.key: attr.value for attr in message.attr}

    def fault(self, text):
        """A UserError about this node; text: continues a sentence that starts with the node."""
        return UserError(f"{self._path}: node {self.name} ({self.op}) {text}")

    def take_inputs(self, count):
        """The names of its inputs. Raises UserError if there are not `count` of them."""
        if len(self.inputs) != count:
            raise self.fault(f"has {len(self.inputs)} inputs, not {count}: the file is damaged")
        return self.inputs

    def attr(self, name, field, default=None):
        """The attribute's `field` of AttrValue, or the default. Raises UserError if there is neither."""
        if name in self.attrs and self.attrs[name].HasField(field):
            return getattr(self.attrs[name], field)
        if default is None:
            raise self.fault(f"has no attribute {name}: the file is damaged")
        return default

    def sides(self, name):
        """Height and width of an attribute [1, height, width, 1]. Raises UserError for other values."""
        values = list(self.attr(name, "list").i)
        if len(values) != 4 or values[0] != 1 or values[3] != 1 or min(values) < 1:
            raise self.fault(f"has {name} {values}: only [1, height, width, 1] is supported")
        return values[1:3]

    def has_same_padding(self):
        """True for padding SAME, False for VALID. Raises UserError for other paddings, and for channels before rows."""
        padding, layout = self.attr("padding", "s"), self.attr("data_format", "s", b"NHWC")
        if padding not in (b"SAME", b"VALID") or layout != b"NHWC":
            raise self.fault(f"has padding {padding!r} and layout {layout!r}: only SAME or VALID of NHWC is supported")
        return padding == b"SAME"

    def constant(self):
        """The array of a Const node. Raises UserError for other nodes, and if values are missing."""
        if self.op != "Const":
            raise self.fault("is not a constant, and must be one here")
        tensor = self.attr("value", "tensor")
        if tensor.dtype not in DTYPES:
            names = ", ".join(name for name, _ in DTYPES.values())
            raise self.fault(f"has values of type {tensor.dtype}: only {names} are supported")
        dtype, field = DTYPES[tensor.dtype]
        shape = [dim.size for dim in tensor.tensor_shape.dim]
        try:
            if tensor.tensor_content:
                values = np.frombuffer(tensor.tensor_content, np.dtype(dtype).newbyteorder("<")).astype(dtype)
            elif min(shape, default=1) < 0 or prod(shape) * np.dtype(dtype).itemsize > REPEATED:
                raise ValueError
            else:
                values = np.array(getattr(tensor, field), dtype)
                if len(values) < prod(shape):  # the last value is repeated
                    values = np.pad(values, (0, prod(shape) - len(values)), "edge" if len(values) else "constant")
            if min(shape, default=1) < 0:  # reshape would infer it
                raise ValueError
            return values.reshape(shape)
        except ValueError as error:
            raise self.fault(f"does not hold the values of its shape {shape}: the file is damaged") from error


class GraphWriter:
    """Builds a graph file: each method adds nodes and returns the name of the last one.

    Nodes refer to others by name. Attributes are fields of AttrValue: T={"type": FLOAT}.
    producer: version number in the file; above 8, TensorFlow refuses BatchNormWithGlobalNormalization.
    """

    def __init__(self, producer=8):
        self.message = message_classes()["GraphDef"](versions={"producer": producer})

    def node(self, name, op, *inputs, **attrs):
        """Add any node."""
        pairs = [{"key": key, "value": value} for key, value in attrs.items()]
        self.message.node.add(name=name, op=op, input=inputs, attr=pairs)
        return name

    def constant(self, name, values):
        """Add an array of any shape, as int32 if it holds whole numbers, else as float32."""
        values = np.asarray(values)
        number, dtype = {"f": (FLOAT, "<f4"), "i": (INT, "<i4")}[values.dtype.kind]
        shape = {"dim": [{"size": size} for size in values.shape]}
        tensor = {"dtype": number, "tensor_shape": shape, "tensor_content": values.astype(dtype).tobytes()}
        return self.node(name, "Const", dtype={"type": number}, value={"tensor": tensor})

    def resize(self, x, side, shift, scale):
        """Add ResizeBilinear of x (N, H, W, C) to `side` x `side` pixels, minus `shift`, times `scale`."""
        size = self.constant("ResizeBilinear/size", np.array([side, side]))
        x = self.node("ResizeBilinear", "ResizeBilinear", x, size, align_corners={"b": False}, **FLOATS)
        x = self.node("Sub", "Sub", x, self.constant("Sub/y", float(shift)), **FLOATS)
        return self.node("Mul", "Mul", x, self.constant("Mul/y", float(scale)), **FLOATS)

    def convolution(
        self, name, x, kernel, beta, gamma, mean, variance, *, stride=1, padding=b"SAME", epsilon=1e-3, scaled=True
    ):
        """Add Conv2D, batch norm, the check for NaN and Relu, named as in the graph of 2015.

        kernel: (height, width, C_in, C_out); beta to variance: the batch norm's arrays (C_out,); epsilon is added to
        the variance, and gamma is used if `scaled`.
        """
        kernel = self.constant(f"{name}/conv2d_params", kernel)
        strides = {"list": {"i": [1, stride, stride, 1]}}
        x = self.node(f"{name}/Conv2D", "Conv2D", x, kernel, strides=strides, padding={"s": padding}, **FLOATS)
        norm = f"{name}/batchnorm"
        arrays = {"moving_mean": mean, "moving_variance": variance, "beta": beta, "gamma": gamma}
        moments = [self.constant(f"{norm}/{moment}", values) for moment, values in arrays.items()]
        attrs = {"variance_epsilon": {"f": epsilon}, "scale_after_normalization": {"b": scaled}}
        self.node(norm, "BatchNormWithGlobalNormalization", x, *moments, **attrs, **FLOATS)
        check = self.node(f"{name}/CheckNumerics", "CheckNumerics", norm, message={"s": b"not finite"}, **FLOATS)
        x = self.node(f"{name}/control_dependency", "Identity", norm, f"^{check}", **FLOATS)
        return self.node(name, "Relu", x, **FLOATS)

    def pool(self, name, op, x, size=3, stride=1, padding=b"SAME"):
        """Add the pooling `op`, AvgPool or MaxPool, of x (N, H, W, C) over windows of size x size."""
        sides = {key: {"list": {"i": [1, side, side, 1]}} for key, side in (("ksize", size), ("strides", stride))}
        return self.node(name, op, x, **sides, padding={"s": padding}, **FLOATS)

    def classes(self, x, weights, biases=None, images=-1):
        """Add the class probabilities of pooled features x (N, 1, 1, C).

        weights: (C, classes); biases: (classes,). images: the N that the graph is declared for, -1 for any.
        """
        transpose = {f"transpose_{side}": {"b": False} for side in "ab"}
        shape = self.constant("pool_3/_reshape/shape", np.array([images, len(weights)]))
        x = self.node("pool_3/_reshape", "Reshape", x, shape, Tshape={"type": INT}, **FLOATS)
        weights = self.constant("softmax/weights", weights)
        x = self.node("softmax/logits/MatMul", "MatMul", x, weights, **transpose, **FLOATS)
        if biases is not None:
            x = self.node("softmax/logits", "BiasAdd", x, self.constant("softmax/biases", biases), **FLOATS)
        return self.node("softmax", "Softmax", x, **FLOATS)

    def save(self, path):
        """Write the file, whole or not at all; return its path. Raises UserError if it cannot be written."""
        with atomic_write(path) as part:
            part.write_bytes(self.message.SerializeToString())
        return Path(path)
