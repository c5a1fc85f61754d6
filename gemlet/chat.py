"""A conversation with a model: what was said stays in the decoder's memory, and only what is new is computed.

    chat = Chat(lm, temperature=0.7)
    for piece in chat.say("Once upon a time there was a fox"):
        print(piece, end="", flush=True)

A conversation is nothing but its token ids. `Chat` makes the ids of what is said and hands all of them to `generate`
for every reply; `_Kept`, the decoder under it, knows what it holds already and takes in the rest. So a reply is what
`generate` gives for the whole text, and taking something back is cutting the ids.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any, Unpack

from gemlet.decoder import Decoder
from gemlet.errors import GemletError
from gemlet.generate import generate
from gemlet.lm import LM, sampling_params
from gemlet.ready import Ready
from gemlet.sampling import SamplingOptions, SamplingParams

TURN, END = "<start_of_turn>", "<end_of_turn>"
"""The special tokens around what one side says, in models that were trained to answer."""


class Chat:
    """A conversation with a model. The sampling arguments are those of `LM.generate`; reply i draws from seed + i.

    There are two ways, and the model decides which it is. A model that was trained on Gemma's turns answers what is
    said (`turns` is True): its tokenizer has the tokens `<start_of_turn>` and `<end_of_turn>`, and its chat template
    uses them, or the latter is one of its end tokens. Every other model goes on with the text: what is said is added to
    it, until the model ends it, and what is said next begins another.
    """

    def __init__(self, lm: LM, **sampling: Unpack[SamplingOptions]):
        self._tokenizer, self._params = lm.tokenizer, sampling_params(sampling)
        self._ready = _Keeping(lm.ready)
        self._turn, self._end = (lm.tokenizer.special_ids.get(token, -1) for token in (TURN, END))
        trained = TURN in (lm.tokenizer.chat_template or "") or self._end in lm.config.stop_ids
        self.turns = trained and min(self._turn, self._end) >= 0
        """Whether the model answers in turns; else it goes on with a text."""
        self.ids: list[int] = []
        """The conversation as the model sees it; without turns, the text that is being written."""
        self.ended = True
        """Whether the last reply came to its end; one that was stopped or was too long can go on."""
        self._before: list[tuple[list[int], bool]] = []  # ids and ended, before each exchange
        self._reply: Generator[str, None, None] | None = None  # the one that is being written

    @property
    def full(self) -> bool:
        """Whether the context, `max_position_embeddings`, has no room for another token."""
        return len(self.ids) >= self._ready.config.max_position_embeddings

    def say(self, text: str = "") -> Iterator[str]:
        """Say something; the reply comes in pieces as it is written: whole characters. Nothing said lets it go on.

        Raises GemletError at once, and changes nothing, where the context has no room for it, or where nothing is said
        to a model that has finished its turn.
        """
        self.stop()
        ids, context = self._ids_with(text), self._ready.config.max_position_embeddings
        if len(ids) >= context:
            raise GemletError(
                f"with this the conversation has {len(ids)} tokens, too many for the context of {context}: "
                "begin anew (/new), take back the last exchange (/undo), or say less"
            )
        seed = self._params.seed
        params = replace(self._params, seed=None if seed is None else seed + len(self._before))
        self._before.append((self.ids, self.ended))
        self.ids, self.ended = ids, False
        self._reply = self._pieces(params)
        return self._reply

    def stop(self) -> None:
        """End the reply that is being written; what it has said stays. `say`, `undo` and `new` do so, too."""
        if self._reply is not None:
            self._reply.close()

    def undo(self) -> bool:
        """Take back the last exchange: what was said, and the reply. False if there is none."""
        self.stop()
        if not self._before:
            return False
        self.ids, self.ended = self._before.pop()
        return True

    def new(self) -> None:
        """Begin anew: nothing of what was said so far matters any longer."""
        self.stop()
        self.ids, self.ended, self._before = [], True, []

    def _ids_with(self, text: str) -> list[int]:
        """The conversation's ids once this is said, up to where the model begins."""
        encode = self._tokenizer.encode
        if not self.turns:
            if self.ended:
                return self._tokenizer.prompt_ids(text)
            return [*self.ids, *encode(self._gap(text) + text)]
        if not text.strip():
            if self.ended:
                raise GemletError("the model has finished its turn: say something")
            return [*self.ids]
        begin = [] if self._tokenizer.bos_token_id is None else [self._tokenizer.bos_token_id]
        before = [*self.ids, self._end, *encode("\n")] if self.ids else begin
        said = [self._turn, *encode(f"user\n{text.strip()}"), self._end, *encode("\n")]
        return [*before, *said, self._turn, *encode("model\n")]

    def _gap(self, text: str) -> str:
        """A space between the text so far and what is added to it, where one belongs."""
        last, first = self._tokenizer.decode(self.ids)[-1:], text[:1]
        return " " if last.strip() and first.strip() and first not in ".,;:!?" else ""

    def _pieces(self, params: SamplingParams) -> Generator[str, None, None]:
        """Write a reply. Whenever this is left, the ids are those of what was said."""
        ids, begun, told = self.ids, len(self.ids), ""
        limit = min(params.max_new_tokens, self._ready.config.max_position_embeddings - begun)
        decoder, decode = self._tokenizer.decoder(), self._tokenizer.decode
        try:
            for token in generate(self._ready, ids, params):
                if token == self._end:
                    break
                ids.append(token)
                if piece := decoder.push(token):
                    told += piece
                    yield piece
            self.ended = len(ids) - begun < limit
            if (self.ended or self.full) and (piece := decoder.flush()):
                yield piece
        finally:
            # half a character was not shown: what comes next would make it a broken one
            while not self.ended and not self.full and len(ids) > begun and decode(ids[begun:-1]) == told:
                ids.pop()


