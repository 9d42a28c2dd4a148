"""CUDA graphs: capture the GPU work of a function once and launch it as a whole."""

import time
from collections.abc import Callable

import torch
from torch import Tensor


class GraphedFunction:
    """A function of tensors, captured as a CUDA graph for each new set of shapes and then replayed.

    function: (*tensors) -> tensor, on one device. Every call must do the same work: it reads nothing back from the
    device, and random numbers come in as arguments.
    seconds: time spent on capturing so far, with the run that warms up.

    Arguments are copied into tensors of the graph and the result is copied out, so a result stays valid after the next
    call. On a CPU, which has no graphs, the function itself runs on those tensors.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._captured: dict[tuple, tuple[list[Tensor], Callable[[], Tensor]]] = {}
        self.seconds = 0.0

    @torch.inference_mode()
    def __call__(self, *tensors: Tensor) -> Tensor:
        """Return the result of the function as a new tensor."""
        key = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
        if key not in self._captured:
            start = time.perf_counter()
            self._captured[key] = self._capture(tensors)
            self.seconds += time.perf_counter() - start
        static, replay = self._captured[key]
        for target, tensor in zip(static, tensors):
            target.copy_(tensor)
        return replay().clone()

    def _capture(self, tensors: tuple[Tensor, ...]) -> tuple[list[Tensor], Callable[[], Tensor]]:
        """Copies of `tensors`, and a function without arguments that computes from these copies."""
        static = [tensor.clone() for tensor in tensors]
        if static[0].device.type != "cuda":
            return static, lambda: self._function(*static)
        # Streams are those of the tensors' device, which need not be the current one of this process.
        with torch.cuda.device(static[0].device):
            # A first run outside the graph does what happens only once: compiling, choosing algorithms, workspaces.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._function(*static)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # "thread_local", because other threads of the process may use the device meanwhile, to decode.
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
                output = self._function(*static)
            torch.cuda.synchronize()

        def replay() -> Tensor:
            graph.replay()
            return output

        return static, replay
