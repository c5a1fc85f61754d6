"""Token ids in, token ids out: sampling, prefill, decode, and the loop over them.

- `generate` is the way to use it; `generate_samples` makes several samples of one prompt in one batch
- `generate_uncached` runs the whole sequence again for every token: the reference the others are tested against
- the steps of sampling come in transformers' order: repetition penalty, temperature, top-k, top-p, min-p
- one uniform number from a generator on the CPU chooses a token, so a seed means the same draws on every device

Text, stop strings and streams of pieces are the layer above, `gemlet.lm`.
"""

import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NoReturn, TypedDict

import torch
from torch import Generator, Tensor, nn

from gemlet.cache import KVCache
from gemlet.config import ModelConfig
from gemlet.errors import GemletError
from gemlet.model import Gemma

PREFILL_CHUNK = 512
"""Prompt tokens taken in at once: the memory of a long prompt grows with its length, not with its square."""

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


def prefill(model: Gemma, ids: Tensor, cache: KVCache, chunk: int = PREFILL_CHUNK) -> Tensor:
    """Take ids [B, T] into the cache, a chunk at a time; the logits [B, V] of what follows the last one."""
    hidden = [model.model(part, cache)[:, -1] for part in ids.split(chunk, 1)][-1]
    return model.head(hidden)


def decode(model: Gemma, tokens: Tensor, cache: KVCache) -> Tensor:
    """Take one token a row, [B], into the cache; the logits [B, V] of what follows it."""
    return model(tokens[:, None], cache)[:, -1]


def generate(model: Gemma, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[int]:
    """Continue the prompt, token by token; a token of `config.stop_ids` ends it and is not among them.

    Prompt and continuation together never exceed `config.max_position_embeddings`: `max_new_tokens` is cut to what is
    left, and a prompt that leaves nothing is refused. Raises GemletError for that, for an empty prompt and for ids
    outside the vocabulary at once, and for logits that are not finite when they occur.
    """
    return (token for _, token in generate_samples(model, prompt_ids, params, 1))


def generate_samples(
    model: Gemma,
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
    return _generate(model, ids, params, limit, generators(params, num_samples), ended)


@torch.inference_mode()
def _generate(
    model: Gemma,
    prompt: list[int],
    params: SamplingParams,
    limit: int,
    generators: list[Generator],
    ended: Callable[[int], bool],
) -> Iterator[tuple[int, int]]:
    if limit == 0:
        return
    running = list(range(len(generators)))  # the samples in the batch, row by row
    texts = [list(prompt) for _ in running]
    ids = torch.tensor([prompt], device=model.device)
    cache = KVCache(model.config, 1, len(prompt) + limit, model.dtype, model.device)
    logits = prefill(model, ids, cache).expand(len(running), -1)
    _keep_rows(cache, torch.zeros(len(running), dtype=torch.long, device=model.device))
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids.expand(len(running), -1), True)
    for remaining in reversed(range(limit)):
        _check_finite(model, logits, [texts[i] for i in running])
        tokens = sample(logits, params, [generators[i] for i in running], seen)
        seen.scatter_(1, tokens[:, None], True)
        going = []  # rows that go on
        for row, (i, token) in enumerate(zip(running, tokens.tolist(), strict=True)):
            if token in model.config.stop_ids:
                continue
            texts[i].append(token)
            yield i, token
            if not ended(i):
                going.append(row)
        if not going or not remaining:
            return
        if len(going) < len(running):
            rows = torch.tensor(going, device=model.device)
            running, tokens, seen = [running[row] for row in going], tokens[rows], seen[rows]
            _keep_rows(cache, rows)
        logits = decode(model, tokens, cache)


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


def _keep_rows(cache: KVCache, rows: Tensor) -> None:
    """Make the cache's batch these of its rows; one may be taken several times."""
    for layer in cache.layers:
        layer.k, layer.v = layer.k[rows], layer.v[rows]


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
