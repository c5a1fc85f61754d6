"""CUDA graphs for training: what a computation launches on an NVIDIA GPU, kept and launched again at once.

A model this small has its GPU done before Python has launched the next kernel: 60 ms a step, 41 of them computing
(docs/internals/performance.md).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

WARM = 2
"""Calls that compute plainly first: meanwhile kernels are compiled and picked, and libraries take their memory."""


class Captured:
    """Runs computations that are all alike: inputs of the same shapes to a result, and gradients of `parameters`.

    The gradients of every parameter must be None at each call, and they and the result are overwritten by the next.
    What is computed must never wait for the GPU, nor depend on anything but the inputs, the parameters and other
    tensors that stay where they are. Several may share the memory of a `pool` where they run in the order of their
    first calls.
    """

    def __init__(self, pool: Any, parameters: Sequence[nn.Parameter] = ()):
        self.pool, self.parameters = pool, parameters
        self._calls = 0
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._result: Any = None
        self._gradients: list[Tensor | None] = []

    def __call__(self, compute: Callable[..., Any], *inputs: Tensor) -> Any:
        """compute(*inputs), with its gradients in the parameters."""
        self._calls += 1
        if self._calls <= WARM:
            return self._beside(compute, *inputs)
        if self._graph is None:
            self._capture(compute, *inputs)
        assert self._graph is not None
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given, non_blocking=True)
        self._graph.replay()
        for p, gradient in zip(self.parameters, self._gradients, strict=True):
            p.grad = gradient
        return self._result

    def _beside(self, compute: Callable[..., Any], *inputs: Tensor) -> Any:
        """On the stream of the capture, since libraries keep memory for each stream."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = compute(*inputs)
        current.wait_stream(self._stream)
        return result

    def _capture(self, compute: Callable[..., Any], *inputs: Tensor) -> None:
        self._inputs = tuple(x.clone() for x in inputs)
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph, self.pool, self._stream):
            self._result = compute(*self._inputs)
        self._gradients = [p.grad for p in self.parameters]
