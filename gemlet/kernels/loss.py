"""`loss.cpp` as an operation of torch: head and cross-entropy in bf16 on a CPU that has products of such numbers.

`gemlet.loss` cuts tokens into chunks, and has the way for all else, its reference.
"""

import ctypes

import torch
from torch import Tensor

from gemlet.kernels.build import library
from gemlet.kernels.operation import call

ALIGNED = 32
"""The width is a multiple of this, and so many tokens are computed at a time."""


@torch.compiler.assume_constant_result
def available(device_type: str, dtype: torch.dtype, width: int) -> bool:
    """Whether it is there for hidden states like this, and faster than torch's products."""
    if device_type != "cpu" or dtype != torch.bfloat16 or width % ALIGNED:
        return False
    kernel = library("loss")
    return kernel is not None and bool(kernel.can_multiply())


def buffer_for(tokens: int, weight: Tensor) -> Tensor:
    """What a chunk of so many tokens is computed in."""
    return weight.new_empty(_padded(tokens), len(weight))


def _padded(tokens: int) -> int:
    return -(-tokens // ALIGNED) * ALIGNED


@torch.library.custom_op("gemlet::cross_entropy", mutates_args=("buffer", "grad_hidden", "grad_weight"))
def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore: int,
    buffer: Tensor,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    fresh: bool,
) -> Tensor:
    """The sum of -log p(target) in nats over the targets [n] that are not `ignore`, for hidden states [n, D].

    Where they are asked for, `grad_hidden` [n, D] becomes their gradient, and that of the head `weight` [V, D] becomes
    `grad_weight` [V, D] in float32 if it is fresh, else is added to it.
    """
    scored = targets[targets != ignore]
    if len(scored) and not 0 <= scored.min() <= scored.max() < len(weight):
        raise IndexError(f"targets from {scored.min()} to {scored.max()} for a vocabulary of {len(weight)}")
    assert hidden.is_contiguous() and weight.is_contiguous() and hidden.dtype == weight.dtype == buffer.dtype
    assert targets.dtype == torch.int64 and len(targets) == len(hidden)
    assert buffer.is_contiguous() and buffer.numel() >= _padded(len(hidden)) * len(weight)
    for gradient, of, dtype in ((grad_hidden, hidden, hidden.dtype), (grad_weight, weight, torch.float32)):
        assert gradient is None or (gradient.is_contiguous() and gradient.shape == of.shape and gradient.dtype == dtype)
    assert (grad_hidden is None) == (grad_weight is None), "both gradients or none"
    assert grad_weight is None or grad_weight.data_ptr() % 64 == 0, "vectors are added to it where they lie"
    tensors = (hidden, weight, targets.contiguous(), buffer, grad_hidden, grad_weight)
    sizes = (len(hidden), len(weight), hidden.shape[1], ignore, int(fresh))
    return torch.tensor(call("loss", "cross_entropy", *tensors, *sizes, result=ctypes.c_double), dtype=torch.float32)


@cross_entropy.register_fake
def _(hidden: Tensor, *_) -> Tensor:
    return hidden.new_empty((), dtype=torch.float32)
