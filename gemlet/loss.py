"""Cross-entropy over a large vocabulary without the full logits.

The head and the loss are computed chunk by chunk of tokens, and each chunk's gradients at once, while its logits
are still at hand: at no time do more than CHUNK_LOGITS logits exist, whatever the batch and the vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""A target that is not scored."""

CHUNK_LOGITS = 2**22
"""Logits alive at a time: 16 MiB in float32, which stays in a CPU's cache and keeps a GPU busy enough."""


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
    weight = weight.to(hidden.dtype)
    for h, t in zip(_chunks(flat, weight), _chunks(targets.reshape(-1), weight), strict=True):
        out.append(F.cross_entropy((h @ weight.T).float(), t, ignore_index=IGNORE, reduction="none"))
    return torch.cat(out).view(targets.shape)


def _chunks(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return x.split(max(64, CHUNK_LOGITS // weight.shape[0]))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        w = weight.to(hidden.dtype)
        needed = hidden.requires_grad or weight.requires_grad
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if needed else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needed else None
        at = 0
        for h, t in zip(_chunks(hidden, w), _chunks(targets, w), strict=True):
            logits = (h @ w.T).float()
            scored = t != IGNORE
            t = t.where(scored, 0)[:, None]
            lse = logits.logsumexp(-1, keepdim=True)
            total += ((lse - logits.gather(1, t)).squeeze(1) * scored).sum()
            if grad_hidden is not None and grad_weight is not None:
                # d loss / d logits = softmax - one-hot, in place of the logits
                g = logits.sub_(lse).exp_()
                g.scatter_add_(1, t, g.new_full((), -1.0).expand_as(t))
                g = g.mul_(scored[:, None]).to(h.dtype)
                torch.mm(g, w, out=grad_hidden[at : at + len(h)])
                grad_weight += g.T @ h
            at += len(h)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        (scale,) = grad_outputs
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * scale.to(grad_hidden.dtype), (grad_weight * scale).to(ctx.weight_dtype), None
