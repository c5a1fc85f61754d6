"""`norm.cpp` as operations of torch: RMSNorm, alone and with RoPE behind it, and their way back on a CPU.

`gemlet.model` has the way for all else, their reference. They ask for a C++ compiler, once.
"""

import torch
from torch import Tensor

from gemlet.kernels.build import library
from gemlet.kernels.operation import call, differentiable, of_dtype, operation

DTYPES = (torch.float32, torch.bfloat16)

ALIGNED = 16
"""So many numbers are normalised at a time; what is turned are two times as many."""


@torch.compiler.assume_constant_result
def available(device_type: str, dtype: torch.dtype, size: int) -> bool:
    """Whether they are there for tensors like this, in which so many numbers are normalised together."""
    return device_type == "cpu" and dtype in DTYPES and size % ALIGNED == 0 and library("norm") is not None


@operation
def rms_norm(x: Tensor, weight: Tensor, onto: Tensor | None, eps: float) -> Tensor:
    """x [..., size] / rms(x) * (1 + weight [size]), added to `onto`, which is like x, if there is one."""
    assert onto is None or (onto.shape == x.shape and onto.dtype == x.dtype), "what is added is alike"
    x, weight, onto = x.contiguous(), _floats(weight), None if onto is None else onto.contiguous()
    out = torch.empty_like(x)
    call("norm", of_dtype("rms_norm", x.dtype), x, weight, onto, out, *_rows(x), eps)
    return out


@operation
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The gradients of x, and of the weight in float32, from that of the result, which is also that of `onto`."""
    assert grad.shape == x.shape and grad.dtype == x.dtype, "that of the result"
    grad, x, weight = grad.contiguous(), x.contiguous(), _floats(weight)
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    call("norm", of_dtype("rms_norm_backward", x.dtype), grad, x, weight, grad_x, grad_weight, *_rows(x), eps)
    return grad_x, grad_weight


@operation
def norm_and_turn(x: Tensor, weight: Tensor, cosine: Tensor, sine: Tensor, eps: float) -> Tensor:
    """x [B, T, heads, H], each head normalised with weight [H], and turned by `model.rope` [T, H] of its position.

    The result is [B, heads, T, H], with the heads of a token side by side in memory.
    """
    x, weight, cosine, sine = x.contiguous(), _floats(weight), _floats(cosine), _floats(sine)
    out = torch.empty_like(x)
    call("norm", of_dtype("norm_and_turn", x.dtype), x, weight, cosine, sine, out, *_rows(x), eps, *_heads(x, cosine))
    return out.transpose(1, 2)


@operation
def norm_and_turn_backward(
    grad: Tensor, x: Tensor, weight: Tensor, cosine: Tensor, sine: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The gradients of x, and of the weight in float32, from that of the result."""
    grad = grad.transpose(1, 2).contiguous()
    assert grad.shape == x.shape and grad.dtype == x.dtype, "that of the result"
    x, weight, cosine, sine = x.contiguous(), _floats(weight), _floats(cosine), _floats(sine)
    out = grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    name = of_dtype("norm_and_turn_backward", x.dtype)
    call("norm", name, grad, x, weight, cosine, sine, *out, *_rows(x), eps, *_heads(x, cosine))
    return grad_x, grad_weight


def _floats(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _rows(x: Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]


def _heads(x: Tensor, cosine: Tensor) -> tuple[int, int]:
    _, T, heads, H = x.shape
    assert cosine.shape == (T, H) and H % (2 * ALIGNED) == 0, "an angle for each number of a head"
    return heads, T


def _save_norm(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, onto, ctx.eps = inputs
    ctx.save_for_backward(x, weight)
    ctx.adds = onto is not None


@differentiable(rms_norm, _save_norm)
def _(ctx, grad: Tensor):
    x, weight = ctx.saved_tensors
    grad_x, grad_weight = rms_norm_backward(grad, x, weight, ctx.eps)
    return grad_x, grad_weight.to(weight.dtype), grad if ctx.adds else None, None


def _save_turned(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


@differentiable(norm_and_turn, _save_turned)
def _(ctx, grad: Tensor):
    x, weight, cosine, sine = ctx.saved_tensors
    grad_x, grad_weight = norm_and_turn_backward(grad, x, weight, cosine, sine, ctx.eps)
    return grad_x, grad_weight.to(weight.dtype), None, None, None
