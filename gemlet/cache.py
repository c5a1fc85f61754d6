"""The keys and values of tokens already seen: a ring for sliding layers, a plain buffer for full ones.

Both are the same thing, a ring whose places are numbered by position modulo their count; a full layer's ring has a
place for every position of the context and so never wraps. Everything is allocated once.
"""

import copy

import torch
from torch import Tensor

from gemlet.config import ModelConfig


class LayerCache:
    """One layer's ring: keys and values [B, K, places, H]."""

    def __init__(self, k: Tensor, v: Tensor):
        self.k = k
        self.v = v

    def update(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Take in k and v [B, K, T, H] of the positions from `start` on; return what these T queries may look at.

        The keys returned are in order of position and end with the new ones, as `attention` wants them.
        """
        T, places, dtype = k.shape[2], self.k.shape[2], k.dtype
        end = start + T
        k, v = k.to(self.k.dtype), v.to(self.v.dtype)  # what a later query will see, this one sees too
        # some of what the first query sees may be overwritten by the last one: take it out first
        earlier = torch.arange(max(0, start - places + 1), start, device=k.device) % places
        before = (self.k[:, :, earlier], self.v[:, :, earlier]) if end > places else None
        kept = min(T, places)
        at = torch.arange(end - kept, end, device=k.device) % places
        self.k[:, :, at] = k[:, :, -kept:]
        self.v[:, :, at] = v[:, :, -kept:]
        if before is None:
            return self.k[:, :, :end].to(dtype), self.v[:, :, :end].to(dtype)
        return torch.cat((before[0], k), 2).to(dtype), torch.cat((before[1], v), 2).to(dtype)


class KVCache:
    """A model's cache: `length` tokens seen, one `LayerCache` a layer. The model's forward pass advances it.

    `spare` places beyond the window let a sequence go back: after a token at position p its `length` may be set to
    anything from p - spare on, and what follows is as if the tokens behind had never been there.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        spare: int = 0,
    ):
        self.length = 0
        self.max_length = max_length
        self.layers = []
        for i in range(config.num_hidden_layers):
            shape = (batch, config.num_key_value_heads, config.places(i, max_length, spare), config.head_dim)
            k, v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
            self.layers.append(LayerCache(k, v))

    def row(self, i: int, length: int) -> "KVCache":
        """Sequence i of the batch alone, `length` tokens seen: the same memory, not a copy."""
        view = copy.copy(self)
        view.length = length
        view.layers = [LayerCache(layer.k[i : i + 1], layer.v[i : i + 1]) for layer in self.layers]
        return view

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self.layers)
