"""Causal attention, full or sliding: one contract, a reference for reading, and the ways to compute it fast.

The contract of every function here, `attention(q, k, v, *, window, scale, starts=None)`:

- q is [B, N, T, H], k and v are [B, K, S, H] with K dividing N and T <= S; the result is [B, N, T, H] in q's dtype.
- The T queries stand at the last T of the S positions. A query at position i sees the keys j with j <= i and,
  where there is a window, j > i - window (Gemma 3's rule: the window counts the query itself).
- Where several documents share a row, starts [B, T] holds for every query the position at which its document begins,
  never falling along a row; it then sees only keys j >= starts. The positions of RoPE need no reset for this:
  what it puts into a score is the distance of query and key alone.
- Scores are scaled by `scale`; the softmax is taken in float32.

`attention` picks the way; `reference` is what the others are tested against, forwards and backwards.
"""

from collections.abc import Iterator
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from gemlet.kernels import attention as fused
from gemlet.kernels import train
from gemlet.kernels.attention import like_heads


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float, starts: Tensor | None = None
) -> Tensor:
    """The contract above, by the cheapest exact way; a sliding layer's cost grows with T * window, never T * T."""
    T, S = q.shape[2], k.shape[2]
    window = None if window is None or window >= S else window  # one that holds everything is none
    if T == 1 and starts is None:  # one query sees all that the window leaves: no mask
        last = S if window is None else window
        return _sdpa(q, k[:, :, -last:], v[:, :, -last:], scale=scale)
    if fused.available(q.device.type, q.dtype, q.shape[3]):
        return fused.attention(q, k, v, _first(T, S, window, q.device, starts), scale)[0]
    if _on_cpu(q):
        way = blocked if T * S <= UNROLLED else recomputed
        return way(q, k, v, window=window, scale=scale, starts=starts)
    if q.is_cuda and q.dtype == torch.bfloat16 and starts is None and (T < S or window is not None):
        return windowed(q, k, v, window=window, scale=scale)
    if T == S and window is not None and 2 * window < T:
        return block_local(q, k, v, window=window, scale=scale, starts=starts)
    if starts is not None:
        return recomputed(q, k, v, window=window, scale=scale, starts=starts)
    if T == S and window is None:
        return _sdpa(q, k, v, scale=scale, is_causal=True)
    return _sdpa(q, k, v, scale=scale, attn_mask=visible(T, S, window, q.device))


def visible(
    T: int, S: int, window: int | None, device: torch.device | None = None, starts: Tensor | None = None
) -> Tensor:
    """The mask of the contract as bool, True where a query sees a key: [T, S], and [B, 1, T, S] where starts are."""
    i = torch.arange(S - T, S, dtype=torch.int32, device=device)[:, None]
    j = torch.arange(S, dtype=torch.int32, device=device)[None, :]
    seen = (j <= i) if window is None else (j <= i) & (j > i - window)
    return seen if starts is None else seen & (j >= starts[:, None, :, None])


