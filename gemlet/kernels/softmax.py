"""The softmax of the loss on a GPU as one kernel, in Triton. The same in plain torch, its reference, is in `loss`.

A row of logits is read from memory, read once more while it is still in the cache, and written: what torch does in
eight passes over the logits in float32.
"""

# Triton comes with torch for a GPU alone, and its functions are no functions
# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096
"""Of a row, taken at a time."""
NEVER = tl.constexpr(-1e30)
"""Below any logit; unlike an infinity it can be taken from itself."""


def to_gradient(logits: Tensor, targets: Tensor, vocabulary: int, ignore: int) -> Tensor:
    """`loss._to_gradient`: logits [n, at least `vocabulary`], targets [n]; rows that are not scored become 0."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    known = {"WIDTH": logits.shape[1], "VOCABULARY": vocabulary, "IGNORE": ignore, "COLUMNS": COLUMNS}
    _row[(len(logits),)](logits, targets, losses, logits.stride(0), **known, num_warps=16)
    return losses.sum()


@triton.jit
def _row(
    logits,
    targets,
    losses,
    stride,
    WIDTH: tl.constexpr,
    VOCABULARY: tl.constexpr,
    IGNORE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    target = tl.load(targets + row)
    scored = target != IGNORE
    right = tl.load(logits + tl.where(scored, target, 0)).to(tl.float32)  # before any of the row is written
    columns = tl.arange(0, COLUMNS)
    # of each column so far: the largest, and the sum of exp(x - top); one column waits for the others at the end alone
    tops, totals = tl.full((COLUMNS,), NEVER, tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, VOCABULARY, COLUMNS):
        at = start + columns
        x = tl.load(logits + at, mask=at < VOCABULARY, other=NEVER).to(tl.float32)
        higher = tl.maximum(tops, x)
        totals = totals * tl.exp(tops - higher) + tl.exp(x - higher)
        tops = higher
    top = tl.max(tops, 0)
    total = tl.sum(totals * tl.exp(tops - top), 0)
    tl.store(losses + row, tl.where(scored, top + tl.log(total) - right, 0.0))
    scale = tl.where(scored, 1.0, 0.0)
    for start in range(0, WIDTH, COLUMNS):
        at = start + columns
        x = tl.load(logits + at, mask=at < VOCABULARY, other=-float("inf")).to(tl.float32)
        p = tl.exp(x - top) / total - tl.where(at == target, 1.0, 0.0)
        tl.store(logits + at, (p * scale).to(logits.dtype.element_ty), mask=at < WIDTH)
