"""`train.cpp` as operations of torch: what a training step computes between its matrix products on a CPU.

Each is the fast way of what stands in plain torch elsewhere, its reference. It asks for a C++ compiler, once.
"""

import ctypes

import torch
from torch import Tensor

from gemlet.kernels.build import library
from gemlet.kernels.operation import call, of_dtype, operation

DTYPES = (torch.float32, torch.bfloat16)


@torch.compiler.assume_constant_result
def available(device_type: str, dtype: torch.dtype) -> bool:
    """Whether they are there for tensors like this."""
    return device_type == "cpu" and dtype in DTYPES and library("train") is not None


@operation
def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """`gelu(gate) * up`, [...] each, with the tanh form of GELU."""
    assert gate.dtype == up.dtype and gate.shape == up.shape, "what is multiplied is alike"
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    call("train", of_dtype("geglu", gate.dtype), gate, up, out, gate.numel())
    return out


@operation
def geglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, from that of the result."""
    assert grad.dtype == gate.dtype == up.dtype and grad.shape == gate.shape == up.shape, "what is multiplied is alike"
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    gradients = torch.empty_like(gate), torch.empty_like(up)
    call("train", of_dtype("geglu_backward", gate.dtype), grad, gate, up, *gradients, gate.numel())
    return gradients


@torch.library.custom_op("gemlet::softmax_to_gradient", mutates_args=("logits",))
def softmax_to_gradient(logits: Tensor, targets: Tensor, vocabulary: int, ignore: int) -> Tensor:
    """The contract of `loss._to_gradient`: logits [n, at least `vocabulary`], targets [n] of int64."""
    scored = targets[targets != ignore]
    if len(scored) and not 0 <= scored.min() <= scored.max() < vocabulary:
        raise IndexError(f"targets from {scored.min()} to {scored.max()} for a vocabulary of {vocabulary}")
    assert logits.is_contiguous() and targets.dtype == torch.int64 and len(targets) == len(logits)
    name, sizes = of_dtype("softmax_to_gradient", logits.dtype), (*logits.shape, vocabulary, ignore)
    loss = call("train", name, logits, targets.contiguous(), *sizes, result=ctypes.c_double)
    return torch.tensor(loss, dtype=torch.float32)


def softmax_between(scores: Tensor, first: Tensor, seen: int) -> None:
    """Scores [B, N, queries, keys] become their softmax over the keys that a query sees, and 0 elsewhere.

    The first query sees the `seen` first keys, each next one more; none sees a key before `first` ([1 or B, queries]).
    For use inside of an operation: alone, torch would not know that the scores have changed.
    """
    assert scores.is_contiguous() and first.stride(-1) == 1 and first.dtype == torch.int64
    stride = first.stride(0) if len(first) > 1 else 0
    call("train", of_dtype("softmax_between", scores.dtype), scores, first, stride, *scores.shape, seen)


def norm_available(tensors: list[Tensor]) -> bool:
    """Whether `norm` is there for these."""
    ours = (available(x.device.type, x.dtype) and x.dtype == torch.float32 and x.is_contiguous() for x in tensors)
    return bool(tensors) and all(ours)


def norm(tensors: list[Tensor]) -> Tensor:
    """The root of the sum of all squares, of tensors in float32."""
    sizes = [x.numel() for x in tensors]
    found = call("train", "norm_float32", tensors, sizes, len(tensors), result=ctypes.c_double)
    return tensors[0].new_full((), 0.0 if found is None else found)  # None: tensors without data


@softmax_to_gradient.register_fake
def _(logits: Tensor, targets: Tensor, vocabulary: int, ignore: int) -> Tensor:
    return logits.new_empty((), dtype=torch.float32)
