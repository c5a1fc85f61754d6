"""Many texts at once: requests join and leave between the steps of one model (continuous batching, Orca, OSDI 2022).

    with Engine(decoder, tokenizer) as engine:
        streams = [engine.submit(prompt, SamplingParams(seed=i)) for i, prompt in enumerate(prompts)]
        for piece in streams[0]:  # or `async for`
            print(piece, end="", flush=True)

One thread owns the model and goes round: let requests in, take in a part of the prompts, write one token of every text.

- Memory is the decoder's, allocated once: a text needs one of its slots, and those without one wait in a queue that
  is bounded. What comes first gets the next slot, and every prompt its turn, a part at a time, so nobody starves.
- A prompt that begins like a text in one of the slots, finished or not, copies its keys and values; one that begins
  like a prompt on its way in waits until that part is there.
- What a stream says does not depend on the others: it is what `generate` says alone for the same seed.
"""

import asyncio
import atexit
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from threading import Condition, Thread
from typing import Literal

from gemlet.decoder import Decoder
from gemlet.errors import GemletError
from gemlet.lm import TextWriter, stop_strings
from gemlet.sampling import Draws, SamplingParams, checked, draws
from gemlet.tokenizer import Tokenizer

ALONE = 512
"""Prompt tokens taken in at once while nothing is being written."""
BETWEEN = 64
"""Prompt tokens taken in between two steps of texts that are being written: what these wait for the newcomers."""
MIN_SHARED = 16
"""A common beginning shorter than this is computed again: that is as fast as looking after it."""

Reason = Literal["stop", "length", "cancelled", "error"]


class QueueFull(GemletError):
    """As many requests wait as may wait. The same request may succeed later."""


@dataclass(kw_only=True)
class Stats:
    """What an engine has done so far, and does now."""

    queued: int = 0
    """Requests that wait for a slot."""
    running: int = 0
    """Requests that have one."""
    submitted: int = 0
    """Requests that were taken."""
    refused: int = 0
    """Requests that found the queue full."""
    finished: int = 0
    """Requests that came to their end."""
    cancelled: int = 0
    """Requests that were given up by whoever made them."""
    failed: int = 0
    """Requests that ended with an error."""
    steps: int = 0
    """Passes of the model in which texts grew by a token."""
    new_tokens: int = 0
    """Tokens written."""
    prompt_tokens: int = 0
    """Tokens of the prompts that got a slot."""
    shared_tokens: int = 0
    """Those among them whose keys and values were there already."""


class Stream:
    """A text that is being written: iterate over its pieces, in one place, with `for` or `async for`.

    Pieces are whole characters and never a part of a stop string. Leaving the loop early cancels the request. Pieces
    that nobody takes wait here and join into one; a text is no longer than the context, so they need no other bound,
    and whoever reads slowly keeps nobody waiting. An error of the request is raised behind the last piece.
    """

    def __init__(self, prompt_ids: list[int], cancel: Callable[["Stream"], None]):
        self.prompt_ids = prompt_ids
        self.tokens: list[int] = []
        """The tokens written so far, without the prompt's and the end token."""
        self.finish_reason: Reason | None = None
        """None while it is written; stop (end token or stop string), length, cancelled, or error."""
        self._cancel = cancel
        self._cancelled = False
        self._changed = Condition()
        self._text = ""  # what nobody has taken yet
        self._error: Exception | None = None
        self._wake: Callable[[], None] = lambda: None  # whoever waits with `async for`

    def __iter__(self) -> Iterator[str]:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._text or self.finish_reason)
                piece, ended = self._take()
                if piece:
                    yield piece
                elif ended:
                    return
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[str]:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(changed.set)

        self._wake = wake
        try:
            while True:
                changed.clear()
                piece, ended = self._take()
                if piece:
                    yield piece
                elif ended:
                    return
                else:
                    await changed.wait()
        finally:
            self.cancel()

    def text(self) -> str:
        """Wait for the end; all that was not taken before, in one piece."""
        return "".join(self)

    def cancel(self) -> None:
        """Give the request up, so that its slot is free for another; nothing happens where it has ended."""
        self._cancel(self)

    def _take(self) -> tuple[str, bool]:
        """What was written since the last call, and whether it has ended; what it ended by comes behind its text."""
        with self._changed:
            piece, self._text = self._text, ""
            if self._error and not piece:
                raise self._error
            return piece, self.finish_reason is not None

    def _put(self, piece: str, reason: Reason | None = None, error: Exception | None = None) -> None:
        with self._changed:
            self._text += piece
            self.finish_reason, self._error = reason, error
            self._changed.notify_all()
        self._wake()


@dataclass(eq=False)
class _Request:
    """What was asked for, and where it goes."""

    stream: Stream
    limit: int
    """Tokens that may be written."""
    writer: TextWriter
    params: SamplingParams
    draws: Draws


