"""Token ids in, token ids out: sampling, prefill, decode, and the loop over them.

- `generate` is the way to use it; `generate_samples` makes several samples of one prompt in one batch
- `generate_uncached` runs the whole sequence again for every token: the reference the others are tested against
- the steps of sampling come in transformers' order: repetition penalty, temperature, top-k, top-p, min-p
- one uniform number from a generator on the CPU chooses a token, so a seed means the same draws on every device

Text, stop strings and streams of pieces are the layer above, `gemlet.lm`.
"""

import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NoReturn, TypedDict

import torch
from torch import Generator, Tensor, nn

from gemlet.config import ModelConfig
from gemlet.decoder import Ready
from gemlet.errors import GemletError
from gemlet.model import Gemma

_TINY, _HUGE = 1e-30, 1e30  # numbers beyond these are 0 or infinite in float32


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


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Apply the repetition penalty to the logits [B, V] of the tokens that are True in `seen` [B, V]."""
    penalty, limit = min(max(penalty, _TINY), _HUGE), torch.finfo(logits.dtype).max
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty).clamp(-limit, limit)
    return torch.where(seen, penalised, logits)


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Logits [B, V] to the probabilities [B, V] that a token is drawn by; for a temperature above 0."""
    temperature = min(max(params.temperature, _TINY), _HUGE)
    p = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)  # 0 at the top: nothing overflows
    V = p.shape[-1]
    if params.top_k and params.top_k < V:
        p = p.where(p >= p.topk(params.top_k).values[:, -1:], 0)  # tokens as likely as the last one stay, too
    if params.top_p < 1:
        # All tokens below (1 - top_p) / V hold less than 1 - top_p together, so they are out: sort only the others.
        p = p / p.sum(-1, keepdim=True)
        candidates = max(1, int((p >= (1 - params.top_p) / V).sum(-1).max()))
        top, token = p.topk(candidates)
        top = top.where(top.cumsum(-1) - top < max(params.top_p, _TINY), 0)
        p = torch.zeros_like(p).scatter(-1, token, top)
    if params.min_p > 0:
        p = p.where(p >= params.min_p * p.amax(-1, keepdim=True), 0)
    return p / p.sum(-1, keepdim=True)


def sample(
    logits: Tensor, params: SamplingParams, generators: Sequence[Generator], seen: Tensor | None = None
) -> Tensor:
    """Choose one token a row, [B], from logits [B, V]; row i draws from `generators[i]`, which lives on the CPU.

    `seen` [B, V] is True for the tokens that have occurred; only the repetition penalty reads it.
    """
    if seen is not None and params.repetition_penalty != 1:
        logits = penalise(logits, seen, params.repetition_penalty)
    if params.temperature == 0:
        return logits.argmax(-1)
    p = probabilities(logits, params)
    # The first token whose cumulative probability reaches a point in (0, 1]. Never one of probability 0, even where a
    # parallel sum rounds such that it is not quite monotonic.
    cumulative = p.cumsum(-1).where(p > 0, 0)
    point = 1 - torch.stack([torch.rand(1, generator=generator) for generator in generators]).to(p.device)
    return (cumulative >= point * cumulative.amax(-1, keepdim=True)).int().argmax(-1)


