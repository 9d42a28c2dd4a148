"""The network of `inception.py` run by TensorFlow, from the same file and behind the same interface.

It is there to compare with. TensorFlow is loaded when a graph is, and needed for nothing else.
"""

import os

import torch
from google.protobuf.message import DecodeError

from evaluation.graph_file import read_bytes, read_nodes
from evaluation.inception import FED, POOL, SPATIAL, WEIGHTS, Extractor
from runtime.errors import UserError


def _tensorflow():
    """The module. Raises UserError where it is not installed, or cannot be loaded."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # it tells about the processor; a few lines are still printed
    try:
        import tensorflow
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"TensorFlow is needed and cannot be loaded ({reason}): pip install tensorflow, or use the backend torch"
        ) from error
    return tensorflow


class Graph(Extractor):
    """The network in a graph file in a TensorFlow session, in float32; what it returns lies on the CPU.

    device: "cpu", or a GPU as PyTorch names it. Of its memory only what is needed is taken. TF32 is switched off for
    this process. On the CPU it uses as many threads as PyTorch does when the first graph of the process is loaded.
    fed, outputs, weights: as for `inception.Graph`.
    """

    def __init__(self, path, device="cpu", fed=FED, outputs=(POOL, SPATIAL), weights=WEIGHTS):
        device = torch.device(device)
        needed = {fed, *outputs, *([weights] if weights else [])}
        missing = sorted(needed - read_nodes(path).keys())
        if missing:
            raise UserError(f"{path} has no node {missing[0]}: it is another network, or cut off")
        self._tf = tf = _tensorflow()
        tf.config.experimental.enable_tensor_float_32_execution(False)
        self.path, self._graph = path, tf.Graph()
        with self._graph.as_default():
            self._images = tf.compat.v1.placeholder(tf.float32, [None, None, None, 3])
            self._pool = tf.compat.v1.placeholder(tf.float32, [None, None])
            names = [f"{name}:0" for name in (*outputs, *([weights] if weights else []))]
            try:
                message = tf.compat.v1.GraphDef.FromString(read_bytes(path))
                # As a map, because the node itself may be declared for one image.
                tensors = tf.import_graph_def(message, {f"{fed}:0": self._images}, names, name="")
            except (DecodeError, ValueError, tf.errors.OpError) as error:
                reason = " ".join(str(error).split())
                raise UserError(f"{path} cannot be imported by TensorFlow {tf.__version__}: {reason}") from error
            if weights:
                self._probabilities = tf.nn.softmax(tf.matmul(self._pool, tensors.pop()))
            self._outputs = tensors
        on_gpu = device.type == "cuda"
        threads = torch.get_num_threads()
        config = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=threads, inter_op_parallelism_threads=threads)
        if on_gpu:
            config.gpu_options.allow_growth = True
            config.gpu_options.visible_device_list = str(device.index or 0)
        else:
            config.device_count["GPU"] = 0
        self._session = tf.compat.v1.Session(graph=self._graph, config=config)
        if on_gpu and not any(found.device_type == "GPU" for found in self._session.list_devices()):
            raise UserError(f"TensorFlow {tf.__version__} finds no GPU: name the device cpu, or use the backend torch")

    def _evaluate(self, wanted, fed, value):
        try:
            return self._session.run(wanted, {fed: value.cpu().float().numpy()})
        except self._tf.errors.ResourceExhaustedError as error:
            raise MemoryError(error.message.splitlines()[0]) from error
        except self._tf.errors.InvalidArgumentError as error:
            # Of NaN, by CheckNumerics. Its other lines tell where in the program the graph was built.
            reason = [line for line in error.message.splitlines() if "[[" not in line][-1]
            raise UserError(f"{self.path}: node {error.op.name if error.op else '?'} fails ({reason})") from error

    def run(self, images):
        """The outputs, a list of tensors, for images (N, H, W, 3), uint8 or float32.

        Raises UserError where TensorFlow finds values that are not finite, MemoryError where memory does not suffice.
        """
        return [torch.from_numpy(value) for value in self._evaluate(self._outputs, self._images, images)]

    def probabilities(self, pool):
        """Pool features (N, 2048) -> the probabilities of all classes (N, 1008), without the bias."""
        return torch.from_numpy(self._evaluate(self._probabilities, self._pool, pool))


def load_graph(path, device="cpu"):
    """The network in the graph file at `path`, run by TensorFlow.

    Raises UserError where the file is no such graph, TensorFlow does not import it, or there is no TensorFlow.
    """
    return Graph(path, device)
