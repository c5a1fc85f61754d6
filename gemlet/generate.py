"""Token ids in, token ids out: prefill, decode, and the loop over them.

- `generate` is the way to use it; `generate_samples` makes several samples of one prompt in one batch
- how a token is chosen is `gemlet.sampling`; `gemlet.eager.generate_uncached` is the reference

Text, stop strings and streams of pieces are the layer above, `gemlet.lm`. Nothing here needs torch: a decoder may.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from gemlet.ready import Ready
from gemlet.sampling import Draws, SamplingParams, checked, draws

if TYPE_CHECKING:
    from gemlet.model import Gemma


def generate(model: "Gemma | Ready", prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[int]:
    """Continue the prompt, token by token; a token of `config.stop_ids` ends it and is not among them.

    Prompt and continuation together never exceed `config.max_position_embeddings`: `max_new_tokens` is cut to what is
    left, and a prompt that leaves nothing is refused. Raises GemletError for that, for an empty prompt and for ids
    outside the vocabulary at once, and for logits that are not finite when they occur.
    """
    return (token for _, token in generate_samples(model, prompt_ids, params, 1))


def generate_samples(
    model: "Gemma | Ready",
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
        model if isinstance(model, Ready) else Ready(model), ids, params, limit, draws(params, num_samples), ended
    )


def _generate(
    ready: Ready,
    prompt: list[int],
    params: SamplingParams,
    limit: int,
    own: list[Draws],
    ended: Callable[[int], bool],
) -> Iterator[tuple[int, int]]:
    if limit == 0:
        return
    with ready.lent(len(own), len(prompt) + limit) as decoder:
        running = list(range(len(own)))  # the samples that go on; sample i has slot i
        texts = [list(prompt) for _ in running]
        rows = decoder.prefill(0, prompt)[None, None][:, [0] * len(running)]  # [guessed and one, samples, V]
        for i in running[1:]:
            decoder.copy(0, i, len(prompt))
        lookup, guessed = Lookup(decoder.guesses), []
        while True:
            for row, guess in zip(rows, [*guessed, None], strict=True):
                each = [own[i] for i in running], [texts[i] for i in running]
                tokens = decoder.sample(row, [params] * len(running), *each)
                if -1 in tokens:
                    raise ready.not_finite(texts[running[tokens.index(-1)]])
                going = []
                for i, token in zip(running, tokens, strict=True):
                    if token in ready.config.stop_ids:
                        continue
                    texts[i].append(token)
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