def _first(T: int, S: int, window: int | None, device: torch.device, starts: Tensor | None) -> Tensor:
    """The first key that each query sees, [1 or B, T]."""
    i = torch.arange(S - T, S, device=device)
    first = (torch.zeros_like(i) if window is None else (i - window + 1).clamp(min=0))[None]
    return first if starts is None else first.maximum(starts)


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float, starts: Tensor | None = None
) -> Tensor:
    """The contract, written for reading: every score, masked, softmax, weighted sum. T * S in time and memory."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("bnth,bnsh->bnts", q.float(), k.float()) * scale
    scores = scores.masked_fill(~visible(q.shape[2], k.shape[2], window, q.device, starts), -torch.inf)
    return torch.einsum("bnts,bnsh->bnth", scores.softmax(-1), v.float()).to(q.dtype)


UNROLLED = 1024 * 1024
"""Up to this many scores a head, the CPU keeps the softmax for the way back; beyond, its memory would tell."""


def blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    scale: float,
    starts: Tensor | None = None,
    block: int = 128,
) -> Tensor:
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
        # the queries are scaled, since there are fewer of them than scores
        scores = _Scores.apply((queries * scale).reshape(B, K, -1, H), keys)  # [B, K, N/K * block, keys]
        scores = scores.view(B, N, end - start, -1)
        begins = None if starts is None else starts[:, start:end] - first
        scores = scores.masked_fill(~visible(end - start, last - first, window, q.device, begins), -torch.inf)
        weights = scores.softmax(-1).view(B, K, -1, last - first)  # in float32 inside, whatever the dtype
        out.append((weights @ values).view(B, N, end - start, H))
    return torch.cat(out, 2)


class _Scores(torch.autograd.Function):
    """queries @ keys.mT. torch would take the gradient of keys.mT, which lies the wrong way round to be summed up."""

    @staticmethod
    def forward(ctx, queries: Tensor, keys: Tensor) -> Tensor:
        ctx.save_for_backward(queries, keys)
        return queries @ keys.mT

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        (grad,), (queries, keys) = grad_outputs, ctx.saved_tensors
        return grad @ keys, grad.mT @ queries


def recomputed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    scale: float,
    starts: Tensor | None = None,
    block: int = 128,
) -> Tensor:
    """Blocks of queries as above, but the softmax is computed again on the way back, so that no more than that of
    one block ever exists: memory is linear in T for full layers, too. Documents that a block does not see cost nothing.

    A seventh matrix product beside six; on a CPU as fast as they are (benchmarks/RESULTS.md). For torch.compile it
    is one opaque operation, so that a long sequence makes no long program.
    """
    return _recomputed(q, k, v, _first(q.shape[2], k.shape[2], window, q.device, starts), scale, block)


@torch.library.custom_op("gemlet::recomputed_attention", mutates_args=())
def _recomputed(q: Tensor, k: Tensor, v: Tensor, first: Tensor, scale: float, block: int) -> Tensor:
    """Attention in which a query sees the keys from `first` ([1 or B, T], never falling) up to its own position."""
    out = like_heads(q)
    for rows, keys, weights in _blocks(q, k, first, scale, block):
        values = v[:, :, keys].flatten(0, 1)
        out[:, :, rows] = _product(weights, values).view(out[:, :, rows].shape)
    return out


@torch.library.custom_op("gemlet::recomputed_attention_backward", mutates_args=())
def _recomputed_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, first: Tensor, scale: float, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    B, _, _, H = q.shape
    K = k.shape[1]
    grad_q = like_heads(q)
    # the sums over blocks are taken in float32
    grad_k, grad_v = (torch.zeros(x.shape, dtype=torch.float32, device=x.device).flatten(0, 1) for x in (k, v))
    for rows, keys, weights in _blocks(q, k, first, scale, block):
        upstream, queries = (x[:, :, rows].reshape(B * K, -1, H) for x in (grad, q))
        grad_v[:, keys] += _product(weights.mT, upstream)
        grad_weights = _product(upstream, v[:, :, keys].flatten(0, 1).mT)
        grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_queries = _product(grad_scores, k[:, :, keys].flatten(0, 1), scale)
        grad_q[:, :, rows] = grad_queries.view(grad_q[:, :, rows].shape)
        grad_k[:, keys] += _product(grad_scores.mT, queries)
    return grad_q, grad_k.mul_(scale).view(k.shape).to(k.dtype), grad_v.view(v.shape).to(v.dtype)


def _blocks(q: Tensor, k: Tensor, first: Tensor, scale: float, block: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of queries: which ones, the keys that any of them sees, and the softmax, [B * K, N/K * block, keys]."""
    B, N, T, H = q.shape
    K, S = k.shape[1:3]
    lows, highs = (extremes.tolist() for extremes in first.aminmax(dim=0))
    for start in range(0, T, block):
        end = min(start + block, T)
        low, late, last = lows[start], highs[end - 1] - lows[start], S - T + end
        queries, keys = q[:, :, start:end].reshape(B * K, -1, H), k[:, :, low:last].flatten(0, 1)
        scores = _product(queries, keys.mT, scale)
        _softmax(scores.view(B, N, end - start, -1), first[:, start:end] - low, late)
        yield slice(start, end), slice(low, last), scores


