"""Cross-entropy over a large vocabulary without the full logits.

The head and the loss are computed chunk by chunk of tokens, and each chunk's gradients at once, while its logits
are still at hand: whatever the batch, no more logits exist at a time than those of a chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""A target that is not scored."""

CHUNK_LOGITS = 2**22
"""Logits alive at a time: 16 MiB in float32, which stays in a CPU's cache and keeps a GPU busy enough."""

CHUNK_TOKENS = 256
"""A chunk has at least so many tokens: the head and its gradient are read, and the gradient written, for each one."""


PIECE_ROWS = 512
"""Rows of the head in one product, in float32 on a CPU: MKL takes two thirds of the time of a product with all."""


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


def _chunk_tokens(weight: Tensor) -> int:
    return max(CHUNK_TOKENS, CHUNK_LOGITS // len(weight))


def _chunks(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return x.split(_chunk_tokens(weight))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        w = weight.to(hidden.dtype)
        total = hidden.new_zeros((), dtype=torch.float32)
        needed = hidden.requires_grad or weight.requires_grad
        grad_hidden = torch.empty_like(hidden) if needed else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needed else None
        # One buffer for all chunks (memory of this size is dear to get), and one more where products are in half
        # precision. In turn they hold the logits, their log-softmax, and the gradient.
        shape = (min(_chunk_tokens(w), len(hidden)), len(w))
        float_buffer = hidden.new_empty(shape, dtype=torch.float32)
        buffer = float_buffer if hidden.dtype == torch.float32 else hidden.new_empty(shape)
        at = 0
        for h, t in zip(_chunks(hidden, w), _chunks(targets, w), strict=True):
            scored = (t != IGNORE)[:, None]
            t = t[:, None].where(scored, 0)
            products, p = buffer[: len(h)], float_buffer[: len(h)]
            _multiply(h, w, products)
            torch.log_softmax(products, -1, dtype=torch.float32, out=p)
            total -= (p.gather(1, t) * scored).sum()
            if grad_hidden is not None and grad_weight is not None:
                # d loss / d logits = softmax - one-hot; what is not scored is left out of the small factor
                p.exp_().scatter_add_(1, t, p.new_full((), -1.0).expand_as(t))
                if products.dtype != p.dtype:
                    products.copy_(p)
                torch.mm(products, w, out=grad_hidden[at : at + len(h)]).mul_(scored)
                _add_product(grad_weight, products.T, h * scored)
            at += len(h)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        """In place, since a copy of the weight's gradient may be most of the memory; a second call is an error."""
        (scale,) = grad_outputs
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(scale), grad_weight.mul_(scale).to(ctx.weight_dtype), None


def _multiply(h: Tensor, w: Tensor, out: Tensor) -> None:
    """out = h @ w.T."""
    rows = PIECE_ROWS if h.device.type == "cpu" and h.dtype == torch.float32 else len(w)
    for part, columns in zip(w.split(rows), out.split(rows, dim=1), strict=True):
        torch.mm(h, part.T, out=columns)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b without a temporary of its size; total is in float32, a and b perhaps in half precision."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    rows = max(1, CHUNK_LOGITS // total.shape[1])
    for part, factor in zip(total.split(rows), a.split(rows), strict=True):
        part += factor @ b
