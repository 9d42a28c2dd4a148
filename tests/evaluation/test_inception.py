"""The network run by PyTorch against TensorFlow, operation by operation and as a whole."""

import itertools
import shutil
import sys

import numpy as np
import pytest
import torch
from backends import BACKENDS, TOLERANCE, needs_tensorflow, relative
from conftest import ROOT

from benchmarks.inception_graph import RandomGraph, inception_v3
from evaluation import graph_ops, inception_tf
from evaluation.graph_file import FLOAT, FLOATS, INT, message_classes, read_nodes
from evaluation.inception import Graph
from runtime.errors import UserError


def distance(actual, expected):
    """The largest relative distance of the outputs; NaN if one of them is NaN."""
    return np.max([relative(*pair) for pair in zip(actual, expected, strict=True)])


def assert_close(actual, expected, tolerance=2e-6):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def values(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def ints(*numbers):
    return {"list": {"i": numbers}}


SAME, ONES, WINDOW = {"padding": {"s": b"SAME"}}, {"strides": ints(1, 1, 1, 1)}, {"ksize": ints(1, 1, 1, 1)}


def empty_graph():
    """A graph with only the node that images are fed to."""
    graph = RandomGraph()
    graph.node("ExpandDims", "Placeholder", dtype={"type": FLOAT})
    return graph


# One operation at a time


@pytest.fixture
def assert_agree(tmp_path):
    def assert_agree(graph, x, *outputs, tolerance=2e-6):
        """Both backends give the same values of the nodes `outputs` for x (N, H, W, 3)."""
        path, x = graph.save(tmp_path / "graph.pb"), torch.from_numpy(x)
        actual, expected = (
            backend(path, outputs=outputs, weights=None).run(x) for backend in (Graph, inception_tf.Graph)
        )
        for pair in zip(actual, expected, strict=True):
            assert_close(*pair, tolerance)

    return assert_agree


@needs_tensorflow
@pytest.mark.parametrize("shape, size", [((2, 5, 7), (9, 4)), ((1, 6, 6), (6, 6)), ((2, 32, 32), (29, 31))])
def test_the_resize_equals_tensorflows_bit_for_bit(shape, size, assert_agree):
    graph = empty_graph()
    graph.constant("size", np.array(size))
    graph.node("y", "ResizeBilinear", "ExpandDims", "size", align_corners={"b": False}, **FLOATS)
    assert_agree(graph, np.random.default_rng(0).uniform(0, 255, (*shape, 3)).astype(np.float32), "y", tolerance=0)


@needs_tensorflow
@pytest.mark.parametrize("image", [(7, 8), (6, 9)])
def test_convolutions_and_pools_pad_as_tensorflow(image, assert_agree):
    graph, outputs = empty_graph(), []
    for size, stride, padding in itertools.product([(3, 3), (1, 5), (2, 2), (1, 1)], [1, 2], [b"SAME", b"VALID"]):
        attrs = {"strides": ints(1, stride, stride, 1), "padding": {"s": padding}} | FLOATS
        weights = graph.constant(f"w{len(outputs)}", values(*size, 3, 4, seed=1))
        outputs.append(graph.node(f"y{len(outputs)}", "Conv2D", "ExpandDims", weights, **attrs))
        for op in ("AvgPool", "MaxPool"):
            outputs.append(graph.node(f"y{len(outputs)}", op, "ExpandDims", ksize=ints(1, *size, 1), **attrs))
    assert_agree(graph, values(2, *image, 3) - 4, *outputs)  # negative, so that zeros would win


@needs_tensorflow
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("outputs", [["y"], ["both"]], ids=["alone", "two readers"])
def test_batch_norm_after_a_convolution_scales_if_the_node_says_so(scaled, outputs, assert_agree):
    graph = empty_graph()
    moments = [values(3, seed=1), np.array([0.01, 1.0, 20.0], np.float32), values(3, seed=2), values(3, seed=3)]
    weights = graph.constant("w", values(1, 1, 3, 3, seed=4))
    graph.node("conv", "Conv2D", "ExpandDims", weights, **SAME, **ONES, **FLOATS)
    names = [graph.constant(name, moment) for name, moment in zip("mvbg", moments)]
    attrs = {"variance_epsilon": {"f": 0.001}, "scale_after_normalization": {"b": scaled}}
    graph.node("y", "BatchNormWithGlobalNormalization", "conv", *names, **attrs, **FLOATS)
    graph.node("both", "Sub", "y", "conv", **FLOATS)  # a second reader of the convolution
    assert_agree(graph, values(2, 5, 5, 3), *outputs, tolerance=1e-5)


@needs_tensorflow
def test_the_small_operations(assert_agree):
    graph = empty_graph()
    graph.constant("b", values(3, seed=1))
    graph.constant("two", np.float32(2))
    graph.constant("axis", np.int32(1))
    graph.node("late", "Identity", "ExpandDims:0", **FLOATS)
    graph.node("same", "Identity", "ExpandDims:0", "^late", **FLOATS)
    graph.node("biased", "BiasAdd", "same", "b", **FLOATS)
    graph.node("doubled", "Mul", "biased", "two", **FLOATS)
    graph.node("less", "Sub", "two", graph.node("relu", "Relu", "biased", **FLOATS), **FLOATS)
    graph.node("joined", "Concat", "axis", "same", "biased", N={"i": 2}, **FLOATS)
    graph.node("joined2", "ConcatV2", "same", "biased", "axis", N={"i": 2}, Tidx={"type": INT}, **FLOATS)
    assert_agree(graph, values(3, 2, 2, 3), "same", "biased", "doubled", "less", "joined", "joined2")


# The whole network


@pytest.fixture(scope="module")
def graph_file(tmp_path_factory):
    """The structure of 2015 at its full width: 95 MB, removed after the tests."""
    path = inception_v3(tmp_path_factory.mktemp("graph") / "classify_image_graph_def.pb")
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def narrow_file(tmp_path_factory):
    """The same structure with an eighth of the channels."""
    return inception_v3(tmp_path_factory.mktemp("graph") / "narrow.pb", narrower=8)


def images(count, size):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_features_and_probabilities_have_the_published_sizes_and_order(graph_file):
    network, x = Graph(graph_file), images(2, 64)
    pool, spatial = network.features(x)
    assert pool.shape == (2, 2048) and spatial.shape == (2, 2023)
    assert pool.dtype == spatial.dtype == torch.float32
    cells = network.run(torch.from_numpy(x))[1]
    assert cells.shape == (2, 17, 17, 192)
    # Cell by cell, seven channels each.
    assert torch.equal(spatial[1, 7 * (17 * 3 + 5) : 7 * (17 * 3 + 6)], cells[1, 3, 5, :7])
    # If activations vanished or exploded, agreement would mean nothing.
    assert 0.1 < pool.std() < 10 and 0.1 < spatial.std() < 10 and (spatial > 0).float().mean() > 0.3
    weights = read_nodes(graph_file)["softmax/weights"].constant()
    powers = np.exp(pool.numpy().astype(float) @ weights)  # without the bias
    assert_close(network.probabilities(pool), powers / powers.sum(1, keepdims=True), 1e-5)


@needs_tensorflow
@pytest.mark.parametrize("width", ["narrow_file", pytest.param("graph_file", marks=pytest.mark.slow)])
def test_both_backends_agree(width, request):
    path = request.getfixturevalue(width)
    network, tensorflow = Graph(path), inception_tf.Graph(path)
    board = np.indices((32, 32)).sum(0) % 2 * 255
    extremes = np.stack([np.zeros((32, 32)), np.full((32, 32), 255), board]).astype(np.uint8)[..., None].repeat(3, 3)
    for x in map(torch.from_numpy, (extremes, images(1, 256), images(1, 299), images(1, 300))):
        actual, expected = network.features(x), tensorflow.features(x)
        for k in range(len(x)):
            assert distance([part[k] for part in actual], [part[k] for part in expected]) < TOLERANCE
        assert relative(network.run(x)[1], tensorflow.run(x)[1]) < TOLERANCE  # all channels
        assert relative(network.probabilities(actual[0]), tensorflow.probabilities(actual[0])) < TOLERANCE


@pytest.fixture
def small_file(tmp_path):
    """A copy of the shipped classifier: the same names, images of 32x32 pixels, 64 features, 10 classes."""
    return shutil.copy(ROOT / "ckpt" / "fashion_mnist" / "classifier.pb", tmp_path / "small.pb")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_smaller_network_has_its_own_sizes_and_class_accuracy(backend, small_file):
    graph, x = backend(small_file), images(7, 40)
    pool, spatial = graph.features(x)
    assert pool.shape == (7, 64) and spatial.shape == (7, 8 * 8 * 7)
    probabilities = graph.probabilities(pool)
    assert probabilities.shape == (7, 10)
    labels = probabilities.argmax(1)
    labels[[1, 4]] = (labels[[1, 4]] + 1) % 10
    for batch_size in (3, 100):
        assert graph.class_accuracy(x, labels.numpy(), batch_size) == pytest.approx(5 / 7)


def test_tf32_is_off_while_the_network_runs_and_restored_afterwards(small_file, monkeypatch):
    seen, resize = [], graph_ops.resize_bilinear

    def look(*args):
        seen.append((torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
        return resize(*args)

    monkeypatch.setattr(graph_ops, "resize_bilinear", look)
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    try:
        Graph(small_file).features(images(1, 8))
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert seen == [("ieee", "ieee")]


# Refusals


def assert_refused(words, function, *args, **kwargs):
    with pytest.raises(UserError, match=words) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", [Graph, inception_tf.Graph])
def test_other_files_are_refused_before_tensorflow_is_imported(backend, small_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    whole, graph = small_file.read_bytes(), message_classes()["GraphDef"]
    for content in (b"", b"<!DOCTYPE html>", bytes(1000), np.random.default_rng(0).bytes(1000)):
        small_file.write_bytes(content)
        assert_refused("small.pb is not a TensorFlow graph", backend, small_file)
    assert_refused("no such file: .*missing.pb", backend, small_file.with_name("missing.pb"))
    assert_refused("cannot read", backend, small_file.parent)
    for name in ("ExpandDims", "pool_3", "mixed_6/conv", "softmax/weights"):
        message = graph.FromString(whole)
        for node in message.node:
            node.name = "other" if node.name == name else node.name
            node.input[:] = ["other" if source == name else source for source in node.input]
        small_file.write_bytes(message.SerializeToString())
        assert_refused(f"no node {name}: it is another network", backend, small_file)


CUT_OFF = {"dtype": FLOAT, "tensor_content": bytes(8), "tensor_shape": {"dim": [{"size": 3}]}}
# Words of the message, and the operation, inputs and attributes of the node y that causes it.
BAD_NODES = [
    (r"node y \(Erf\) is an operation that is not supported", "Erf", ["ExpandDims"], {}),
    (r"node y \(Relu\) reads gone, which does not exist", "Relu", ["gone"], {}),
    ("waits for itself", "Relu", ["y"], {}),
    (r"node y \(Sub\) has 1 inputs, not 2", "Sub", ["ExpandDims"], {}),
    (r"node ExpandDims \(Placeholder\) is not a constant", "Conv2D", ["ExpandDims", "ExpandDims"], SAME | ONES),
    ("has dilations", "Conv2D", ["ExpandDims", "w"], SAME | ONES | {"dilations": ints(1, 2, 2, 1)}),
    ("layout b'NCHW'", "AvgPool", ["ExpandDims"], WINDOW | ONES | SAME | {"data_format": {"s": b"NCHW"}}),
    ("half-pixel centers", "ResizeBilinear", ["ExpandDims", "size"], {"half_pixel_centers": {"b": True}}),
    (r"node y \(Const\) does not hold the values of its shape \[3\]", "Const", [], {"value": {"tensor": CUT_OFF}}),
]


@pytest.mark.parametrize("words, op, inputs, attrs", BAD_NODES)
def test_unsupported_nodes_are_named(words, op, inputs, attrs, tmp_path):
    graph = empty_graph()
    graph.constant("size", np.array([4, 4]))
    graph.constant("w", np.zeros((1, 1, 3, 4)))
    graph.node("y", op, *inputs, **attrs)
    assert_refused(f"graph.pb: .*{words}", Graph, graph.save(tmp_path / "graph.pb"), outputs=("y",), weights=None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_overflow_are_refused_and_their_node_is_named(backend, small_file):
    message = message_classes()["GraphDef"].FromString(small_file.read_bytes())
    (node,) = (node for node in message.node if node.name == "conv_1/conv2d_params")
    (tensor,) = (attr.value.tensor for attr in node.attr if attr.key == "value")
    tensor.tensor_content = np.full(9 * 32 * 64, 1e37, np.float32).tobytes()
    small_file.write_bytes(message.SerializeToString())
    words = "node conv_1.* makes values that are NaN" if backend is Graph else "node conv_1/CheckNumerics fails .*"
    assert_refused(words, backend(small_file).features, images(2, 8))


def test_without_tensorflow_only_its_backend_is_refused(small_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    Graph(small_file).features(images(1, 8))
    assert_refused("TensorFlow is needed and cannot be loaded", inception_tf.Graph, small_file)


@needs_tensorflow
def test_tensorflow_out_of_memory_is_a_memory_error(small_file, monkeypatch):
    graph = inception_tf.Graph(small_file)

    def short(*_):
        raise graph._tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor\nmore")

    monkeypatch.setattr(graph._session, "run", short)
    with pytest.raises(MemoryError, match="^OOM when allocating tensor$"):
        graph.features(images(1, 8))


@needs_tensorflow
def test_tensorflow_refuses_in_one_line(tmp_path, small_file):
    graph = empty_graph()
    graph.node("y", "Sharpen", "ExpandDims")
    path = graph.save(tmp_path / "graph.pb")
    words = "graph.pb cannot be imported by TensorFlow .*Sharpen"
    assert_refused(words, inception_tf.Graph, path, outputs=("y",), weights=None)
    if not torch.cuda.is_available():
        assert_refused("finds no GPU", inception_tf.Graph, small_file, device="cuda")
