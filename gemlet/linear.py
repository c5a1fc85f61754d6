"""Products with weights: by a kernel where there is one, else with a way back that is cut for the cores of a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gemlet.kernels import linear as kernel


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., inputs] @ weight [outputs, inputs].T, computed in x's dtype whatever that of the weight."""
    if together(x, weight):
        return linears(x, weight)[0]
    halved = x.device.type == "cpu" and x.dtype != torch.float32 and x[..., 0].numel() % 2 == 0
    return _Linear.apply(x, weight) if halved else F.linear(x, weight.to(x.dtype))


def together(x: Tensor, *weights: Tensor) -> bool:
    """Whether there is a kernel for all products of x with weights like these: `linears` and `feed_forward`."""
    return kernel.available(x.device.type, x.dtype) and kernel.fits(x, *weights)


def linears(x: Tensor, *weights: Tensor) -> list[Tensor]:
    """`linear` for each of several weights, where they can be computed together."""
    return kernel.linear(x, weights)


def feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(geglu(gate(x), up(x))) with weights [F, D], [F, D] and [D, F], where it can be computed together."""
    return kernel.feed_forward(x, gate, up, down)[0]


class _Linear(torch.autograd.Function):
    """The gradient of the weight is the sum of those of two halves of the tokens.

    It is a small matrix out of long sums, which two cores share badly: two products, in one call, take 3 to 20 % less
    time in bf16 (docs/internals/performance.md). The halves are added in float32.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        w = weight.to(x.dtype)
        ctx.save_for_backward(x, w)
        ctx.weight_dtype = weight.dtype
        return F.linear(x, w)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        (grad,), (x, w) = grad_outputs, ctx.saved_tensors
        of_outputs, of_inputs = (y.reshape(2, -1, y.shape[-1]) for y in (grad, x))
        return grad @ w, (of_outputs.mT @ of_inputs).float().sum(0).to(ctx.weight_dtype)
