"""Cross-entropy over a large vocabulary without the full logits.

The head and the loss are computed chunk by chunk of tokens, and each chunk's gradients at once, while its logits
are still at hand: whatever the batch, no more logits exist at a time than those of a chunk.
"""

import functools
import math
from collections.abc import Callable
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from gemlet.kernels import loss as fused
from gemlet.kernels import train

IGNORE = -100
"""A target that is not scored."""

CHUNK_BYTES = 2**27
"""Of logits alive at a time, on a CPU."""

CHUNK_BYTES_GPU = 2**29
"""The same on a GPU, whose products want more rows to be fast."""

ALIGNED = 64
"""A GPU multiplies at full speed where rows begin at multiples of 16 bytes: its logits have so many columns, or twice
as many, and so on, whatever the vocabulary."""

CHUNK_TOKENS = 256
"""A chunk may have so many tokens in any case: the head is read, and its gradient read and written, for each chunk."""

MOST_TOKENS = 1024
"""On a CPU a chunk has no more tokens, since with a small vocabulary more only leave the cache."""

PIECE = 2**20
"""Elements that a CPU takes at a time between two products, so that they stay in its cache."""

PIECE_ROWS = 512
"""Rows of the head in one product, in float32 on a CPU: MKL takes two thirds of the time of a product with all."""

WHOLE_ROWS = 512
"""A piece of the head's gradient has a multiple of so many rows: its product takes up to a seventh less time than one
that begins anywhere (docs/internals/performance.md)."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log p(target) in nats, over the targets that are not IGNORE.

    hidden [..., D], weight [V, D], targets [...] of int64 -> float32 scalar. The sum, not the mean: who accumulates
    over micro-batches or ranks divides once, by the count of all of them. Gradients are computed in hidden's dtype.
    """
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    return _LinearCrossEntropy.apply(hidden, weight, targets)


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) in nats for every target (0 where IGNORE), [...] in float32; no gradient, chunked alike."""
    flat, out = hidden.reshape(-1, hidden.shape[-1]), []
    w = _aligned(weight.to(hidden.dtype))
    for h, t in zip(_chunks(flat, w), _chunks(targets.reshape(-1), w), strict=True):
        logits = (h @ w.T)[:, : len(weight)]
        rows = _piece_rows(logits)
        for part, of_part in zip(logits.split(rows), t.split(rows), strict=True):
            out.append(F.cross_entropy(part.float(), of_part, ignore_index=IGNORE, reduction="none"))
    return torch.cat(out).view(targets.shape)


def _chunk_tokens(tokens: int, weight: Tensor) -> int:
    """Tokens in a chunk, the same in each."""
    on_cpu = weight.device.type == "cpu"
    of_logits = (CHUNK_BYTES if on_cpu else CHUNK_BYTES_GPU) // (len(weight) * weight.element_size())
    most = max(CHUNK_TOKENS, min(MOST_TOKENS, of_logits) if on_cpu else of_logits)
    chunks = max(1, math.ceil(tokens / most))
    return max(1, math.ceil(tokens / chunks))


def _chunks(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return x.split(_chunk_tokens(len(x), weight))


def _aligned(weight: Tensor) -> Tensor:
    """On a GPU with rows of zeros to a multiple of ALIGNED."""
    missing = -len(weight) % ALIGNED
    return weight if weight.device.type == "cpu" or not missing else F.pad(weight, (0, 0, 0, missing))


def _piece_rows(x: Tensor) -> int:
    return max(1, PIECE // x.shape[1]) if x.device.type == "cpu" else len(x)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        hidden, w = hidden.contiguous(), _aligned(weight.to(hidden.dtype))
        total = hidden.new_zeros((), dtype=torch.float32)
        needed = hidden.requires_grad or weight.requires_grad
        grad_hidden = torch.empty_like(hidden) if needed else None
        grad_weight = torch.empty_like(w, dtype=torch.float32) if needed else None
        # One buffer for all chunks, since memory of this size is dear to get: logits, and then their gradient
        buffer = fused.buffer_for(_chunk_tokens(len(hidden), w), w)
        at = 0
        for h, t in zip(_chunks(hidden, w), _chunks(targets, w), strict=True):
            part = None if grad_hidden is None else grad_hidden[at : at + len(h)]
            total += _chunk(h, w, t, len(weight), buffer, part, grad_weight, fresh=at == 0)
            at += len(h)
        if grad_weight is not None:
            grad_weight.resize_(weight.shape)  # to a view of these rows autograd would add out of place
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        """In place, since a copy of the weight's gradient may be most of the memory; a second call is an error."""
        (scale,) = grad_outputs
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(scale), grad_weight.mul_(scale).to(ctx.weight_dtype), None


