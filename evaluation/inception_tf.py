"""The network of `inception.py` run by TensorFlow, for comparison: the same file, the same interface.

Nothing else needs TensorFlow, which is imported when a graph is loaded.
"""

import os
from pathlib import Path

import torch
from google.protobuf.message import DecodeError

from evaluation.graph_file import read_nodes
from evaluation.inception import FED, POOL, SPATIAL, WEIGHTS, Extractor, require
from runtime.errors import UserError, first_line


def _import_tensorflow():
    """The module. Raises UserError if it is not installed or cannot be loaded."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hides its lines about the processor
    try:
        import tensorflow
    except ImportError as error:
        raise UserError(
            f"TensorFlow is needed and cannot be loaded ({first_line(error)}): pip install tensorflow, or use the "
            "backend torch"
        ) from error
    return tensorflow


class Graph(Extractor):
    """The network in a graph file in a TensorFlow session, in float32; results are on the CPU.

    device: "cpu", or a GPU as PyTorch names it; its memory is taken as needed. TF32 is off for the whole process. On a
    CPU it uses as many threads as PyTorch, fixed by the first graph of the process. outputs, weights: as for
    `inception.Graph`.
    Raises UserError if the file is not such a graph, TensorFlow cannot import it, or TensorFlow or its GPU is missing.
    """

    def __init__(self, path, device="cpu", outputs=(POOL, SPATIAL), weights=WEIGHTS):
        names = [*outputs, *([weights] if weights else [])]
        require(read_nodes(path), path, FED, *names)
        self._tf = tf = _import_tensorflow()
        tf.config.experimental.enable_tensor_float_32_execution(False)
        self.path, graph = path, tf.Graph()
        with graph.as_default():
            self._images = tf.compat.v1.placeholder(tf.float32, [None, None, None, 3])
            self._pool = tf.compat.v1.placeholder(tf.float32, [None, None])
            try:
                message = tf.compat.v1.GraphDef.FromString(Path(path).read_bytes())
                # Images replace the node's output, because the node may be declared for a single image.
                replaced, fetched = {f"{FED}:0": self._images}, [f"{name}:0" for name in names]
                tensors = tf.import_graph_def(message, replaced, fetched, name="")
            except (DecodeError, ValueError, tf.errors.OpError) as error:
                reason = " ".join(str(error).split())
                raise UserError(f"{path} cannot be imported by TensorFlow {tf.__version__}: {reason}") from error
            if weights:
                self._probabilities = tf.nn.softmax(tf.matmul(self._pool, tensors.pop()))
            self._outputs = tensors
        device, threads = torch.device(device), torch.get_num_threads()
        config = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=threads, inter_op_parallelism_threads=threads)
        if device.type == "cuda":
            config.gpu_options.allow_growth = True
            config.gpu_options.visible_device_list = str(device.index or 0)
        else:
            config.device_count["GPU"] = 0
        self._session = tf.compat.v1.Session(graph=graph, config=config)
        if device.type == "cuda" and not any(found.device_type == "GPU" for found in self._session.list_devices()):
            raise UserError(f"TensorFlow {tf.__version__} finds no GPU: pass --device cpu, or use the backend torch")

    def _evaluate(self, wanted, placeholder, value):
        try:
            return self._session.run(wanted, {placeholder: value.cpu().float().numpy()})
        except self._tf.errors.ResourceExhaustedError as error:
            raise MemoryError(first_line(error.message)) from error
        except self._tf.errors.InvalidArgumentError as error:  # raised by CheckNumerics
            # The other lines show where the graph was built.
            reason = [line for line in error.message.splitlines() if "[[" not in line][-1]
            raise UserError(f"{self.path}: node {error.op.name if error.op else '?'} fails ({reason})") from error

    def run(self, images):
        """The outputs, a list of tensors, for images (N, H, W, 3), uint8 or float32.

        Raises UserError if a value is not finite, MemoryError if memory runs out.
        """
        return [torch.from_numpy(value) for value in self._evaluate(self._outputs, self._images, images)]

    def probabilities(self, pool):
        """Pool features (N, 2048) -> class probabilities (N, 1008), without the bias."""
        return torch.from_numpy(self._evaluate(self._probabilities, self._pool, pool))