def generate(model: Gemma | Ready, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[int]:
    """Continue the prompt, token by token; a token of `config.stop_ids` ends it and is not among them.

    Prompt and continuation together never exceed `config.max_position_embeddings`: `max_new_tokens` is cut to what is
    left, and a prompt that leaves nothing is refused. Raises GemletError for that, for an empty prompt and for ids
    outside the vocabulary at once, and for logits that are not finite when they occur.
    """
    return (token for _, token in generate_samples(model, prompt_ids, params, 1))


def generate_samples(
    model: Gemma | Ready,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    num_samples: int,
    ended: Callable[[int], bool] = lambda sample: False,
) -> Iterator[tuple[int, int]]:
    """Continue the prompt `num_samples` times in one batch: pairs (sample, token), in rounds of one token a sample.

    Sample i is what `generate` gives for seed + i. A sample ends with a token of `config.stop_ids`, or when `ended(i)`,
    which is asked after each of its tokens. Limits and errors are those of `generate`.
    """
    ids, limit = checked(model.config, prompt_ids, params)
    return _generate(
        model if isinstance(model, Ready) else Ready(model), ids, params, limit, generators(params, num_samples), ended
    )


@torch.inference_mode()
def _generate(
    ready: Ready,
    prompt: list[int],
    params: SamplingParams,
    limit: int,
    generators: list[Generator],
    ended: Callable[[int], bool],
) -> Iterator[tuple[int, int]]:
    if limit == 0:
        return
    running = list(range(len(generators)))  # the samples that go on; sample i has slot i
    texts = [list(prompt) for _ in running]
    decoder = ready.decoder(len(running), len(prompt) + limit)
    rows = decoder.prefill(0, prompt).expand(1, len(running), -1)  # [guessed and one, samples, V]
    for i in running[1:]:
        decoder.copy(0, i, len(prompt))
    seen = torch.zeros_like(rows[0], dtype=torch.bool)
    seen[:, prompt] = True
    penalty = params.repetition_penalty != 1
    lookup, guessed = Lookup(decoder.guesses), []
    while True:
        for row, guess in zip(rows, [*guessed, None], strict=True):
            _check_finite(ready.model, row, [texts[i] for i in running])
            tokens = sample(row, params, [generators[i] for i in running], seen[running] if penalty else None).tolist()
            going = []
            for i, token in zip(running, tokens, strict=True):
                if token in ready.config.stop_ids:
                    continue
                texts[i].append(token)
                seen[i, token] = True
                yield i, token
                if not ended(i):
                    going.append(i)
            running = going
            if not running or len(texts[running[0]]) == len(prompt) + limit:
                return
            if tokens[0] != guess:  # the rows behind a wrong guess are of no use
                break
        text = texts[running[0]]
        if ready.outruns(decoder):
            decoder = ready.decoder(len(texts), len(prompt) + limit)
            lookup = Lookup(decoder.guesses)
            for i in running:
                decoder.prefill(i, texts[i][:-1])
        guessed = lookup.guess(text)[: len(prompt) + limit - len(text) - 1] if len(texts) == 1 else []
        last = len(text) - 1
        if guessed:
            taken = range(last, last + 1 + len(guessed))
            rows = decoder.step([text[-1], *guessed], [running[0]] * len(taken), taken)[:, None]
        else:
            rows = decoder.step([texts[i][-1] for i in running], running, [last] * len(running))[None]


class Lookup:
    """Guesses what a text says next: what followed its last tokens where they stood before (prompt lookup).

    A guess is checked in the same step that it saves: the token of its row is drawn like any other, and the guess is
    right if it is the same one. So guessing changes no text, only its time; whether it pays is measured.
    """

    LAST = 3
    """Tokens that have to be the same."""

    def __init__(self, most: int):
        self.most = most
        self._after: dict[tuple[int, ...], int] = {}  # where the text goes on behind these tokens
        self._known = self.LAST
        self._spent, self._gained = [0.0, 0.0], [0.0, 0.0]  # seconds and tokens, plainly and by guessing; old ones fade
        self._asked = (0, 0.0, False)  # the text's length, the time and whether it was guessed, when last asked
        self._chances = 0

    def guess(self, text: Sequence[int], now: float | None = None) -> list[int]:
        """At most `most` tokens; often none. To be asked before every step, with the text so far."""
        if not self.most:
            return []
        now = time.perf_counter() if now is None else now
        self._learn(len(text), now)
        for end in range(self._known, len(text)):
            self._after[tuple(text[end - self.LAST : end])] = end
        self._known = max(self._known, len(text))
        at = self._after.get(tuple(text[-self.LAST :]))
        self._chances += at is not None
        guessed = at is not None and (self._pays() or self._chances % 16 == 0)
        self._asked = (len(text), now, guessed)
        if at is None or not guessed:
            return []
        return [text[at + i % (len(text) - at)] for i in range(self.most)]  # what goes round, goes on

    def _learn(self, length: int, now: float) -> None:
        before, since, guessed = self._asked
        if since:
            self._spent[guessed] = 0.95 * self._spent[guessed] + now - since
            self._gained[guessed] = 0.95 * self._gained[guessed] + length - before

    def _pays(self) -> bool:
        plain, guessing = (spent / (gained or 1) for spent, gained in zip(self._spent, self._gained, strict=True))
        return guessing <= plain


@torch.inference_mode()
def generate_uncached(model: Gemma, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[int]:
    """`generate`, written for reading: the whole sequence through the model for every token, no cache, one sample."""
    ids, limit = checked(model.config, prompt_ids, params)
    own = generators(params, 1)
    for _ in range(limit):
        logits = model(torch.tensor([ids], device=model.device))[:, -1]
        _check_finite(model, logits, [ids])
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[0, ids] = True
        token = int(sample(logits, params, own, seen))
        if token in model.config.stop_ids:
            return
        ids.append(token)
        yield token


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


def generators(params: SamplingParams, num_samples: int) -> list[Generator]:
    """Where sample 0, 1, ... of a prompt draw their numbers from."""
    seed = secrets.randbits(62) if params.seed is None else params.seed
    return [Generator().manual_seed(seed + i) for i in range(num_samples)]


def _check_finite(model: Gemma, logits: Tensor, texts: list[list[int]]) -> None:
    """Refuse to draw from logits [B, V] that are not finite; say where they come from."""
    finite = logits.sum(-1).isfinite()  # one NaN or infinity shows in the sum, at a tenth of the cost of looking at all
    if not finite.all():
        _explain_non_finite(model, texts[int(finite.int().argmin())])


def _explain_non_finite(model: Gemma, ids: list[int]) -> NoReturn:
    """Name the first weight, or else the first module in order of computation, with a value that is not finite."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise GemletError(f"the model is damaged: {name} has values that are not finite; load another checkpoint")
    found: list[str] = []

    def note(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        return lambda module, inputs, output: None if output.isfinite().all() else found.append(name)

    parts = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    hooks = [module.register_forward_hook(note(name)) for name, module in parts]
    try:
        model(torch.tensor([ids], device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    where = found[0] if found else "the output head"
    raise GemletError(
        f"the model's logits are not finite: the first such values come out of {where}, computed in "
        f"{model.dtype}, after {len(ids)} tokens; try float32, or another checkpoint"
    )
