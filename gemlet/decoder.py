"""A model made ready to write: several sequences, a token at a time, each as if it were alone.

`Decoder` is the contract: what `generate` runs on and the engine shares among requests. A decoder has `slots`, each of
which holds one sequence of up to `max_length` tokens: its keys and values lie in memory that is taken once. A slot has
no state but that memory. Whoever calls says at which position a token stands; nothing needs to be reset.

- `step` takes rows: each one token of one slot at one position
- `prefill` takes a prompt
- `sample` chooses a token for each row of logits
- `copy` gives a slot the beginning of another one

A row's logits depend on the tokens before it in its slot, never on the other rows: on a CPU to the last bit.

`gemlet.ready` makes the fastest one there is for a model: `gemlet.native` on a CPU, which does without torch,
`gemlet.eager` elsewhere and until the kernel of the former is compiled.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from gemlet.config import ModelConfig
from gemlet.sampling import Draws, SamplingParams

SPARE = 64
"""Tokens that a slot can be taken back by, and the most rows that one slot may have in a step."""


class Decoder(ABC):
    """The contract. The caller keeps to it: nothing is checked here for every token."""

    config: ModelConfig
    slots: int
    """Sequences there is room for; they are numbered from 0."""
    max_length: int
    """Tokens that each of them can hold."""
    rings: Sequence[tuple[Any, Any]]
    """Every layer's keys and values, [slots, K, places, H]: arrays of numpy or tensors of torch."""
    stands_in: bool = False
    """Whether it writes only until a faster one can be had."""
    guesses: int = 0
    """Rows of a slot beyond the first that cost little more than it: so many tokens are worth guessing."""

    @abstractmethod
    def step(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        wanted: Sequence[int] | None = None,
    ) -> Any:
        """Take in R tokens, row i standing at `positions[i]` of `slots[i]`; float32 logits [R, V] of what follows.

        They are an array of numpy or a tensor of torch, whichever the decoder computes with.

        Several rows of one slot, at most SPARE of them, stand one behind the other in ascending positions. A position
        is at most one beyond what its slot holds, and at most SPARE before the last one it was ever given: what was
        there and behind it is forgotten. `wanted` names the rows whose logits are returned, in its order; unset: all.
        """

    @abstractmethod
    def prefill(self, slot: int, ids: Sequence[int], start: int = 0) -> Any:
        """Take in ids at the positions from `start` on, any number of them; the logits [V] of what follows the last.

        With `start` 0 the slot begins a new sequence, whatever it held.
        """

    @abstractmethod
    def sample(
        self, logits: Any, params: Sequence[SamplingParams], draws: Sequence[Draws], texts: Sequence[Sequence[int]]
    ) -> list[int]:
        """Choose a token for each row of logits that came from here; -1 where they are not finite.

        Row i draws from `draws[i]`; only the repetition penalty reads `texts[i]`, prompt and what was written.
        """

    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first `length` positions of `target` those of `source`, which is not changed.

        `length` lies at most SPARE before the last position that `source` was ever given, see `remembers`.
        """
        for ring in self.rings:
            for memory in ring:
                kept = min(length, memory.shape[2])  # a ring that has wrapped is copied whole
                memory[target, :, :kept] = memory[source, :, :kept]

    def remembers(self, held: int, length: int) -> bool:
        """Whether a slot that holds `held` tokens still knows what its first `length` need: `copy`, or going back."""
        window = self.config.sliding_window
        return length <= held and (held <= min(window + SPARE, self.max_length) or held - length <= SPARE)
