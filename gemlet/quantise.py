"""Weights in fewer bits: whole numbers times scales, for matrices that are read more often than computed with.

`FORMATS` are the ways to keep a matrix [out, in]. A `Packed` knows its values again: `unpack` gives what the decoder
computes with, so that every format has a reference. numpy has no bfloat16: its bits are a uint16 here.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from gemlet.host import threads

FORMATS = ("fp32", "bf16", "int8", "int4")
"""In the order of the kernels' numbers. int8: a scale a row. int4: a scale in bf16 for every 32 columns."""
GROUP = 32
ROWS = 128
"""Rows that are packed at a time: they stay in a processor's cache meanwhile."""
_T = TypeVar("_T")


def widened(values: np.ndarray) -> np.ndarray:
    """Floats, or the bits of bfloat16, as float32; float32 itself is not copied."""
    if values.dtype != np.uint16:
        return values.astype(np.float32, copy=False)
    return (values.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    """Finite float32 as the bits of the nearest bfloat16, the even one of two."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def matrix_format(name: str, format: str) -> str:
    """Never 4 bits for the embedding and the head: they are what the logits depend on most."""
    return "int8" if format == "int4" and ("embed_tokens" in name or "lm_head" in name) else format


@dataclass(frozen=True)
class Packed:
    """A matrix [rows, columns] as it lies in memory."""

    format: str
    values: np.ndarray
    """[rows, columns] in the format's dtype; int4: uint8 [rows, columns / 32 * 18], see kernels/decode.cpp."""
    scales: np.ndarray | None = None
    """float32 [rows], for int8."""

    def unpack(self) -> np.ndarray:
        """The values [rows, columns] in float32."""
        if self.scales is not None:
            return self.values * self.scales[:, None]
        if self.format != "int4":
            return widened(self.values)
        groups = self.values.reshape(len(self.values), -1, 18)
        scales = widened(np.ascontiguousarray(groups[..., :2]).view(np.uint16))  # [rows, groups, 1]
        pairs = groups[..., 2:].astype(np.int8)
        numbers = np.concatenate((pairs & 15, pairs >> 4 & 15), -1) - np.int8(8)
        return (numbers * scales).reshape(len(self.values), -1)


def pack(weight: np.ndarray, format: str) -> Packed:
    """Keep a matrix [rows, columns], float32 or the bits of bfloat16, in a format; in its own it is not copied.

    int4 needs whole groups of columns; a matrix that has none is kept in int8.
    """
    if format == "fp32":
        return Packed(format, np.ascontiguousarray(widened(weight)))
    if format == "bf16":
        return Packed(format, np.ascontiguousarray(weight) if weight.dtype == np.uint16 else narrowed(weight))
    if format == "int8" or weight.shape[1] % GROUP:
        parts = _in_parts(_int8, weight)
        return Packed("int8", np.concatenate([values for values, _ in parts]), np.concatenate([s for _, s in parts]))
    return Packed("int4", np.concatenate(_in_parts(_int4, weight)))


def _in_parts(packed: Callable[[np.ndarray], _T], weight: np.ndarray) -> list[_T]:
    parts = (weight[at : at + ROWS] for at in range(0, len(weight), ROWS))
    with ThreadPoolExecutor(threads()) as pool:  # numpy lets others run while it computes
        return list(pool.map(lambda part: packed(widened(part)), parts))


def _int8(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales = np.maximum(np.abs(w).max(1), np.float32(1e-30)) / np.float32(127)
    return np.rint(w / scales[:, None]).astype(np.int8), scales


def _int4(w: np.ndarray) -> np.ndarray:
    """The scale of each group, out of a few near that of its largest value, that leaves the least squared error."""
    groups = w.reshape(len(w), -1, GROUP)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)
    best, error = np.zeros_like(largest), np.full_like(largest, np.inf)
    for step in np.arange(-9.0, -5.9, 0.25, dtype=np.float32):  # the largest is this many steps
        scale = widened(narrowed(largest / step))
        off = np.square(groups - _rounded(groups, scale) * scale).sum(-1, keepdims=True)
        best, error = np.where(off < error, scale, best), np.minimum(off, error)
    q = (_rounded(groups, best) + 8).astype(np.uint8)
    pairs = q[..., : GROUP // 2] | q[..., GROUP // 2 :] << 4
    return np.concatenate((narrowed(best).view(np.uint8), pairs), -1).reshape(len(w), -1)


def _rounded(groups: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(groups / np.where(scale == 0, np.float32(1), scale)), -8, 7)
