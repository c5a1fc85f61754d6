"""`muon.cpp`: a step of Muon on a CPU that has products in bf16.

`gemlet.optim` has the same in plain torch, for all else, its reference.
"""

import torch
from torch import Tensor

from gemlet.kernels.build import library
from gemlet.kernels.operation import call

ALIGNED = 32
"""Both sides of a matrix are multiples of this."""


def available(x: Tensor) -> bool:
    """Whether it is there for a matrix like this."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.is_contiguous() or any(n % ALIGNED for n in x.shape):
        return False
    kernel = library("muon")
    return kernel is not None and bool(kernel.can_multiply())


def update(
    matrices: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    squares: list[Tensor],
    fresh: list[bool],
    lr: float,
    momentum: float,
    weight_decay: float,
    keep: float,
    polynomials: list[float],
) -> None:
    """A step in place of matrices [rows, columns] of any shapes, as `optim.Muon` describes it.

    `squares`, with as many numbers as the longer side of the matrix (its rows, if it is square), are set where they are
    `fresh`; else `keep` of them stays. `polynomials` are a, b and c of one after another.
    """
    assert len(polynomials) % 3 == 0, "three numbers for each polynomial"
    assert all(max(p.shape) == s.numel() for p, s in zip(matrices, squares, strict=True))
    assert all(x.is_contiguous() and x.dtype == torch.float32 for x in (*matrices, *momenta, *squares))
    grads = [grad.contiguous() for grad in grads]
    rows, columns = ([p.shape[side] for p in matrices] for side in (0, 1))
    sizes = rows, columns, [int(x) for x in fresh], len(matrices)
    rates = float(lr), float(momentum), float(weight_decay), keep, polynomials, len(polynomials) // 3
    call("muon", "update", matrices, grads, momenta, squares, *sizes, *rates)
