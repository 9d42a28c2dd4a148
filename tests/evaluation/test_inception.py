"""inception.py against loops in NumPy, operation by operation, and against TensorFlow where that is installed."""

import gc
import itertools
import sys
import weakref

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benchmarks.inception_graph import (
    BACKENDS,
    FLOAT,
    HAS_TENSORFLOW,
    INT,
    TOLERANCE,
    GraphFile,
    inception_v3,
    needs_tensorflow,
    relative,
)
from evaluation import inception, inception_tf
from evaluation.graph_file import message_classes, read_nodes
from evaluation.inception import Graph, exact_float32, load_graph
from runtime.errors import UserError

FLOATS = {"T": {"type": FLOAT}}


def distance(actual, expected):
    """The largest one of the outputs; NaN where one is."""
    return np.max([relative(*pair) for pair in zip(actual, expected, strict=True)])


def assert_close(actual, expected, tolerance=2e-6):
    actual = np.asarray(actual)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def values(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def fed():
    """A new graph file with a node to feed."""
    file = GraphFile()
    file.node("ExpandDims", "Placeholder", dtype={"type": FLOAT})
    return file


def evaluate(backend, file, x, folder, output="y"):
    """The value of a node of `file`, for x (N, H, W, 3) fed."""
    graph = backend(file.save(folder / "graph.pb"), outputs=(output,), weights=None)
    return graph.run(torch.from_numpy(x))[0].numpy()


# One operation at a time: what is expected is computed by loops, in float64 where no bits are compared.


def resize_slowly(x, height, width):
    """The rule of the first TensorFlow, pixel by pixel, every operation in float32."""

    def position(i, size, out):
        source = np.float32(i) * (np.float32(size) / np.float32(out))
        low = int(np.floor(source))
        return low, min(low + 1, size - 1), source - np.float32(low)

    result = np.empty((len(x), height, width, x.shape[3]), np.float32)
    for i, j in itertools.product(range(height), range(width)):
        top, bottom, down = position(i, x.shape[1], height)
        left, right, along = position(j, x.shape[2], width)
        upper, lower = (x[:, row, left] + (x[:, row, right] - x[:, row, left]) * along for row in (top, bottom))
        result[:, i, j] = upper + (lower - upper) * down
    return result


def windows(x, size, stride, same):
    """Yields (i, j) of the output, the window of x (N, H, W, C) in the image, and where in the window that begins."""
    outs, starts = [], []
    for n, k in zip(x.shape[1:3], size):
        out = -(-n // stride) if same else (n - k) // stride + 1
        before = max((out - 1) * stride + k - n, 0) // 2 if same else 0
        outs.append(out)
        starts.append([i * stride - before for i in range(out)])
    for i, j in itertools.product(*map(range, outs)):
        top, left = starts[0][i], starts[1][j]
        inside = x[:, max(top, 0) : top + size[0], max(left, 0) : left + size[1]]
        yield i, j, inside, (max(-top, 0), max(-left, 0))


def over_windows(x, size, stride, same, function):
    """The array of function(window, where it begins), as a convolution or a pool slides."""
    cells = {(i, j): function(window, start) for i, j, window, start in windows(x.astype(float), size, stride, same)}
    height, width = max(cells)
    return np.stack([np.stack([cells[i, j] for j in range(width + 1)], 1) for i in range(height + 1)], 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape, height, width",
    [((2, 5, 7), 9, 4), ((1, 3, 3), 8, 8), ((1, 6, 6), 6, 6), ((1, 64, 2), 299, 3), ((2, 32, 32), 29, 31)],
)
def test_the_resize_is_the_first_tensorflows_bit_for_bit(shape, height, width, backend, tmp_path):
    x = np.random.default_rng(0).uniform(0, 255, (*shape, 3)).astype(np.float32)
    file = fed()
    file.constant("size", np.array([height, width]))
    file.node("y", "ResizeBilinear", "ExpandDims", "size", align_corners={"b": False}, **FLOATS)
    assert np.array_equal(evaluate(backend, file, x, tmp_path), resize_slowly(x, height, width))


def test_an_image_of_the_right_size_is_not_changed_by_the_resize():
    x = torch.randint(0, 256, (1, 9, 9, 3), dtype=torch.uint8)
    assert torch.equal(inception.resize_bilinear(x, 9, 9), x.float())


GRID = [
    (height, width, size, stride, padding)
    for height, width in ((7, 8), (6, 9))
    for size in ((3, 3), (1, 5), (2, 2), (1, 1))
    for stride in (1, 2)
    for padding in (b"SAME", b"VALID")
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_convolutions_pad_as_tensorflow(backend, tmp_path):
    for height, width, size, stride, padding in GRID:
        x, weights = values(2, height, width, 3), values(*size, 3, 4, seed=1)

        def product(window, start, weights=weights):
            (top, left), (_, rows, columns, _) = start, window.shape
            return np.einsum("nhwc,hwco->no", window, weights[top : top + rows, left : left + columns].astype(float))

        file = fed()
        file.constant("w", weights)
        strides = {"list": {"i": [1, stride, stride, 1]}}
        file.node("y", "Conv2D", "ExpandDims", "w", strides=strides, padding={"s": padding}, **FLOATS)
        expected = over_windows(x, size, stride, padding == b"SAME", product)
        assert_close(evaluate(backend, file, x, tmp_path), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["AvgPool", "MaxPool"])
def test_pools_look_at_the_image_and_not_at_its_padding(op, backend, tmp_path):
    function = {"AvgPool": lambda window, _: window.mean((1, 2)), "MaxPool": lambda window, _: window.max((1, 2))}[op]
    for height, width, size, stride, padding in GRID:
        x = values(2, height, width, 3) - 4  # all negative, so that zeros would win
        file = fed()
        sides = {"ksize": {"list": {"i": [1, *size, 1]}}, "strides": {"list": {"i": [1, stride, stride, 1]}}}
        file.node("y", op, "ExpandDims", **sides, padding={"s": padding}, **FLOATS)
        assert_close(evaluate(backend, file, x, tmp_path), over_windows(x, size, stride, padding == b"SAME", function))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("place", ["alone", "in a convolution", "after one that others read too"])
def test_batch_norm_scales_where_the_node_says_so(place, scaled, backend, tmp_path):
    x, file = values(2, 5, 5, 3), fed()
    mean, beta, gamma = values(3, seed=1), values(3, seed=2), values(3, seed=3)
    variance = np.array([0.01, 1.0, 20.0], np.float32)
    source, expected = "ExpandDims", x.astype(float)
    if place != "alone":
        weights = values(1, 1, 3, 3, seed=4)
        file.constant("w", weights)
        strides = {"list": {"i": [1] * 4}}
        source = file.node("conv", "Conv2D", source, "w", strides=strides, padding={"s": b"SAME"}, **FLOATS)
        expected = expected @ weights[0, 0]
    for name, moment in (("m", mean), ("v", variance), ("b", beta), ("g", gamma)):
        file.constant(name, moment)
    attrs = {"variance_epsilon": {"f": 0.001}, "scale_after_normalization": {"b": scaled}}
    file.node("y", "BatchNormWithGlobalNormalization", source, "m", "v", "b", "g", **attrs, **FLOATS)
    normed = (expected - mean) / np.sqrt(variance.astype(float) + 0.001) * (gamma if scaled else 1) + beta
    output = "y"
    if place.startswith("after"):
        output, normed = file.node("both", "Sub", "y", source, **FLOATS), normed - expected
    assert_close(evaluate(backend, file, x, tmp_path, output), normed, tolerance=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("axis", [1, 2, 3, -1])
def test_the_axis_comes_first_in_concat_and_last_in_its_second_version(axis, backend, tmp_path):
    x = values(2, 3, 3, 3)
    for op in ("Concat", "ConcatV2"):
        file = fed()
        file.constant("axis", np.int32(axis))
        file.node("relu", "Relu", "ExpandDims", **FLOATS)
        names = ["ExpandDims", "relu", "ExpandDims"]
        names = ["axis", *names] if op == "Concat" else [*names, "axis"]
        second = {"Tidx": {"type": INT}} if op == "ConcatV2" else {}
        file.node("y", op, *names, N={"i": 3}, **second, **FLOATS)
        assert np.array_equal(evaluate(backend, file, x, tmp_path), np.concatenate([x, np.maximum(x, 0), x], axis))


def softmax(x):
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_small_operations(backend, tmp_path):
    x, weights, bias = values(3, 1, 1, 3), values(3, 4, seed=1), values(4, seed=2)
    file = fed()
    for name, array in (("w", weights), ("wt", weights.T), ("b", bias), ("two", np.float32(2))):
        file.constant(name, array)
    file.constant("shape", np.array([-1, 3]))
    file.constant("dim", np.int32(1))
    file.node("flat", "Reshape", "ExpandDims:0", "shape", Tshape={"type": INT}, **FLOATS)
    file.node("squeezed", "Squeeze", "ExpandDims", squeeze_dims={"list": {"i": [1, 2]}}, **FLOATS)
    file.node("wide", "ExpandDims", "squeezed", "dim", Tdim={"type": INT}, **FLOATS)
    for name, source, turn in (("product", "w", False), ("turned", "wt", True)):
        turns = {"transpose_a": {"b": False}, "transpose_b": {"b": turn}}
        file.node(name, "MatMul", "flat", source, **turns, **FLOATS)
    file.node("same", "Identity", "product", "^turned", **FLOATS)
    file.node("biased", "BiasAdd", "same", "b", **FLOATS)
    file.node("softmax", "Softmax", "biased", **FLOATS)
    file.node("doubled", "Mul", "biased", "two", **FLOATS)
    file.node("relu", "Relu", "biased", **FLOATS)
    file.node("less", "Sub", "two", "relu", **FLOATS)
    file.node("whole", "Cast", "doubled", SrcT={"type": FLOAT}, DstT={"type": INT})
    flat = x.reshape(3, 3)
    expected = {"flat": flat, "squeezed": flat, "wide": flat[:, None], "product": flat @ weights}
    biased = flat @ weights + bias
    expected |= {"turned": expected["product"], "biased": biased, "softmax": softmax(biased), "doubled": biased * 2}
    expected |= {"less": 2 - np.maximum(biased, 0), "whole": (biased * 2).astype(np.int32), "w": weights}
    for name, array in expected.items():
        assert_close(evaluate(backend, file, x, tmp_path, name), array)


def test_constants_are_read_however_they_are_written(tmp_path):
    """Values in place of bytes, where the last one stands for the rest; none at all are zeros."""
    file = fed()
    tensors = {
        "one": {"float_val": [2.5], "tensor_shape": {"dim": [{"size": 3}]}},
        "two": {"float_val": [1, 2], "tensor_shape": {"dim": [{"size": 2}, {"size": 2}]}},
        "none": {"tensor_shape": {"dim": [{"size": 3}]}},
        "scalar": {"float_val": [7]},
    }
    for name, tensor in tensors.items():
        file.node(name, "Const", dtype={"type": FLOAT}, value={"tensor": {"dtype": FLOAT, **tensor}})
    nodes = read_nodes(file.save(tmp_path / "graph.pb"))
    expected = {"one": [2.5] * 3, "two": [[1, 2], [2, 2]], "none": [0, 0, 0], "scalar": 7}
    for name, array in expected.items():
        assert np.array_equal(nodes[name].constant(), np.float32(array)), name


# The whole network.


@pytest.fixture(scope="module")
def graph_file(tmp_path_factory):
    """The structure of 2015 at its full width, 95 MB, which go when the tests are done."""
    path = inception_v3(tmp_path_factory.mktemp("graph") / "classify_image_graph_def.pb")
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def network(graph_file):
    return load_graph(graph_file)


@pytest.fixture(scope="module")
def by_tensorflow(graph_file):
    return inception_tf.load_graph(graph_file)


@pytest.fixture(scope="module")
def narrow_file(tmp_path_factory):
    """The same with an eighth of the channels."""
    return inception_v3(tmp_path_factory.mktemp("graph") / "narrow.pb", narrower=8)


def images(count, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def extreme_images(size):
    """Black, white and a checkerboard of single pixels."""
    board = np.indices((size, size)).sum(0) % 2 * 255
    return (
        np.stack([np.zeros((size, size)), np.full((size, size), 255), board]).astype(np.uint8)[..., None].repeat(3, 3)
    )


def test_the_network_is_the_one_of_2015(graph_file):
    nodes = read_nodes(graph_file)
    ops = [node.op for node in nodes.values()]
    counts = {"Conv2D": 94, "BatchNormWithGlobalNormalization": 94, "Concat": 11, "AvgPool": 9, "MaxPool": 5}
    assert {op: ops.count(op) for op in counts} == counts
    assert nodes["mixed_9/tower_2/pool"].op == "AvgPool" and nodes["mixed_10/tower_2/pool"].op == "MaxPool"


def test_features_have_the_published_sizes_and_order(network):
    x = images(2, 64)
    pool, spatial = network.features(x)
    assert pool.shape == (2, 2048) and spatial.shape == (2, 2023)
    assert pool.dtype == spatial.dtype == torch.float32
    cells = network.run(torch.from_numpy(x))[1]
    assert cells.shape == (2, 17, 17, 192)
    # Cell by cell, seven channels each.
    assert torch.equal(spatial[1, 7 * (17 * 3 + 5) : 7 * (17 * 3 + 6)], cells[1, 3, 5, :7])
    # The network neither dies nor explodes, or agreement would mean nothing.
    assert 0.1 < pool.std() < 10 and 0.1 < spatial.std() < 10 and (spatial > 0).float().mean() > 0.3


def test_probabilities_are_those_without_the_bias(network, graph_file):
    pool, _ = network.features(images(3, 32))
    probabilities = network.probabilities(pool)
    weights = read_nodes(graph_file)["softmax/weights"].constant()
    assert probabilities.shape == (3, 1008)
    assert_close(probabilities, softmax(pool.numpy().astype(float) @ weights), 1e-5)


@needs_tensorflow
@pytest.mark.parametrize("count, size", [(5, 32), (3, 64), (1, 256), (3, 299), (1, 300)])
def test_both_backends_agree(count, size, network, by_tensorflow):
    x = torch.from_numpy(images(count, size))
    actual, expected = network.features(x), by_tensorflow.features(x)
    assert [part.shape for part in actual] == [part.shape for part in expected]
    assert distance(actual, expected) < TOLERANCE
    # All channels, not the seven alone.
    assert relative(network.run(x)[1], by_tensorflow.run(x)[1]) < TOLERANCE
    pool, _ = actual
    assert relative(network.probabilities(pool), by_tensorflow.probabilities(pool)) < TOLERANCE


@needs_tensorflow
@pytest.mark.parametrize("size", [32, 256])
def test_both_backends_agree_on_extreme_images(size, network, by_tensorflow):
    x = extreme_images(size)
    for actual, expected in zip(network.features(x), by_tensorflow.features(x)):
        for row, expected_row in zip(actual, expected):
            assert relative(row, expected_row) < TOLERANCE


@needs_tensorflow
def test_both_backends_agree_on_the_classifier_behind_the_features(graph_file):
    """Which is declared for one image."""
    x = torch.from_numpy(images(1, 48))
    outputs = ("softmax/logits/MatMul", "softmax")
    both = [backend(graph_file, outputs=outputs).run(x) for backend in (Graph, inception_tf.Graph)]
    assert distance(*both) < TOLERANCE


def half_pixel(patch):
    """A resize that takes pixels from their centres, as everything newer does."""

    def resize(x, height, width):
        x = F.interpolate(x.float().permute(0, 3, 1, 2), (height, width), mode="bilinear", align_corners=False)
        return x.permute(0, 2, 3, 1)

    patch.setattr(inception, "resize_bilinear", resize)


def scaled_by_127_5(patch):
    def other(path):
        nodes = read_nodes(path)
        nodes["Mul/y"].attrs["value"] = message_classes()["AttrValue"](
            tensor={"dtype": FLOAT, "float_val": [1 / 127.5]}
        )
        return nodes

    patch.setattr(inception, "read_nodes", other)


def padding_counted(patch):
    average = F.avg_pool2d
    patch.setattr(F, "avg_pool2d", lambda *args, count_include_pad=True, **kwargs: average(*args, **kwargs))


def average_for_maximum(patch):
    def other(path):
        nodes = read_nodes(path)
        nodes["mixed_10/tower_2/pool"].op = "AvgPool"
        return nodes

    patch.setattr(inception, "read_nodes", other)


@pytest.mark.parametrize("mistake", [half_pixel, scaled_by_127_5, padding_counted, average_for_maximum])
def test_known_mistakes_break_the_agreement(mistake, network, graph_file, request):
    x = images(1, 64)
    right = request.getfixturevalue("by_tensorflow") if HAS_TENSORFLOW else network
    expected = right.features(x)
    assert distance(network.features(x), expected) < TOLERANCE
    with pytest.MonkeyPatch.context() as patch:
        mistake(patch)
        wrong = load_graph(graph_file).features(x)
    assert distance(wrong, expected) > 20 * TOLERANCE


def test_the_same_features_whatever_the_type_the_batch_and_the_memory_format(narrow_file, monkeypatch):
    x = images(5, 40)
    network = load_graph(narrow_file)
    expected = network.features(x)
    monkeypatch.setattr(inception, "CPU_IMAGES", 2)
    by_two = network.features(x)
    monkeypatch.undo()
    locked = x.copy()
    locked.flags.writeable = False  # as arrays are that are read from a file
    rows = Graph(narrow_file, memory_format=torch.contiguous_format)
    one_by_one = [torch.cat(parts) for parts in zip(*(network.features(x[k : k + 1]) for k in range(5)))]
    turned = torch.from_numpy(x).permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    for actual in (
        network.features(x.astype(np.float32)),
        network.features(locked),
        network.features(turned),
        rows.features(x),
        by_two,
        one_by_one,
    ):
        assert distance(actual, expected) < TOLERANCE


def test_a_cpu_computes_few_images_at_a_time(narrow_file, monkeypatch):
    seen, resize = [], inception.resize_bilinear
    monkeypatch.setattr(inception, "resize_bilinear", lambda x, *size: seen.append(len(x)) or resize(x, *size))
    monkeypatch.setattr(inception, "CPU_IMAGES", 3)
    pool, spatial = load_graph(narrow_file).features(images(7, 8))
    assert seen == [3, 3, 1] and len(pool) == len(spatial) == 7


def test_what_was_read_of_the_file_goes_when_the_network_is_made(narrow_file, monkeypatch):
    nodes = []

    def read(path):
        found = read_nodes(path)
        nodes.extend(map(weakref.ref, found.values()))
        return found

    monkeypatch.setattr(inception, "read_nodes", read)
    graph = load_graph(narrow_file)
    gc.collect()
    assert len(nodes) > 900 and not any(node() for node in nodes)
    graph.features(images(1, 8))


def test_values_go_after_their_last_reader_and_outputs_stay(narrow_file):
    graph = load_graph(narrow_file)
    readers = [(name, number) for number, step in enumerate(graph.steps) for name in step.inputs]
    last = dict(readers)  # the last number of each name
    gone = {name: number for number, step in enumerate(graph.steps) for name in step.last}
    assert gone == {name: number for name, number in last.items() if name not in graph.outputs}
    assert sum(len(step.last) for step in graph.steps) == len(gone)


def test_only_what_is_asked_for_runs(narrow_file):
    """The path to the spatial features ends in the middle of the network; images are fed behind DecodeJpeg."""
    steps = {step.name for step in Graph(narrow_file, outputs=("mixed_6/conv",), weights=None).steps}
    assert "mixed_5/join" in steps and "mixed_6/tower/conv" not in steps and "pool_3" not in steps
    assert not {"Cast", "DecodeJpeg", "softmax"} & {step.name for step in load_graph(narrow_file).steps}


def test_batch_norm_and_relu_run_with_their_convolution(narrow_file):
    names = [step.name for step in load_graph(narrow_file).steps]
    assert not [name for name in names if name.endswith(("/Conv2D", "/batchnorm", "/conv2d_params"))]
    # The resize, two operations with a constant each, convolutions, joins and pools.
    assert len(names) == 1 + 4 + 94 + 11 + 9 + 5


def small_classifier(path, std=1.0):
    """Another network with the same names: 8 x 8 pixels, convolutions with a bias, the second version of concat."""
    file = GraphFile()
    x = file.head(side=8)
    for name, source, c_in, c_out in (("first", x, 3, 4), ("second", "relu", 4, 3)):
        file.normal(f"{name}/w", 3, 3, c_in, c_out, std=std)
        file.normal(f"{name}/b", c_out)
        strides = {"list": {"i": [1, 1, 1, 1]}}
        file.node(name, "Conv2D", source, f"{name}/w", strides=strides, padding={"s": b"SAME"}, **FLOATS)
        file.node(f"{name}/biased", "BiasAdd", name, f"{name}/b", **FLOATS)
        if name == "first":
            file.node("relu", "Relu", "first/biased", **FLOATS)
    file.constant("axis", np.int32(3))
    file.node("join", "ConcatV2", "relu", "second/biased", "axis", N={"i": 2}, Tidx={"type": INT}, **FLOATS)
    file.random_convolution("mixed_6/conv", "join", 7, 9, (3, 3), 2)
    file.tail(file.pool("pool_3", "AvgPool", "mixed_6/conv", 4, 1, b"VALID"), 9, 10)
    return file.save(path)


def test_a_smaller_network_with_the_same_names_has_its_own_sizes(tmp_path):
    path, x = small_classifier(tmp_path / "small.pb"), images(3, 10)
    graph = load_graph(path)
    pool, spatial = graph.features(x)
    assert pool.shape == (3, 9) and spatial.shape == (3, 4 * 4 * 7)
    probabilities = graph.probabilities(pool)
    assert probabilities.shape == (3, 10)
    assert_close(probabilities.sum(1), np.ones(3))
    if HAS_TENSORFLOW:
        other = inception_tf.load_graph(path)
        assert distance(graph.features(x), other.features(x)) < TOLERANCE
        assert relative(probabilities, other.probabilities(pool)) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_class_accuracy_is_the_share_of_images_whose_likeliest_class_is_their_label(backend, tmp_path):
    graph, x = backend(small_classifier(tmp_path / "small.pb")), images(7, 10)
    labels = graph.probabilities(graph.features(x)[0]).argmax(1)
    labels[[1, 4]] = (labels[[1, 4]] + 1) % 10
    for batch_size in (3, 100):
        assert graph.class_accuracy(x, labels.numpy(), batch_size) == pytest.approx(5 / 7)


def test_tf32_is_off_while_the_network_runs_and_then_as_before(tmp_path, monkeypatch):
    seen = []

    def look(*args):
        seen.append((torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
        return resize(*args)

    resize = inception.resize_bilinear
    monkeypatch.setattr(inception, "resize_bilinear", look)
    graph = load_graph(small_classifier(tmp_path / "small.pb"))
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        for tf32, precision in ((True, "high"), (False, "highest")):
            torch.backends.cudnn.allow_tf32 = tf32
            torch.set_float32_matmul_precision(precision)
            graph.features(images(1, 8))
            assert torch.backends.cudnn.allow_tf32 is tf32 and torch.backends.cuda.matmul.allow_tf32 is tf32
            assert torch.get_float32_matmul_precision() == precision
        with pytest.raises(KeyError), exact_float32():
            raise KeyError
        assert torch.backends.cudnn.allow_tf32 is False
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])
    assert seen == [("ieee", "ieee")] * 2


# What is refused.


@pytest.mark.parametrize("backend", [load_graph, inception_tf.load_graph])
def test_files_that_are_no_graph_are_refused(backend, tmp_path):
    """Before TensorFlow is looked for."""
    path = tmp_path / "graph.pb"
    contents = {
        "empty": b"",
        "text": b"<!DOCTYPE html><html><body>Not found</body></html>",
        "zeros": bytes(1000),
        "noise": np.random.default_rng(0).bytes(1000),
        "unknown fields": b"\x7a\x02ab",
        "a node without a name": b"\x0a\x02\x12\x00",
    }
    for content in contents.values():
        path.write_bytes(content)
        with pytest.raises(UserError, match="graph.pb is not a TensorFlow graph") as error:
            backend(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such file: .*missing.pb"):
        backend(tmp_path / "missing.pb")
    with pytest.raises(UserError, match="cannot read"):
        backend(tmp_path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cut_off_file_is_refused_wherever_it_was_cut(backend, tmp_path):
    path = small_classifier(tmp_path / "small.pb")
    whole = path.read_bytes()
    for length in range(0, len(whole) - 4, 37):  # the last four bytes are the version
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="small.pb") as error:
            backend(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["ExpandDims", "pool_3", "mixed_6/conv", "softmax/weights"])
@pytest.mark.parametrize("backend", [load_graph, inception_tf.load_graph])
def test_a_graph_without_one_of_the_names_is_refused(name, backend, tmp_path):
    """Before TensorFlow is looked for."""
    path = small_classifier(tmp_path / "small.pb")
    graph = message_classes()["GraphDef"].FromString(path.read_bytes())
    for node in graph.node:
        node.name = "other" if node.name == name else node.name
        for number, source in enumerate(node.input):
            node.input[number] = "other" if source == name else source
    path.write_bytes(graph.SerializeToString())
    with pytest.raises(UserError, match=f"no node {name}: it is another network"):
        backend(path)


def refusals():
    """(nodes that make y, what the message names) for what the interpreter does not do."""
    same, ones = {"padding": {"s": b"SAME"}}, {"strides": {"list": {"i": [1] * 4}}}
    return {
        "unknown": (lambda f: f.node("y", "Erf", "ExpandDims"), r"node y \(Erf\) is an operation that is not known"),
        "in between": (
            lambda f: (f.node("odd", "LRN", "ExpandDims"), f.node("y", "Relu", "odd")),
            r"node odd \(LRN\) is an operation that is not known",
        ),
        "dangling": (lambda f: f.node("y", "Relu", "gone"), r"node y \(Relu\) reads gone, which is not there"),
        "second output": (lambda f: f.node("y", "Relu", "ExpandDims:1"), r"node y \(Relu\) reads ExpandDims:1"),
        "dangling alias": (
            lambda f: (f.node("same", "Identity", "gone"), f.node("y", "Relu", "same")),
            r"node same \(Identity\) reads gone",
        ),
        "circle": (lambda f: (f.node("x", "Relu", "y"), f.node("y", "Relu", "x")), "waits for itself"),
        "circle of aliases": (
            lambda f: (f.node("x", "Identity", "z"), f.node("z", "Identity", "x"), f.node("y", "Relu", "x")),
            "waits for itself",
        ),
        "inputs": (lambda f: f.node("y", "Sub", "ExpandDims"), r"node y \(Sub\) has 1 inputs, not 2"),
        "concat of one": (lambda f: f.node("y", "Concat", "ExpandDims"), r"node y \(Concat\) has 1 inputs"),
        "placeholder": (
            lambda f: (f.node("other", "Placeholder"), f.node("y", "Relu", "other")),
            r"node other \(Placeholder\) has no value",
        ),
        "weights": (
            lambda f: f.node("y", "Conv2D", "ExpandDims", "ExpandDims", **same, **ones),
            r"node ExpandDims \(Placeholder\) is not a constant",
        ),
        "shape of weights": (
            lambda f: f.node("y", "Conv2D", "ExpandDims", f.normal("w", 3), **same, **ones),
            r"node y \(Conv2D\) has weights of shape \(3,\)",
        ),
        "shapes of the norm": (
            lambda f: f.convolution("y", "ExpandDims", np.zeros((1, 1, 3, 4)), *map(np.ones, (4, 4, 4, 3))),
            r"node y/batchnorm .* has constants that do not fit together",
        ),
        "dilations": (
            lambda f: f.node(
                "y",
                "Conv2D",
                "ExpandDims",
                f.normal("w", 1, 1, 3, 3),
                **same,
                **ones,
                dilations={"list": {"i": [1, 2, 2, 1]}},
            ),
            r"node y \(Conv2D\) has dilations",
        ),
        "no padding": (
            lambda f: f.node("y", "MaxPool", "ExpandDims", ksize=ones["strides"], **ones),
            r"node y \(MaxPool\) has no attribute padding",
        ),
        "other padding": (
            lambda f: f.node("y", "MaxPool", "ExpandDims", ksize=ones["strides"], **ones, padding={"s": b"EXPLICIT"}),
            "has padding b'EXPLICIT'",
        ),
        "layout": (
            lambda f: f.node(
                "y", "AvgPool", "ExpandDims", ksize=ones["strides"], **ones, **same, data_format={"s": b"NCHW"}
            ),
            "layout b'NCHW'",
        ),
        "strides": (
            lambda f: f.node(
                "y", "AvgPool", "ExpandDims", ksize=ones["strides"], strides={"list": {"i": [2] * 4}}, **same
            ),
            r"has strides \[2, 2, 2, 2\]",
        ),
        "half pixels": (
            lambda f: f.node("y", "ResizeBilinear", "ExpandDims", "size", half_pixel_centers={"b": True}),
            r"node y \(ResizeBilinear\) aligns corners or has half-pixel centers",
        ),
        "size in parts": (
            lambda f: f.node("y", "ResizeBilinear", "ExpandDims", f.constant("s", 2.5)),
            r"node s \(Const\) has 1 values of type float32, not whole numbers",
        ),
        "values missing": (
            lambda f: f.node("y", "Const", value={"tensor": {"dtype": FLOAT, "tensor_content": bytes(4), **dims(3)}}),
            r"node y \(Const\) does not hold the values of its shape \[3\]",
        ),
        "negative size": (
            lambda f: f.node("y", "Const", value={"tensor": {"dtype": FLOAT, "tensor_content": bytes(8), **dims(-1)}}),
            r"of its shape \[-1\]",
        ),
        "type of values": (lambda f: f.node("y", "Const", value={"tensor": {"dtype": 7}}), "values of type 7"),
        "type to cast to": (lambda f: f.node("y", "Cast", "ExpandDims", DstT={"type": 7}), "casts to type 7"),
    }


def dims(*sizes):
    return {"tensor_shape": {"dim": [{"size": size} for size in sizes]}}


@pytest.mark.parametrize("case", refusals())
def test_nodes_that_are_not_known_are_named(case, tmp_path):
    build, message = refusals()[case]
    file = fed()
    file.constant("size", np.array([4, 4]))
    build(file)
    with pytest.raises(UserError, match=message) as error:
        Graph(file.save(tmp_path / "graph.pb"), outputs=("y",), weights=None)
    assert "\n" not in str(error.value) and "graph.pb" in str(error.value)


def test_images_that_are_not_finite_are_refused(tmp_path):
    """By PyTorch: a Relu of TensorFlow's may make 0 of NaN."""
    graph = load_graph(small_classifier(tmp_path / "small.pb"))
    x = images(2, 8).astype(np.float32)
    for value in (np.nan, np.inf):
        x[1, 3, 3] = value
        with pytest.raises(UserError, match="small.pb: node ResizeBilinear makes values that are NaN or infinite"):
            graph.features(x)
    graph.features(images(2, 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_overflow_are_refused_and_the_node_is_named(backend, tmp_path):
    graph = backend(small_classifier(tmp_path / "small.pb", std=1e25))  # the second convolution's output is 1e50
    where = "node second/biased makes values" if backend is Graph else "node mixed_6/conv/CheckNumerics fails .*NaN"
    with pytest.raises(UserError, match=where):
        graph.features(images(2, 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_of_another_kind_are_refused(backend, tmp_path):
    graph = backend(small_classifier(tmp_path / "small.pb"))
    for x in (np.zeros((2, 8, 8, 4), np.uint8), np.zeros((2, 3, 8, 8), np.uint8), np.zeros((8, 8, 3), np.float32)):
        with pytest.raises(UserError, match="uint8 or float32 .N, H, W, 3. is needed"):
            graph.features(x)
    with pytest.raises(UserError, match="images are float64"):
        graph.features(np.zeros((2, 8, 8, 3)))


def test_without_tensorflow_one_backend_works_and_the_other_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    path = small_classifier(tmp_path / "small.pb")
    load_graph(path).features(images(1, 8))
    with pytest.raises(UserError, match="TensorFlow is needed and cannot be loaded") as error:
        inception_tf.load_graph(path)
    assert "\n" not in str(error.value)


@needs_tensorflow
def test_tensorflow_out_of_memory_is_a_memory_error(tmp_path, monkeypatch):
    graph = inception_tf.load_graph(small_classifier(tmp_path / "small.pb"))

    def short(*_):
        raise graph._tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor\nmore")

    monkeypatch.setattr(graph._session, "run", short)
    with pytest.raises(MemoryError, match="^OOM when allocating tensor$"):
        graph.features(images(1, 8))


@needs_tensorflow
def test_tensorflow_refuses_in_one_line(tmp_path):
    file = GraphFile(producer=9)  # whose graphs have no old batch norm any more
    file.node("ExpandDims", "Placeholder", dtype={"type": FLOAT})
    file.random_convolution("y", "ExpandDims", 3, 3)
    path = file.save(tmp_path / "graph.pb")
    with pytest.raises(UserError, match="graph.pb cannot be imported by TensorFlow .*BatchNorm") as error:
        inception_tf.Graph(path, outputs=("y",), weights=None)
    assert "\n" not in str(error.value)
    small_classifier(path)
    path.write_bytes(path.read_bytes() + b"\x12\x01\xff")  # a library of functions, at which we do not look
    load_graph(path)
    with pytest.raises(UserError, match="graph.pb cannot be imported by TensorFlow") as error:
        inception_tf.load_graph(path)
    assert "\n" not in str(error.value)
    file = fed()
    file.node("y", "Sharpen", "ExpandDims")
    with pytest.raises(UserError, match="graph.pb cannot be imported by TensorFlow .*Sharpen") as error:
        inception_tf.Graph(file.save(path), outputs=("y",), weights=None)
    assert "\n" not in str(error.value)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="finds no GPU"):
            inception_tf.load_graph(small_classifier(path), device="cuda")
