"""Causal attention, full or sliding: one contract, a reference for reading, and the ways to compute it fast.

The contract of every function here, `attention(q, k, v, *, window, scale)`:

- q is [B, N, T, H], k and v are [B, K, S, H] with K dividing N and T <= S; the result is [B, N, T, H] in q's dtype.
- The T queries stand at the last T of the S positions. A query at position i sees the keys j with j <= i and,
  where there is a window, j > i - window (Gemma 3's rule: the window counts the query itself).
- Scores are scaled by `scale`; the softmax is taken in float32.

`attention` picks the way; `reference` is what the others are tested against, forwards and backwards.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float) -> Tensor:
    """The contract above, by the cheapest exact way; a sliding layer's cost grows with T * window, never T * T."""
    T, S = q.shape[2], k.shape[2]
    if window is not None and window >= S:
        window = None  # the window holds everything: plain causal attention
    if T == S and window is None:
        return _sdpa(q, k, v, scale=scale, is_causal=True)
    if T == S and window is not None and T > 2 * window:
        return block_local(q, k, v, window=window, scale=scale)
    if T == 1:
        last = S if window is None else window
        return _sdpa(q, k[:, :, -last:], v[:, :, -last:], scale=scale)  # one query sees all that is left: no mask
    return _sdpa(q, k, v, scale=scale, attn_mask=visible(T, S, window, q.device))


def visible(T: int, S: int, window: int | None, device: torch.device | None = None) -> Tensor:
    """The mask of the contract as bool [T, S]: True where a query sees a key."""
    i = torch.arange(S - T, S, device=device)[:, None]
    j = torch.arange(S, device=device)[None, :]
    return (j <= i) if window is None else (j <= i) & (j > i - window)


def reference(q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float) -> Tensor:
    """The contract, written for reading: every score, masked, softmax, weighted sum. T * S in time and memory."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("bnth,bnsh->bnts", q.float(), k.float()) * scale
    scores = scores.masked_fill(~visible(q.shape[2], k.shape[2], window, q.device), -torch.inf)
    return torch.einsum("bnts,bnsh->bnth", scores.softmax(-1), v.float()).to(q.dtype)


def block_local(q: Tensor, k: Tensor, v: Tensor, *, window: int, scale: float) -> Tensor:
    """Sliding attention for T == S > window: blocks of `window` queries, each against its own and the previous block.

    T * 2 * window scores in time, one [window, 2 * window] mask in memory. Plain torch: any device, differentiable.
    """
    B, N, T, H = q.shape
    K, W = k.shape[1], window
    head = _sdpa(q[:, :, :W], k[:, :, :W], v[:, :, :W], scale=scale, is_causal=True)  # has no previous block
    n = -(-T // W) - 1  # blocks after the first
    pad = (n + 1) * W - T
    q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))  # the padding lies in every query's future
    q = q[:, :, W:].reshape(B, N, n, W, H).transpose(1, 2).reshape(B * n, N, W, H)
    k, v = (x.unfold(2, 2 * W, W).permute(0, 2, 1, 4, 3).reshape(B * n, K, 2 * W, H) for x in (k, v))
    tail = _sdpa(q, k, v, scale=scale, attn_mask=visible(W, 2 * W, W, q.device))
    tail = tail.reshape(B, n, N, W, H).transpose(1, 2).reshape(B, N, n * W, H)
    return torch.cat((head, tail), 2)[:, :, :T]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """torch's fused attention. On the CPU its kernel wants as many key heads as query heads, so they are repeated."""
    group = q.shape[1] // k.shape[1]
    if group > 1 and q.device.type == "cpu":
        k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=group > 1, **options)
