"""`train.cpp` as operations of torch: what a training step computes between its matrix products on a CPU.

Each is the fast way of what stands in plain torch elsewhere, its reference. It asks for a C++ compiler, once.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gemlet.kernels.build import library

DTYPES = (torch.float32, torch.bfloat16)
POINTER, SIZE = ctypes.c_void_p, ctypes.c_int64


@torch.compiler.assume_constant_result
def available(device_type: str, dtype: torch.dtype) -> bool:
    """Whether they are there for tensors like this."""
    return device_type == "cpu" and dtype in DTYPES and library("train") is not None


@torch.library.custom_op("gemlet::geglu", mutates_args=())
def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """`gelu(gate) * up`, [...] each, with the tanh form of GELU."""
    assert gate.dtype == up.dtype and gate.shape == up.shape, "what is multiplied is alike"
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _function("geglu", gate.dtype, 3 * [POINTER] + [SIZE])(*_places(gate, up, out), gate.numel(), _threads())
    return out


@torch.library.custom_op("gemlet::geglu_backward", mutates_args=())
def geglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, from that of the result."""
    assert grad.dtype == gate.dtype == up.dtype and grad.shape == gate.shape == up.shape, "what is multiplied is alike"
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    gradients = torch.empty_like(gate), torch.empty_like(up)
    places = _places(grad, gate, up, *gradients)
    _function("geglu_backward", gate.dtype, 5 * [POINTER] + [SIZE])(*places, gate.numel(), _threads())
    return gradients


@torch.library.custom_op("gemlet::softmax_to_gradient", mutates_args=("logits",))
def softmax_to_gradient(logits: Tensor, targets: Tensor, vocabulary: int, ignore: int) -> Tensor:
    """The contract of `loss._to_gradient`: logits [n, at least `vocabulary`], targets [n] of int64."""
    scored = targets[targets != ignore]
    if len(scored) and not 0 <= scored.min() <= scored.max() < vocabulary:
        raise IndexError(f"targets from {scored.min()} to {scored.max()} for a vocabulary of {vocabulary}")
    assert logits.is_contiguous() and targets.dtype == torch.int64 and len(targets) == len(logits)
    targets = targets.contiguous()
    function = _function("softmax_to_gradient", logits.dtype, 2 * [POINTER] + 4 * [SIZE], ctypes.c_double)
    places = _places(logits, targets)
    return torch.tensor(function(*places, *logits.shape, vocabulary, ignore, _threads()), dtype=torch.float32)


def softmax_between(scores: Tensor, first: Tensor, seen: int) -> None:
    """Scores [B, N, queries, keys] become their softmax over the keys that a query sees, and 0 elsewhere.

    The first query sees the `seen` first keys, each next one more; none sees a key before `first` ([1 or B, queries]).
    For use inside of an operation: alone, torch would not know that the scores have changed.
    """
    assert scores.is_contiguous() and first.stride(-1) == 1 and first.dtype == torch.int64
    function = _function("softmax_between", scores.dtype, 2 * [POINTER] + 6 * [SIZE])
    stride = first.stride(0) if len(first) > 1 else 0
    function(*_places(scores, first), stride, *scores.shape, seen, _threads())


@geglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@geglu_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return geglu(gate, up), geglu(gate, up)


@softmax_to_gradient.register_fake
def _(logits: Tensor, targets: Tensor, vocabulary: int, ignore: int) -> Tensor:
    return logits.new_empty((), dtype=torch.float32)


def _function(name: str, dtype: torch.dtype, types: list[type], result: type | None = None) -> Callable[..., Any]:
    kernel = library("train")
    assert kernel is not None, "ask whether it is available"
    function = kernel[f"{name}_{str(dtype).removeprefix('torch.')}"]
    function.argtypes, function.restype = [*types, ctypes.c_int], result
    return function


def _places(*tensors: Tensor) -> list[int]:
    return [x.data_ptr() for x in tensors]


def _threads() -> int:
    return torch.get_num_threads()
