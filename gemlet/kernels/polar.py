"""`polar.cpp` as an operation of torch: Muon's updates made orthogonal, on a CPU that has products in bf16.

`gemlet.optim` has the polynomials and the way for all else, its reference.
"""

import torch
from torch import Tensor

from gemlet.kernels.build import library
from gemlet.kernels.operation import call, of_dtype, operation

ALIGNED = 32
"""Both sides of a matrix are multiples of this."""

DTYPES = (torch.float32, torch.bfloat16)


def available(x: Tensor) -> bool:
    """Whether it is there for matrices [n, rows, columns] like these."""
    if x.device.type != "cpu" or x.dtype not in DTYPES or any(n % ALIGNED for n in x.shape[1:]):
        return False
    kernel = library("polar")
    return kernel is not None and bool(kernel.can_multiply())


@operation
def polar(x: Tensor, polynomials: list[float]) -> Tensor:
    """x [n, rows, columns], each divided by its norm and put through a x + (b x x^T + c (x x^T)^2) x, computed in bf16.

    `polynomials` are a, b and c of one after another. The result is in x's dtype.
    """
    assert x.dtype in DTYPES and len(polynomials) % 3 == 0, "three numbers for each polynomial"
    x = x.contiguous()
    out = torch.empty_like(x)
    call("polar", of_dtype("orthogonalise", x.dtype), x, out, *x.shape, polynomials, len(polynomials) // 3)
    return out
