"""GeGLU (arXiv 2002.05202), by a kernel where there is one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gemlet.kernels import train


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, [...] each, with the tanh form of GELU (arXiv 1606.08415)."""
    if train.available(gate.device.type, gate.dtype):
        return _Geglu.apply(gate, up)
    return _gelu(gate) * up


def _gelu(x: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    return x * torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))  # the same, and less to compute


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return train.geglu(gate, up)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        return train.geglu_backward(*grad_outputs, *ctx.saved_tensors)
