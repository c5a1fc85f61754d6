"""`attention.cpp` as an operation of torch, for tensors in bf16 on a CPU that has products of such numbers.

`gemlet.attention` has the contract, the reference and the ways for all else.
"""

import torch
from torch import Tensor

from gemlet.kernels.build import library
from gemlet.kernels.operation import call, differentiable, operation

WIDTHS = range(32, 1025, 32)
"""The head dimensions that it can do: whole tiles, and a row of zeros that stands in for what is missing."""


@torch.compiler.assume_constant_result
def available(device_type: str, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether it is there for tensors like this, and faster than torch's products."""
    if device_type != "cpu" or dtype != torch.bfloat16 or head_dim not in WIDTHS:
        return False
    kernel = library("attention")
    return kernel is not None and bool(kernel.can_attend())


@operation
def attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention in which a query sees the keys from `first` ([1 or B, T], never falling) up to its own position.

    q is [B, N, T, H], k and v are [B, K, S, H], as in `gemlet.attention`. Beside the result the logarithm of each
    query's sum of exponentials, [B, N, T] in float32, from which the way back has its softmax.
    """
    out = like_heads(q)
    logsumexp = q.new_empty(q.shape[:3], dtype=torch.float32)
    _call("attention", q, k, v, first, scale, [out], [logsumexp])
    return out, logsumexp


@operation
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, first: Tensor, out: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, from that of the result."""
    gradients = like_heads(q), like_heads(k), like_heads(v)
    _call("attention_backward", q, k, v, first, scale, [out, grad, *gradients], [logsumexp.contiguous()])
    return gradients


def _call(
    name: str, q: Tensor, k: Tensor, v: Tensor, first: Tensor, scale: float, more: list[Tensor], sums: list[Tensor]
) -> None:
    """Call a function of the library, which takes where a head and a token begin from each tensor's strides."""
    q, k, v, *more = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, *more))
    first = first.contiguous()
    B, N, T, H = q.shape
    K, S = k.shape[1:3]
    assert first.dtype == torch.int64 and first.shape[1] == T and len(first) in (1, B)
    shape = [B, N, K, T, S, H, first.stride(0) if len(first) > 1 else 0]
    strides = [stride for x in (q, k, v, *more) for stride in x.stride()[:3]]
    call("attention", name, shape, strides, scale, q, k, v, first, *sums, *more)


def like_heads(x: Tensor) -> Tensor:
    """Empty, of x's shape, and laid out so that the heads of a token lie side by side, as o_proj reads them."""
    B, N, T, H = x.shape
    return x.new_empty(B, T, N, H).transpose(1, 2)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.mark_non_differentiable(output[1])
    ctx.scale = inputs[4]


@differentiable(attention, _save)
def _(ctx, grad: Tensor, _: Tensor | None):
    q, k, v, first, out, logsumexp = ctx.saved_tensors
    return *attention_backward(grad, q, k, v, first, out, logsumexp, ctx.scale), None, None
