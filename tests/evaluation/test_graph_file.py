"""graph_file.py: what is written is what is read. What the operations do is tested with inception.py."""

import numpy as np
import pytest

from evaluation.graph_file import FLOAT, GraphWriter, message_classes, read_nodes
from runtime.errors import UserError


def test_nodes_and_constants_are_read_as_they_were_written(tmp_path):
    arrays = {
        "float32": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
        "float64": np.array([0.1, -np.inf]),
        "int64": np.array([[-1], [2**31 - 1]]),
        "scalar": np.float32(0.5),
        "empty": np.zeros((0, 4), np.float32),
    }
    graph = GraphWriter()
    for name, array in arrays.items():
        assert graph.constant(name, array) == name
    attrs = {
        "ksize": {"list": {"i": [1, 2, 3, 1]}},
        "padding": {"s": b"SAME"},
        "zero": {"f": 0.0},
        "T": {"type": FLOAT},
    }
    assert graph.node("x/y", "Any", "scalar", "float32:0", "^empty", **attrs) == "x/y"
    path = graph.save(tmp_path / "new" / "graph.pb")
    nodes = read_nodes(path)
    assert list(nodes) == [*arrays, "x/y"]
    for name, array in arrays.items():
        read = nodes[name].constant()
        assert read.dtype == (np.int32 if name == "int64" else np.float32) and read.shape == array.shape
        assert np.array_equal(read, array.astype(read.dtype))
    node = nodes["x/y"]
    assert (node.op, node.inputs) == ("Any", ["scalar", "float32"])
    assert node.sides("ksize") == [2, 3] and node.is_same()
    assert node.attr("zero", "f") == 0 and node.attr("T", "type") == FLOAT
    assert message_classes()["GraphDef"].FromString(path.read_bytes()).versions.producer == 8
    assert [file.name for file in path.parent.iterdir()] == ["graph.pb"]


def test_a_convolution_has_the_nodes_of_the_graph_of_2015(tmp_path):
    graph = GraphWriter()
    x = graph.node("ExpandDims", "Placeholder", dtype={"type": FLOAT})
    moments = {name: np.full(2, value) for value, name in enumerate(("beta", "gamma", "mean", "variance"))}
    assert graph.convolution("a/b", x, np.ones((1, 1, 3, 2)), **moments, epsilon=0.25, scaled=False) == "a/b"
    nodes = read_nodes(graph.save(tmp_path / "graph.pb"))
    chain = {"a/b": "Relu", "a/b/control_dependency": "Identity", "a/b/batchnorm": "BatchNormWithGlobalNormalization"}
    chain |= {"a/b/Conv2D": "Conv2D", "ExpandDims": "Placeholder"}
    name = "a/b"
    for expected, op in chain.items():
        assert (name, nodes[name].op) == (expected, op)
        name = nodes[name].inputs[0] if nodes[name].inputs else None
    norm = nodes["a/b/batchnorm"]
    assert (norm.attr("variance_epsilon", "f"), norm.attr("scale_after_normalization", "b")) == (0.25, False)
    # In the order in which the operation takes them: mean, variance, beta, gamma.
    assert [nodes[moment].constant()[0] for moment in norm.inputs[1:]] == [2, 3, 0, 1]


def test_what_cannot_be_written_is_refused(tmp_path):
    graph = GraphWriter()
    graph.constant("x", 1.0)
    with pytest.raises(UserError, match="cannot write") as error:
        graph.save(tmp_path)
    assert "\n" not in str(error.value)
