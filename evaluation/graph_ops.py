"""The operations between images and features in TensorFlow's graph files, as functions of PyTorch tensors.

Values have TensorFlow's shapes, images (N, H, W, C). Permuted to (N, C, H, W), such a tensor is what PyTorch calls
channels-last, so that convolutions copy nothing.
"""

import functools

import numpy as np
import torch
from torch.nn import functional as F


def same_padding(size, kernel, stride):
    """Rows (or columns) that padding SAME adds before and after `size` rows; the odd one comes after."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def pad(x, kernel, strides, same, value=0.0):
    """Pad x (N, C, H, W) for padding SAME; return it and the symmetric (rows, columns) that PyTorch has still to pad.

    Makes no copy if both ends need the same padding.
    """
    if not same:
        return x, (0, 0)
    (top, bottom), (left, right) = map(same_padding, x.shape[2:], kernel, strides)
    if (top, left) == (bottom, right):
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom), value=value), (0, 0)


def resize_bilinear(x, height, width):
    """x (N, H, W, C) -> float32 (N, height, width, C), bilinear as in the first TensorFlow.

    Output pixel i comes from i * in / out, without the half-pixel shift. In this order of float32 operations, the
    result on a CPU equals TensorFlow's bit for bit.
    """
    x = x.float()

    def positions(size, out):
        scale = float(np.float32(size) / np.float32(out))
        source = torch.arange(out, dtype=torch.float32, device=x.device) * scale
        low = source.floor()
        return low.long(), (low + 1).clamp(max=size - 1).long(), source - low

    def between(dim, low, high, weight):
        start = x.index_select(dim, low)
        # torch.lerp and addcmul may round differently.
        return x.index_select(dim, high).sub_(start).mul_(weight).add_(start)

    low, high, weight = positions(x.shape[2], width)
    x = between(2, low, high, weight[:, None])
    low, high, weight = positions(x.shape[1], height)
    return between(1, low, high, weight[:, None, None])


def _resize(builder, node):
    x, size = node.take_inputs(2)
    if node.attr("align_corners", "b", False) or node.attr("half_pixel_centers", "b", False):
        raise node.fault("aligns corners or has half-pixel centers, which is not supported")
    height, width = builder.integers(size, 2)
    return lambda x: resize_bilinear(x, height, width), [x]


def _convolution(builder, node, scale=1.0, shift=None):
    """Conv2D, with its output times `scale` plus `shift`, float64 (C_out,)."""
    x, kernel = node.take_inputs(2)
    kernel = builder.constant(kernel)  # (height, width, C_in, C_out)
    if kernel.ndim != 4:
        raise node.fault(f"has weights of shape {kernel.shape}, not (height, width, C_in, C_out)")
    if "dilations" in node.attrs and list(node.attr("dilations", "list").i) != [1] * 4:
        raise node.fault("has dilations, which are not supported")
    size, strides, same = kernel.shape[:2], node.sides("strides"), node.has_same_padding()
    weights = builder.weights((kernel * np.float64(1) * scale).transpose(3, 2, 0, 1))
    weights = weights.contiguous(memory_format=torch.channels_last)  # a CPU takes 1.5 times as long without
    bias = None if shift is None else builder.weights(shift)

    def run(x):
        x = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        x, padding = pad(x, size, strides, same)
        return F.conv2d(x, weights, bias, strides, padding).permute(0, 2, 3, 1)

    return run, [x]


def _affine(builder, x, scale, shift):
    """x * scale + shift per channel, float64 (C,); becomes part of the convolution that makes x, if nothing else
    reads x."""
    convolution = builder.only_read_once(x, ("Conv2D",))
    if convolution:
        return _convolution(builder, convolution, scale, shift)
    scale, shift = builder.weights(scale), builder.weights(shift)
    return lambda x: torch.addcmul(shift, x, scale), [x]


def _batch_norm(builder, node):
    x, *moments = node.take_inputs(5)
    mean, variance, beta, gamma = (builder.constant(name).astype(np.float64) for name in moments)
    scale = 1 / np.sqrt(variance + node.attr("variance_epsilon", "f"))
    if node.attr("scale_after_normalization", "b"):
        scale *= gamma
    return _affine(builder, x, scale, beta - mean * scale)


def _bias_add(builder, node):
    x, bias = node.take_inputs(2)
    bias = builder.constant(bias).astype(np.float64)
    return _affine(builder, x, np.ones_like(bias), bias)


def _relu(builder, node):
    (x,) = node.take_inputs(1)
    before = builder.only_read_once(x, ("Conv2D", "BatchNormWithGlobalNormalization", "BiasAdd"))
    if not before:
        return torch.relu, [x]
    run, inputs = builder.build(before)
    return lambda *values: run(*values).relu_(), inputs  # in place: nothing else reads this tensor


def max_pool(x, size, strides, same):
    x, padding = pad(x, size, strides, same, -torch.inf)
    return F.max_pool2d(x, size, strides, padding)


def average_pool(x, size, strides, same):
    """The mean of the pixels of each window that are inside the image."""
    inside, padding = pad(x, size, strides, same)
    if inside is x:
        return F.avg_pool2d(x, size, strides, padding, count_include_pad=False)
    ones, _ = pad(torch.ones_like(x[:1, :1]), size, strides, same)
    sums, counts = (F.avg_pool2d(values, size, strides, divisor_override=1) for values in (inside, ones))
    return sums / counts


def _pool(builder, node, pool):
    window = node.sides("ksize"), node.sides("strides"), node.has_same_padding()
    return lambda x: pool(x.permute(0, 3, 1, 2), *window).permute(0, 2, 3, 1), node.take_inputs(1)


def _concat(builder, node, axis_at):
    """Concat, whose axis is the first input (0), and ConcatV2, whose axis is the last input (-1)."""
    names = list(node.inputs)
    if len(names) < 2:
        raise node.fault(f"has {len(names)} inputs, fewer than 2: the file is damaged")
    (axis,) = builder.integers(names.pop(axis_at), 1)

    def run(*values):
        # In PyTorch's order of axes, the result keeps the memory layout of the values.
        return torch.cat([x.permute(0, 3, 1, 2) for x in values], (0, 2, 3, 1)[axis]).permute(0, 2, 3, 1)

    return run, names


def _constant(builder, node):
    tensor = builder.tensor(node.constant())
    return lambda: tensor, []


# By operation, a function of a `Builder` (inception.py) and a node. It returns a function of tensors and the names of
# the values that this takes. The function of tensors must not hold the builder, which holds the whole file.
OPS = {
    "AvgPool": functools.partial(_pool, pool=average_pool),
    "BatchNormWithGlobalNormalization": _batch_norm,
    "BiasAdd": _bias_add,
    "Concat": functools.partial(_concat, axis_at=0),
    "ConcatV2": functools.partial(_concat, axis_at=-1),
    "Const": _constant,
    "Conv2D": _convolution,
    "MaxPool": functools.partial(_pool, pool=max_pool),
    "Mul": lambda builder, node: (torch.mul, node.take_inputs(2)),
    "Relu": _relu,
    "ResizeBilinear": _resize,
    "Sub": lambda builder, node: (torch.sub, node.take_inputs(2)),
}
