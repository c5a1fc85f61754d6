"""A model made ready to write: several sequences, a token at a time, each as if it were alone.

`Decoder` is the contract: what `generate` runs on and the engine shares among requests. A decoder has `slots`, each of
which holds one sequence of up to `max_length` tokens: its keys and values lie in memory that is taken once. A slot has
no state but that memory. Whoever calls says at which position a token stands; nothing needs to be reset.

- `step` takes rows: each one token of one slot at one position
- `prefill` takes a prompt
- `copy` gives a slot the beginning of another one

A row's logits depend on the tokens before it in its slot, never on the other rows: on a CPU to the last bit.

`decoder(model, ...)` makes the fastest one there is for a model.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from gemlet.cache import KVCache
from gemlet.config import ModelConfig
from gemlet.model import Gemma

SPARE = 64
"""Tokens that a slot can be taken back by, and the most rows that one slot may have in a step."""


class Decoder(ABC):
    """The contract. The caller keeps to it: nothing is checked here for every token."""

    config: ModelConfig
    slots: int
    """Sequences there is room for; they are numbered from 0."""
    max_length: int
    """Tokens that each of them can hold."""
    cache: KVCache
    """The keys and values, slot by slot."""

    @abstractmethod
    def step(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        wanted: Sequence[int] | None = None,
    ) -> Tensor:
        """Take in R tokens, row i standing at `positions[i]` of `slots[i]`; float32 logits [R, V] of what follows.

        Several rows of one slot, at most SPARE of them, stand one behind the other in ascending positions. A position
        is at most one beyond what its slot holds, and at most SPARE before the last one it was ever given: what was
        there and behind it is forgotten. `wanted` names the rows whose logits are returned, in its order; unset: all.
        """

    @abstractmethod
    def prefill(self, slot: int, ids: Sequence[int], start: int = 0) -> Tensor:
        """Take in ids at the positions from `start` on, any number of them; the logits [V] of what follows the last.

        With `start` 0 the slot begins a new sequence, whatever it held.
        """

    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first `length` positions of `target` those of `source`, which is not changed.

        `length` lies at most SPARE before the last position that `source` was ever given, see `remembers`.
        """
        for layer in self.cache.layers:
            for memory in (layer.k, layer.v):
                kept = min(length, memory.shape[2])  # a ring that has wrapped is copied whole
                memory[target, :, :kept] = memory[source, :, :kept]

    def remembers(self, held: int, length: int) -> bool:
        """Whether a slot that holds `held` tokens still knows what its first `length` need: `copy`, or going back."""
        window = self.config.sliding_window
        return length <= held and (held <= min(window + SPARE, self.max_length) or held - length <= SPARE)


class TorchDecoder(Decoder):
    """The contract in plain torch, on any device: the reference, and what runs where nothing faster does.

    A row at a time, since the matrix products of several rows round differently from those of one.
    """

    def __init__(self, model: Gemma, slots: int, max_length: int, cache_dtype: torch.dtype | None = None):
        self.model, self.config = model, model.config
        self.slots, self.max_length = slots, max_length
        self.cache = KVCache(model.config, slots, max_length, cache_dtype or model.dtype, model.device, SPARE)

    @torch.inference_mode()
    def step(self, tokens, slots, positions, wanted=None) -> Tensor:
        """See `Decoder.step`."""
        rows = [
            self._take([token], slot, position) for token, slot, position in zip(tokens, slots, positions, strict=True)
        ]
        kept = rows if wanted is None else [rows[i] for i in wanted]
        return torch.cat([self.model.head(row) for row in kept])

    @torch.inference_mode()
    def prefill(self, slot, ids, start=0) -> Tensor:
        """See `Decoder.prefill`."""
        hidden = None
        for at in range(0, len(ids), PREFILL_CHUNK):
            hidden = self._take(ids[at : at + PREFILL_CHUNK], slot, start + at)
        assert hidden is not None, "no ids"
        return self.model.head(hidden)[0]

    def _take(self, ids: Sequence[int], slot: int, position: int) -> Tensor:
        """The hidden state [1, D] behind the last of these tokens of one slot."""
        ids = torch.as_tensor(ids, device=self.model.device)[None]
        return self.model.model(ids, self.cache.row(slot, position))[:, -1]


PREFILL_CHUNK = 512
"""Prompt tokens taken in at once: the memory of a long prompt grows with its length, not with its square."""


def decoder(model: Gemma, slots: int, max_length: int) -> Decoder:
    """A decoder for a model, whose weights are shared, not copied, and must not change while it is used.

    `max_length` is at most the model's context.
    """
    return TorchDecoder(model, slots, max_length)
