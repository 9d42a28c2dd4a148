"""Graph files: what is written is read back. tests/evaluation/test_inception.py compares what operations do."""

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
    lists = {name: {"list": {"i": [1, 2, 3, 1]}} for name in ("ksize", "strides")}
    attrs = lists | {"padding": {"s": b"SAME"}, "zero": {"f": 0.0}, "T": {"type": FLOAT}}
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
    assert node.sides("ksize") == [2, 3] and node.has_same_padding()
    assert node.attr("zero", "f") == 0 and node.attr("T", "type") == FLOAT
    assert message_classes()["GraphDef"].FromString(path.read_bytes()).versions.producer == 8


@pytest.mark.parametrize("shape", [[8000, 5000], [800_000, 500_000_000], [-1, 2]])
def test_a_small_file_does_not_fill_the_memory(tmp_path, shape):
    graph, dims = GraphWriter(), [{"size": size} for size in shape]
    tensor = {"dtype": FLOAT, "float_val": [1], "tensor_shape": {"dim": dims}}
    graph.node("large", "Const", dtype={"type": FLOAT}, value={"tensor": tensor})
    with pytest.raises(UserError, match="node large .* does not hold the values of its shape"):
        read_nodes(graph.save(tmp_path / "graph.pb"))["large"].constant()


def test_constants_may_hold_values_in_place_of_bytes(tmp_path):
    """TensorFlow repeats the last value; none at all are zeros."""
    graph = GraphWriter()
    tensors = {
        "repeated": {"float_val": [2.5], "tensor_shape": {"dim": [{"size": 3}]}},
        "square": {"float_val": [1, 2], "tensor_shape": {"dim": [{"size": 2}, {"size": 2}]}},
        "none": {"tensor_shape": {"dim": [{"size": 3}]}},
        "scalar": {"float_val": [7]},
    }
    for name, tensor in tensors.items():
        graph.node(name, "Const", dtype={"type": FLOAT}, value={"tensor": {"dtype": FLOAT, **tensor}})
    nodes = read_nodes(graph.save(tmp_path / "graph.pb"))
    expected = {"repeated": [2.5] * 3, "square": [[1, 2], [2, 2]], "none": [0, 0, 0], "scalar": 7}
    for name, array in expected.items():
        assert np.array_equal(nodes[name].constant(), np.float32(array)), name