class _Keeping(Ready):
    """A `Ready` with one decoder that stays, for text after text, of any length."""

    def __init__(self, ready: Ready):
        super().__init__(ready.source, ready.format)
        self._ready = ready
        self._kept: _Kept | None = None

    def decoder(self, slots: int, max_length: int) -> Decoder:
        """The one that there is, unless a faster one can be had now."""
        if self._kept is None or self.outruns(self._kept):
            self._kept = _Kept(self._ready.decoder(1, self.config.max_position_embeddings))
        return self._kept

    def outruns(self, decoder: Decoder) -> bool:
        """See `Ready.outruns`."""
        return isinstance(decoder, _Kept) and self._ready.outruns(decoder.decoder)


class _Kept(Decoder):
    """One slot of another decoder. It knows what it holds: a prefill takes in only what differs from that."""

    slots = 1

    def __init__(self, decoder: Decoder):
        self.decoder, self.config = decoder, decoder.config
        self.max_length, self.rings, self.guesses = decoder.max_length, decoder.rings, decoder.guesses
        self.held: list[int] = []
        self._given = 0  # the most it has held of this text: its rings have forgotten what lies far before

    def step(self, tokens, slots, positions, wanted=None) -> Any:
        """See `Decoder.step`."""
        self._go_back(positions[0], positions[-1] + 1)
        logits = self.decoder.step(tokens, slots, positions, wanted)
        self.held += tokens
        return logits

    def prefill(self, slot: int, ids: Sequence[int], start: int = 0) -> Any:
        """See `Decoder.prefill`."""
        text = [*self.held[:start], *ids]
        most = min(len(self.held), len(text) - 1)  # what follows the last token is asked for: it is always taken in
        same = next((i for i in range(most) if self.held[i] != text[i]), most)
        if not self.decoder.remembers(self._given, same):
            same = self._given = 0
        self._go_back(same, len(text))
        logits = self.decoder.prefill(slot, text[same:], same)
        self.held = text
        return logits

    def sample(self, logits, params, draws, texts) -> list[int]:
        """See `Decoder.sample`."""
        return self.decoder.sample(logits, params, draws, texts)

    def _go_back(self, length: int, end: int) -> None:
        """Count on `length` tokens alone until those up to `end` are in: Ctrl-C may come before."""
        del self.held[length:]
        self._given = max(self._given, end)