@dataclass(eq=False)
class _Slot:
    """One of the decoder's sequences."""

    index: int
    ids: list[int] = field(default_factory=list)
    """The text: prompt and what was written. Without a request, as much of the last one as the slot holds."""
    held: int = 0
    """Of how many of `ids` the decoder has keys and values."""
    given: int = 0
    """The most it has held of this text or of one it grew from: its rings have forgotten what lies far before."""
    request: _Request | None = None
    order: int = 0
    """Counts the requests that got a slot."""
    leader: "_Slot | None" = None
    """An earlier request that is taking in the beginning of this prompt just now."""
    shared: int = 0
    """The length of that beginning."""

    @property
    def prompt_left(self) -> int:
        """Tokens to take in before the last one, which goes into the first step of writing."""
        return len(self.ids) - 1 - self.held if self.request else 0


class Engine:
    """Writes many texts at once with one model.

    `decoder` is the model made ready to write: its slots are how many texts are written at once, its `max_length` how
    long each may be, prompt included. Up to `max_queue` more requests may wait. All methods may be called from any
    thread.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, max_queue: int = 64):
        self.decoder, self.tokenizer, self.max_queue = decoder, tokenizer, max_queue
        self._slots = [_Slot(i) for i in range(decoder.slots)]
        self._turns: deque[_Slot] = deque()  # prompts on their way in, the next one first
        self._orders = count(1)
        self._stats = Stats()
        self._changed = Condition()  # guards what other threads touch: the queue, the flags, the numbers
        self._queue: deque[_Request] = deque()
        self._closed = False
        self._worker = Thread(target=self._work, name="gemlet engine", daemon=True)
        atexit.register(self.close)  # a thread that computes must not outlive the interpreter
        self._worker.start()

    def submit(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, stop: str | Iterable[str] = ()
    ) -> Stream:
        """Ask for the continuation of a text, or of ids taken as they are; returns at once.

        The continuation ends as `generate` and `LM.generate` end it. Raises GemletError for a prompt that cannot be
        continued and when the engine is closed, QueueFull when as many requests wait as may wait.
        """
        params = params or SamplingParams()
        ids = self.tokenizer.prompt_ids(prompt) if isinstance(prompt, str) else list(prompt)
        ids, limit = checked(self.decoder.config, ids, params, self.decoder.max_length)
        stream = Stream(ids, self._cancel)
        writer = TextWriter(self.tokenizer.decoder(), stop_strings(stop))
        request = _Request(stream, limit, writer, params, draws(params, 1)[0])
        with self._changed:
            if self._closed:
                raise GemletError("the engine is closed; make another one")
            if len(self._queue) >= self.max_queue + self._free():
                self._stats.refused += 1
                raise QueueFull(
                    f"{self._running()} texts are being written and {len(self._queue)} requests wait, which is as many "
                    "as may; try again later, or give the engine more slots or a larger max_queue"
                )
            self._stats.submitted += 1
            if limit == 0:
                self._end(request, "length")
            else:
                self._queue.append(request)
                self._changed.notify()
        return stream

    def stats(self) -> Stats:
        """A snapshot of the numbers."""
        with self._changed:
            return replace(self._stats, queued=len(self._queue), running=self._running())

    def close(self) -> None:
        """Stop after the step that is running. Streams that have not ended raise a GemletError."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._worker.join()
        atexit.unregister(self.close)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- the thread that owns the model

    def _work(self) -> None:
        error: Exception = GemletError("the engine was closed before this text had ended; ask another one")
        try:
            while self._admit():
                self._prefill()
                self._decode()
        except Exception as defect:  # raised where the texts are read
            error = defect
        with self._changed:
            self._closed = True
            for request in [*self._queue, *(slot.request for slot in self._slots if slot.request)]:
                self._end(request, "error", error=error)
            self._queue.clear()

    def _admit(self) -> bool:
        """Free the slots of what was cancelled, fill free ones from the queue, wait while there is nothing to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._queue or self._running())
            for slot in self._slots:
                if slot.request and slot.request.stream._cancelled:
                    self._leave(slot, "cancelled")
            while self._queue and self._free():
                self._enter(self._queue.popleft())
            return not self._closed

    def _enter(self, request: _Request) -> None:
        """Give a request the free slot that holds most of its prompt, else the one that has been free for longest."""
        prompt = request.stream.prompt_ids
        free = [slot for slot in self._slots if slot.request is None]
        slot = max(free, key=lambda slot: (self._beginning(slot, prompt), -slot.order))
        slot.held = self._beginning(slot, prompt)
        slot.given = slot.given if slot.held else 0
        slot.ids, slot.request, slot.order = list(prompt), request, next(self._orders)
        self._stats.prompt_tokens += len(prompt)
        self._stats.shared_tokens += slot.held
        self._share(slot)

    def _share(self, slot: _Slot) -> None:
        """Take the beginning of the prompt from another slot, or wait for one where it is on its way in."""
        others = [(self._beginning(other, slot.ids, slot.order), other) for other in self._slots if other is not slot]
        n, other = max(others, key=lambda pair: pair[0], default=(0, slot))
        slot.leader = None
        if n >= slot.held + MIN_SHARED:
            if n > other.held:
                slot.leader, slot.shared = other, n
                return
            self.decoder.copy(other.index, slot.index, n)
            self._stats.shared_tokens += n - slot.held
            slot.held, slot.given = n, other.given
        if slot.prompt_left:
            self._turns.append(slot)

    def _beginning(self, slot: _Slot, prompt: list[int], order: int = 0) -> int:
        """How many tokens of a prompt a slot can give: what it holds and, to one that came later, what it takes in."""
        promised = slot.held + slot.prompt_left if slot.order < order else slot.held
        most = min(promised, len(prompt) - 1)
        n = next((i for i, (a, b) in enumerate(zip(slot.ids[:most], prompt, strict=False)) if a != b), most)
        there = n > slot.held or self.decoder.remembers(slot.given, n)
        return n if n >= MIN_SHARED and there else 0

    def _prefill(self) -> None:
        """Take in prompts, a part of each in turn, as much as the texts that are being written may wait for."""
        budget = BETWEEN if self._writing() else ALONE
        while self._turns and budget:
            slot = self._turns.popleft()
            stops = [follower.shared for follower in self._followers(slot)]
            end = min([slot.held + min(budget, slot.prompt_left), *stops])
            try:
                self.decoder.prefill(slot.index, slot.ids[slot.held : end], start=slot.held)
            except Exception as error:
                self._leave(slot, "error", error=error)
                continue
            budget -= end - slot.held
            slot.held, slot.given = end, max(slot.given, end)
            if slot.prompt_left:
                self._turns.append(slot)
            for follower in self._followers(slot):
                if follower.shared == end:
                    self._share(follower)

    def _decode(self) -> None:
        """Write one token of every text whose prompt is taken in."""
        rows = self._writing()
        if not rows:
            return
        try:
            logits = self.decoder.step(
                [slot.ids[-1] for slot in rows], [slot.index for slot in rows], [slot.held for slot in rows]
            )
            asked = [slot.request for slot in rows if slot.request]
            how, numbers = [request.params for request in asked], [request.draws for request in asked]
            tokens = self.decoder.sample(logits, how, numbers, [slot.ids for slot in rows])
        except Exception as error:
            for slot in rows:
                self._leave(slot, "error", error=error)
            return
        self._stats.steps += 1
        for slot, token in zip(rows, tokens, strict=True):
            slot.held += 1
            slot.given = max(slot.given, slot.held)
            if token < 0:
                self._leave(slot, "error", error=_not_finite(slot.held))
            else:
                self._write(slot, token)

    def _write(self, slot: _Slot, token: int) -> None:
        """Pass a token on, and free the slot if it was the last one."""
        request = slot.request
        assert request
        if token in self.decoder.config.stop_ids:
            self._leave(slot, "stop")
            return
        slot.ids.append(token)
        request.stream.tokens.append(token)
        self._stats.new_tokens += 1
        piece = request.writer.push(token)
        if request.writer.ended:
            self._leave(slot, "stop", piece)
        elif len(request.stream.tokens) == request.limit:
            self._leave(slot, "length", piece)
        elif piece:
            request.stream._put(piece)

    def _leave(self, slot: _Slot, reason: Reason, piece: str = "", error: Exception | None = None) -> None:
        """Free a slot; what it holds stays for prompts that begin like it, unless something was wrong with it."""
        assert slot.request
        self._end(slot.request, reason, piece, error)
        slot.held = 0 if error else slot.held
        slot.ids, slot.request, slot.leader = slot.ids[: slot.held], None, None
        slot.order = next(self._orders)
        if slot in self._turns:
            self._turns.remove(slot)
        for follower in self._followers(slot):
            self._share(follower)

    # ---- shared by the threads

    def _end(self, request: _Request, reason: Reason, piece: str = "", error: Exception | None = None) -> None:
        with self._changed:
            counter = {"cancelled": "cancelled", "error": "failed"}.get(reason, "finished")
            setattr(self._stats, counter, getattr(self._stats, counter) + 1)
        request.stream._put(piece + request.writer.flush(), reason, error)

    def _cancel(self, stream: Stream) -> None:
        with self._changed:
            stream._cancelled = True
            request = next((request for request in self._queue if request.stream is stream), None)
            if request:
                self._queue.remove(request)
                self._end(request, "cancelled")

    def _writing(self) -> list[_Slot]:
        return [slot for slot in self._slots if slot.request and not slot.prompt_left]

    def _followers(self, leader: _Slot) -> list[_Slot]:
        return [slot for slot in self._slots if slot.leader is leader]

    def _running(self) -> int:
        return sum(slot.request is not None for slot in self._slots)

    def _free(self) -> int:
        return len(self._slots) - self._running()


def _not_finite(length: int) -> GemletError:
    return GemletError(
        f"the model's logits are not finite after {length} tokens; "
        "gemlet.generate.generate says where such values come from; try float32, or another checkpoint"
    )
