"""Weights in fewer bits: whole numbers times scales, for matrices that are read more often than computed with.

`FORMATS` are the ways to keep a matrix [out, in]. A `Packed` knows its values again: `unpack` gives what the decoder
computes with, so that every format has a reference in plain torch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FORMATS = ("fp32", "bf16", "int8", "int4")
"""In the order of the kernels' numbers. int8: a scale a row. int4: a scale in bf16 for every 32 columns."""
GROUP = 32


@dataclass(frozen=True)
class Packed:
    """A matrix [rows, columns] as it lies in memory."""

    format: str
    values: Tensor
    """[rows, columns] in the format's dtype; int4: uint8 [rows, columns / 32 * 18], see kernels/decode.cpp."""
    scales: Tensor | None = None
    """float32 [rows], for int8."""

    def unpack(self) -> Tensor:
        """The values [rows, columns] in float32."""
        if self.scales is not None:
            return self.values.float() * self.scales[:, None]
        if self.format != "int4":
            return self.values.float()
        groups = self.values.view(len(self.values), -1, 18)
        scales = groups[..., :2].contiguous().view(torch.bfloat16).float()  # [rows, groups, 1]
        pairs = groups[..., 2:].int()
        return ((torch.cat((pairs & 15, pairs >> 4), -1) - 8) * scales).flatten(1)


def pack(weight: Tensor, format: str) -> Packed:
    """Keep a matrix [rows, columns] in a format; in its own dtype it is not copied.

    int4 needs whole groups of columns; a matrix that has none is kept in int8.
    """
    weight = weight.detach()
    if format in ("fp32", "bf16"):
        return Packed(format, weight.to({"fp32": torch.float32, "bf16": torch.bfloat16}[format]).contiguous())
    if format == "int8" or weight.shape[1] % GROUP:
        values, scales = zip(*(_int8(part.float()) for part in weight.split(4096)), strict=True)
        return Packed("int8", torch.cat(values), torch.cat(scales))
    return Packed("int4", torch.cat([_int4(part.float()) for part in weight.split(4096)]))


def _int8(w: Tensor) -> tuple[Tensor, Tensor]:
    scales = w.abs().amax(1).clamp_min(1e-30) / 127
    return (w / scales[:, None]).round().to(torch.int8), scales


def _int4(w: Tensor) -> Tensor:
    """The scale of each group, out of a few near that of its largest value, that leaves the least squared error."""
    groups = w.view(len(w), -1, GROUP)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best, error = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for step in torch.arange(-9.0, -5.9, 0.25).tolist():  # the largest is this many steps
        scale = (largest / step).bfloat16().float()
        off = (groups - _rounded(groups, scale) * scale).square().sum(-1, keepdim=True)
        best, error = torch.where(off < error, scale, best), torch.minimum(off, error)
    q = (_rounded(groups, best) + 8).to(torch.uint8)
    pairs = q[..., : GROUP // 2] | q[..., GROUP // 2 :] << 4
    return torch.cat((best.bfloat16().view(torch.uint8), pairs), -1).flatten(1)


def _rounded(groups: Tensor, scale: Tensor) -> Tensor:
    return (groups / torch.where(scale == 0, 1, scale)).round().clamp(-8, 7)
