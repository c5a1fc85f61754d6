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
    window = None if window is None or window >= S else window  # one that holds everything is none
    if T == 1:  # one query sees all that the window leaves: no mask
        last = S if window is None else window
        return _sdpa(q, k[:, :, -last:], v[:, :, -last:], scale=scale)
    if q.device.type == "cpu" and T * S <= UNROLLED:
        return blocked(q, k, v, window=window, scale=scale)
    if T == S and window is None:
        return _sdpa(q, k, v, scale=scale, is_causal=True)
    if T == S and window is not None and 2 * window < T:
        return block_local(q, k, v, window=window, scale=scale)
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


UNROLLED = 1024 * 1024
"""Up to this many scores a head, the CPU multiplies block by block; beyond, the memory of the scores would tell."""


def blocked(q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float, block: int = 128) -> Tensor:
    """Blocks of queries, each against just the keys that any of them sees: two plain matrix products and a softmax.

    On a CPU this is two to four times as fast as its fused kernel, since the products run at the speed of a large
    matrix and torch.compile makes one pass of mask and softmax (benchmarks/RESULTS.md).
    """
    B, N, T, H = q.shape
    K, S = k.shape[1:3]
    out = []
    for start in range(0, T, block):
        end = min(start + block, T)
        last = S - T + end
        first = 0 if window is None else max(0, S - T + start + 1 - window)
        queries, keys, values = q[:, :, start:end], k[:, :, first:last], v[:, :, first:last]
        scores = queries.reshape(B, K, -1, H) @ keys.transpose(-1, -2)  # [B, K, N/K * block, keys]
        scores = scores.view(B, N, end - start, -1).float() * scale
        scores = scores.masked_fill(~visible(end - start, last - first, window, q.device), -torch.inf)
        weights = scores.softmax(-1).to(v.dtype).view(B, K, -1, last - first)
        out.append((weights @ values).view(B, N, end - start, H))
    return torch.cat(out, 2)


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