def _chunk(
    h: Tensor,
    w: Tensor,
    targets: Tensor,
    vocabulary: int,
    buffer: Tensor,
    grad_h: Tensor | None,
    grad_w: Tensor | None,
    fresh: bool,
) -> Tensor:
    """The loss of a chunk. Its gradients, where they are asked for: set, that of w unless it is fresh added."""
    if fused.available(h.device.type, h.dtype, h.shape[1]):
        return fused.cross_entropy(h, w, targets, IGNORE, buffer, grad_h, grad_w, fresh)
    logits = buffer[: len(h)]
    _multiply(h, w, logits)
    total = _softmax(logits.device.type, logits.dtype)(logits, targets, vocabulary, IGNORE)
    if grad_h is not None and grad_w is not None:
        torch.mm(logits, w, out=grad_h)
        _add_product(grad_w, logits.T, h, fresh)
    return total


def _multiply(h: Tensor, w: Tensor, out: Tensor) -> None:
    """out = h @ w.T."""
    rows = PIECE_ROWS if h.device.type == "cpu" and h.dtype == torch.float32 else len(w)
    for part, columns in zip(w.split(rows), out.split(rows, dim=1), strict=True):
        torch.mm(h, part.T, out=columns)


@functools.cache
def _softmax(device_type: str, dtype: torch.dtype) -> Callable[[Tensor, Tensor, int, int], Tensor]:
    """The fastest `_to_gradient` there is."""
    if device_type == "cuda":
        with suppress(ImportError):  # Triton, which comes with torch wherever it is known to work
            from gemlet.kernels.softmax import to_gradient

            return to_gradient
    return train.softmax_to_gradient if train.available(device_type, dtype) else _to_gradient


def _to_gradient(logits: Tensor, targets: Tensor, vocabulary: int, ignore: int) -> Tensor:
    """The sum of -log p(target) over what is scored; logits [n, V] become softmax - one-hot, their gradient.

    Columns beyond the vocabulary become 0, and so do rows that are not scored.
    """
    logits[:, vocabulary:] = -torch.inf
    scored = (targets != ignore)[:, None]
    targets = targets[:, None].where(scored, 0)
    total = logits.new_zeros((), dtype=torch.float32)
    rows = _piece_rows(logits)
    shape = min(rows, len(logits)), logits.shape[1]
    floats = None if logits.dtype == torch.float32 else logits.new_empty(shape, dtype=torch.float32)
    for part, t, s in zip(logits.split(rows), targets.split(rows), scored.split(rows), strict=True):
        p = part if floats is None else floats[: len(part)].copy_(part)
        target, top = p.gather(1, t), p.amax(-1, keepdim=True)
        torch.softmax(p, -1, out=p)
        # log p(target) = target - top + log p(top); p(target) itself may be 0 in float32
        total -= ((target - top + p.amax(-1, keepdim=True).log()) * s).sum()
        p.scatter_add_(1, t, p.new_full((), -1.0).expand_as(t)).mul_(s)
        if p is not part:
            part.copy_(p)
    return total


def _add_product(total: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    """total = a @ b if fresh, else total += a @ b, without a temporary of its size.

    total is in float32, a and b perhaps in half precision.
    """
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=0 if fresh else 1)
        return
    if a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=0 if fresh else 1, out=total)
        return
    rows = math.ceil(_piece_rows(total) / WHOLE_ROWS) * WHOLE_ROWS
    for part, factor in zip(total.split(rows), a.split(rows), strict=True):
        if fresh:
            part.copy_(factor @ b)
        else:
            part += factor @ b
