"""The two libraries that run a graph file, and how far their results may differ."""

import importlib.util

import pytest

from evaluation import inception, inception_tf

HAS_TENSORFLOW = importlib.util.find_spec("tensorflow") is not None
needs_tensorflow = pytest.mark.skipif(not HAS_TENSORFLOW, reason="TensorFlow is not installed: pip install tensorflow")
BACKENDS = [inception.Graph, pytest.param(inception_tf.Graph, marks=needs_tensorflow)]
TOLERANCE = 1e-5  # relative L2 of the features; 2e-6 was measured


def relative(actual, expected):
    """L2 norm of the difference of two tensors over that of `expected`."""
    return float((actual - expected).double().norm() / expected.double().norm())
