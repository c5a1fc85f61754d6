"""How a token is chosen: what may be set, and the steps from logits to a token, in numpy.

- the steps come in transformers' order: repetition penalty, temperature, top-k, top-p, min-p
- one uniform number chooses a token, so a seed means the same draws on every device

`gemlet.eager` has the same steps in torch, for logits on a GPU; they are this file's reference.
"""

import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TypedDict

import numpy as np

from gemlet.config import ModelConfig
from gemlet.errors import GemletError

TINY, HUGE = 1e-30, 1e30  # numbers beyond these are 0 or infinite in float32


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. Raises a GemletError that lists every value out of its range."""

    max_new_tokens: int = 256
    """At most this many tokens, fewer where the context ends before; 0 gives nothing."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token (greedy)."""
    top_k: int | None = None
    """Only the k likeliest tokens are drawn from; unset or 0: all of them."""
    top_p: float = 0.95
    """Only the likeliest tokens that together reach this probability are drawn from (arXiv 1904.09751); 1: all."""
    min_p: float = 0.0
    """Only tokens at least this fraction as likely as the likeliest are drawn from (arXiv 2407.01082); 0: all."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens that have occurred are divided by it, negative ones multiplied (arXiv 1909.05858)."""
    seed: int | None = None
    """Sample i of a prompt draws from seed + i, whatever the other samples are; unset: other draws every time."""

    def __post_init__(self) -> None:
        def whole(value: object, low: int = 0, high: float = sys.maxsize) -> bool:
            return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high

        def number(value: object, low: float = 0, high: float = sys.float_info.max) -> bool:  # NaN: False
            return isinstance(value, Real) and not isinstance(value, bool) and value <= high and not value < low

        checks = {
            "max_new_tokens": (whole(self.max_new_tokens), "a whole number, 0 or more"),
            "temperature": (number(self.temperature), "a finite number, 0 (greedy) or more"),
            "top_k": (self.top_k is None or whole(self.top_k), "a whole number, 0 (off) or more"),
            "top_p": (number(self.top_p, sys.float_info.min, 1), "a number above 0, up to 1 (off)"),
            "min_p": (number(self.min_p, 0, 1), "a number from 0 (off) to 1"),
            "repetition_penalty": (
                number(self.repetition_penalty, sys.float_info.min),
                "a finite number above 0; 1 is off",
            ),
            "seed": (self.seed is None or whole(self.seed, 0, 2**62), "a whole number from 0 to 2**62"),
        }
        problems = [
            f"{name} is {getattr(self, name)!r:.30}, but must be {wanted}"
            for name, (ok, wanted) in checks.items()
            if not ok
        ]
        if problems:
            raise GemletError("; ".join(problems))


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingParams`, for functions that take them as keyword arguments."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None


def checked(
    config: ModelConfig, prompt_ids: Sequence[int], params: SamplingParams, room: int | None = None
) -> tuple[list[int], int]:
    """The prompt's ids and the number of tokens that may follow in a context of `room` tokens, or an error."""
    ids, context = [int(i) for i in prompt_ids], room or config.max_position_embeddings
    if not ids:
        raise GemletError("the prompt has no tokens; begin with the begin-of-text token or give some text")
    wrong = next((i for i in ids if not 0 <= i < config.vocab_size), None)
    if wrong is not None:
        raise GemletError(
            f"the prompt has token {wrong}, but the model's vocabulary is 0 to {config.vocab_size - 1}; "
            "was it encoded by another model's tokenizer?"
        )
    left = context - len(ids)
    if left < min(1, params.max_new_tokens):
        raise GemletError(
            f"the prompt has {len(ids)} tokens and up to {params.max_new_tokens} are to follow, but the "
            f"context is {context}; shorten the prompt to {context - 1} tokens or fewer"
        )
    return ids, min(left, params.max_new_tokens)


class Draws:
    """The uniform numbers of a seed, in [0, 1): those of `torch.rand(1)`, so that a seed tells what it always told."""

    def __init__(self, seed: int):
        self._state = np.random.RandomState(seed % 2**32)  # the Mersenne Twister, seeded as torch seeds its own

    def __call__(self) -> float:
        """The next one."""
        return int.from_bytes(self._state.bytes(4), "little") % 2**24 / 2**24


def draws(params: SamplingParams, num_samples: int) -> list[Draws]:
    """Where sample 0, 1, ... of a prompt draw their numbers from."""
    seed = secrets.randbits(62) if params.seed is None else params.seed
    return [Draws(seed + i) for i in range(num_samples)]


@np.errstate(over="ignore", under="ignore")
def penalise(logits: np.ndarray, seen: Sequence[int], penalty: float) -> np.ndarray:
    """The logits [V] with the repetition penalty on those of the tokens in `seen`."""
    by, limit = np.float32(min(max(penalty, TINY), HUGE)), np.finfo(np.float32).max
    tokens = np.unique(np.asarray(seen, dtype=np.int64))
    some = logits[tokens]
    penalised = logits.copy()
    penalised[tokens] = np.where(some > 0, some / by, some * by).clip(-limit, limit)
    return penalised


@np.errstate(over="ignore", under="ignore")
def probabilities(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Logits [V] to the probabilities [V] that a token is drawn by; for a temperature above 0."""
    temperature = np.float32(min(max(params.temperature, TINY), HUGE))
    p = np.exp((logits - logits.max()) / temperature)  # at most 1: nothing overflows
    V = len(p)
    if params.top_k and params.top_k < V:
        p[p < np.partition(p, V - params.top_k)[V - params.top_k]] = 0  # tokens as likely as the last one stay, too
    p /= p.sum()
    if params.top_p < 1:
        # All tokens below (1 - top_p) / V hold less than 1 - top_p together, so they are out: sort only the others.
        likely = np.flatnonzero(p >= min((1 - params.top_p) / V, p.max()))
        likely = likely[np.argsort(-p[likely], kind="stable")]
        before = p[likely].cumsum() - p[likely]
        kept = likely[before < max(params.top_p, TINY)]
        p, all_of_them = np.zeros_like(p), p
        p[kept] = all_of_them[kept]
    if params.min_p > 0:
        p[p < params.min_p * p.max()] = 0
    return p / p.sum()


def sample(logits: np.ndarray, params: SamplingParams, draw: Draws, seen: Sequence[int] = ()) -> int:
    """Choose a token from finite logits [V], float32. Only the repetition penalty reads `seen`, the text so far."""
    if params.repetition_penalty != 1:
        logits = penalise(logits, seen, params.repetition_penalty)
    if params.temperature == 0:
        return int(logits.argmax())
    # the first token whose cumulative probability reaches a point in (0, 1]: never one of probability 0
    cumulative = probabilities(logits, params).cumsum()
    return int(cumulative.searchsorted((1 - draw()) * cumulative[-1]))