def _softmax(scores: Tensor, first: Tensor, late: int) -> None:
    """Scores [B, N, queries, keys] become their softmax, in float32 inside, over the keys that a query sees.

    The last query sees them up to the last one, each before it one less; none sees a key before `first` ([1 or B,
    queries]), which is at most `late`.
    """
    queries, keys = scores.shape[2:]
    if train.available(scores.device.type, scores.dtype):
        train.softmax_between(scores, first, keys - queries + 1)
        return
    # only the edges need a mask: the newest keys, and those before the last query's first one
    scores[..., -queries:].masked_fill_(~visible(queries, queries, None, scores.device), -torch.inf)
    if late > 0:
        j = torch.arange(late, device=scores.device)
        scores[..., :late].masked_fill_((j < first[..., None])[:, None], -torch.inf)
    torch.softmax(scores, -1, out=scores)


def _product(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """scale * a @ b, [n, i, j] and [n, j, k] to [n, i, k]. In a stack a CPU copies transposed ones: one goes alone."""
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    if len(a) == 1:
        torch.addmm(out[0], a[0], b[0], beta=0, alpha=scale, out=out[0])
    else:
        torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)
    return out


@_recomputed.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, first: Tensor, scale: float, block: int) -> Tensor:
    return like_heads(q)


@_recomputed_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, first: Tensor, scale: float, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    return like_heads(q), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.scale, ctx.block = inputs[4:]


@partial(_recomputed.register_autograd, setup_context=_save)
def _(ctx, grad: Tensor):
    return *_recomputed_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.block), None, None, None


def block_local(q: Tensor, k: Tensor, v: Tensor, *, window: int, scale: float, starts: Tensor | None = None) -> Tensor:
    """Sliding attention for T == S > window: blocks of `window` queries, each against its own and the previous block.

    T * 2 * window scores in time, one [window, 2 * window] mask in memory, or one for each block where there are
    starts. Plain torch: any device, differentiable.
    """
    B, N, T, H = q.shape
    K, W = k.shape[1], window
    n = -(-T // W) - 1  # blocks after the first, which has no previous one
    pad = (n + 1) * W - T
    if starts is None:
        first, mask = {"is_causal": True}, visible(W, 2 * W, W, q.device)
    else:
        first = {"attn_mask": visible(W, W, None, q.device, starts[:, :W])}
        before = torch.arange(n, device=q.device)[:, None] * W  # where the previous block begins
        begins = F.pad(starts, (0, pad))[:, W:].view(B, n, W) - before
        mask = visible(W, 2 * W, W, q.device, begins.view(B * n, W))
    head = _sdpa(q[:, :, :W], k[:, :, :W], v[:, :, :W], scale=scale, **first)
    q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))  # the padding lies in every query's future
    q = q[:, :, W:].reshape(B, N, n, W, H).transpose(1, 2).reshape(B * n, N, W, H)
    k, v = (x.unfold(2, 2 * W, W).permute(0, 2, 1, 4, 3).reshape(B * n, K, 2 * W, H) for x in (k, v))
    tail = _sdpa(q, k, v, scale=scale, attn_mask=mask)
    tail = tail.reshape(B, n, N, W, H).transpose(1, 2).reshape(B, N, n * W, H)
    return torch.cat((head, tail), 2)[:, :, :T]


GROUPED: Any = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
"""Says that there are fewer key heads than query heads; torch 2.11 does not want to be told."""


def windowed(q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float) -> Tensor:
    """FlashAttention's kernel (arXiv 2307.08691) for rows, which knows windows: NVIDIA's GPUs, 16 bits."""
    B, _, T, _ = q.shape
    S = k.shape[2]
    ends = torch.arange(B + 1, dtype=torch.int32, device=q.device)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B * T, N, H]
    seen = -1 if window is None else window - 1, 0  # before the query, which is not counted here, and behind it
    y: Any = varlen_attn(q, k, v, ends * T, ends * S, T, S, scale=scale, window_size=seen, **GROUPED)
    return y.unflatten(0, (B, T)).transpose(1, 2)


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """torch's fused attention. On the CPU its kernel wants as many key heads as query heads, so they are repeated."""
    group = q.shape[1] // k.shape[1]
    if group > 1 and q.device.type == "cpu":
        k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=group > 1, **options)
