"""TensorFlow's frozen graph files: their messages, parsed with `protobuf` alone, and their nodes.

The file holds a GraphDef: nodes with a name, an operation, inputs and attributes; the weights are nodes too.
"""

import functools
from math import prod
from pathlib import Path

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from files import UserError

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
