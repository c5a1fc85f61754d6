"""The keys and values of tokens already seen: a ring for sliding layers, a plain buffer for full ones.

Both are the same thing, a ring whose slots are numbered by position modulo their count; a full layer's ring has a
slot for every position of the context and so never wraps. Everything is allocated once.
"""

import torch
from torch import Tensor

from gemlet.config import ModelConfig


class LayerCache:
    """One layer's ring: keys and values [B, K, slots, H]."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | str):
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def update(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Take in k and v [B, K, T, H] of the positions from `start` on; return what these T queries may look at.

        The keys returned are in order of position and end with the new ones, as `attention` wants them; but for a
        single query, which sees all of them whatever their order, the ring is handed out as it lies.
        """
        T, slots = k.shape[2], self.k.shape[2]
        end = start + T
        if T > 1 and end > slots:  # some of what the first query sees is overwritten by the last one: take it out first
            earlier = torch.arange(max(0, start - slots + 1), start, device=k.device) % slots
            seen = torch.cat((self.k[:, :, earlier], k), 2), torch.cat((self.v[:, :, earlier], v), 2)
        else:
            seen = self.k[:, :, :end], self.v[:, :, :end]  # not wrapped yet, or one query and the whole ring
        kept = min(T, slots)
        at = torch.arange(end - kept, end, device=k.device) % slots
        self.k[:, :, at] = k[:, :, -kept:]
        self.v[:, :, at] = v[:, :, -kept:]
        return seen


class KVCache:
    """A model's cache: `length` tokens seen, one `LayerCache` a layer. The model's forward pass advances it."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.length = 0
        self.max_length = max_length
        self.layers = []
        for i in range(config.num_hidden_layers):
            window = config.window(i)
            slots = max_length if window is None else min(window, max_length)
            shape = (batch, config.num_key_value_heads, slots, config.head_dim)
            self.layers.append(LayerCache(shape, dtype, device))

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self.layers)
