"""`linear.cpp` as operations of torch: products with weights in bf16 on a CPU with AMX, and their way back.

`gemlet.linear` has the way for all else, its reference.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gemlet.kernels.build import library
from gemlet.kernels.operation import call, differentiable, of_dtype, operation

ALIGNED = 32
"""All dimensions of weights are multiples of this; fewer tokens are not worth packing the weights for."""

DTYPES = (torch.float32, torch.bfloat16)
"""Of the weights."""


@torch.compiler.assume_constant_result
def available(device_type: str, dtype: torch.dtype) -> bool:
    """Whether they are there for tensors like this, and faster than torch's products."""
    if device_type != "cpu" or dtype != torch.bfloat16:
        return False
    kernel = library("linear")
    return kernel is not None and bool(kernel.can_multiply())


def fits(x: Tensor, *weights: Tensor) -> bool:
    """Whether they can do shapes like these."""
    aligned = not any(n % ALIGNED for weight in weights for n in weight.shape)
    return aligned and all(w.dtype in DTYPES for w in weights) and x.numel() >= ALIGNED * x.shape[-1]


@operation
def linear(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """x [..., inputs] in bf16 @ weight [outputs, inputs].T for each weight, whose numbers become bf16 on the way."""
    x, weights = x.contiguous(), _alike(weights)
    out = [x.new_empty(*x.shape[:-1], len(weight)) for weight in weights]
    name = of_dtype("linear", weights[0].dtype)
    call("linear", name, x, weights, out, [len(w) for w in weights], len(weights), *_sizes(x))
    return out


@operation
def linear_backward(grad: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The gradients of x, and of the weights in float32, from those of the results, [..., outputs] in bf16."""
    x, weights, grad = x.contiguous(), _alike(weights), _alike(grad)
    assert all(g.shape == (*x.shape[:-1], len(w)) for g, w in zip(grad, weights, strict=True)), "those of the results"
    grad_x, grad_weights = torch.empty_like(x), [torch.empty_like(w, dtype=torch.float32) for w in weights]
    name, outputs = of_dtype("linear_backward", weights[0].dtype), [len(w) for w in weights]
    call("linear", name, grad, x, weights, grad_x, grad_weights, outputs, len(weights), *_sizes(x))
    return grad_x, grad_weights


@operation
def feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """down(gelu(gate(x)) * up(x)) for x [..., D] in bf16, with weights [F, D], [F, D] and [D, F].

    With it gate(x) and up(x), [..., F], of which its way back is computed.
    """
    x, weights = x.contiguous(), _alike((gate, up, down))
    out, gate_states, up_states = (x.new_empty(*x.shape[:-1], n) for n in (len(down), len(gate), len(up)))
    name = of_dtype("feed_forward", gate.dtype)
    call("linear", name, x, *weights, gate_states, up_states, out, *_sizes(x), len(gate))
    return out, gate_states, up_states


@operation
def feed_forward_backward(
    grad: Tensor, x: Tensor, gate_states: Tensor, up_states: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, and of the three weights in float32, from that of the result."""
    states, weights = _alike((grad, x, gate_states, up_states)), _alike((gate, up, down))
    assert grad.shape == x.shape, "that of the result"
    grad_x = torch.empty_like(states[1])
    grad_gate, grad_up, grad_down = (torch.empty_like(w, dtype=torch.float32) for w in weights)
    name = of_dtype("feed_forward_backward", gate.dtype)
    call("linear", name, *states, *weights, grad_x, grad_gate, grad_up, grad_down, *_sizes(x), len(gate))
    return grad_x, grad_gate, grad_up, grad_down


def _alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    assert len({x.dtype for x in tensors}) == 1, "what is computed together is alike"
    return [x.contiguous() for x in tensors]


def _sizes(x: Tensor) -> tuple[int, int]:
    """Tokens, and the numbers of one."""
    assert x.dtype == torch.bfloat16 and x.numel() >= ALIGNED * x.shape[-1], "ask whether it fits"
    return x.numel() // x.shape[-1], x.shape[-1]


def _save_linear(ctx, inputs: tuple[Tensor, list[Tensor]], output: list[Tensor]) -> None:
    ctx.save_for_backward(inputs[0], *inputs[1])


@differentiable(linear, _save_linear)
def _(ctx, grad: list[Tensor]):
    x, *weights = ctx.saved_tensors
    grad_x, grad_weights = linear_backward(grad, x, weights)
    return grad_x, [g.to(w.dtype) for g, w in zip(grad_weights, weights, strict=True)]


def _save_feed_forward(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    x, *weights = inputs
    ctx.save_for_backward(x, *output[1:], *weights)
    ctx.mark_non_differentiable(*output[1:])


@differentiable(feed_forward, _save_feed_forward)
def _(ctx, grad: Tensor, *_: Tensor | None):
    grad_x, *grad_weights = feed_forward_backward(grad, *ctx.saved_tensors)
    return grad_x, *(g.to(w.dtype) for g, w in zip(grad_weights, ctx.saved_tensors[3:], strict=True))
