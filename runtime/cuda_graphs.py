"""CUDA graphs: what a function gives the device to do, recorded once and launched as a whole."""

import time
from collections.abc import Callable

import torch
from torch import Tensor


class GraphedFunction:
    """A function of tensors that is recorded as one CUDA graph for each set of shapes it meets, and then replayed.

    function: (*tensors) -> tensor, on one device. It does the same at each call: it reads nothing from the device, and
    what is random about it comes in with its arguments.
    seconds: what recording took so far, a run to warm up included.

    The graph reads tensors of its own, into which the arguments are copied, and its result is copied out, so a result
    stays as it is when the next is computed. On a CPU, which has no graphs, the function runs on the same tensors.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._recordings: dict[tuple, tuple[list[Tensor], Callable[[], Tensor]]] = {}
        self.seconds = 0.0

    @torch.inference_mode()
    def __call__(self, *tensors: Tensor) -> Tensor:
        """What the function returns for `tensors`, a new tensor."""
        key = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
        if key not in self._recordings:
            start = time.perf_counter()
            self._recordings[key] = self._record(tensors)
            self.seconds += time.perf_counter() - start
        static, replay = self._recordings[key]
        for own, tensor in zip(static, tensors):
            own.copy_(tensor)
        return replay().clone()

    def _record(self, tensors: tuple[Tensor, ...]) -> tuple[list[Tensor], Callable[[], Tensor]]:
        """Tensors like these, and a function without arguments that computes from them."""
        static = [tensor.clone() for tensor in tensors]
        if static[0].device.type != "cuda":
            return static, lambda: self._function(*static)
        # What happens only once (compiling, choosing algorithms, workspaces) must not be recorded.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._function(*static)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process, those that decode, may use the device meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = self._function(*static)
        torch.cuda.synchronize()

        def replay() -> Tensor:
            graph.replay()
            return output

        return static, replay
