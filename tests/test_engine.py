"""The engine by equivalence: whatever comes and goes beside it, a stream says what `generate` says alone."""

import asyncio
import threading
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemlet.eager import TorchDecoder
from gemlet.engine import ALONE, BETWEEN, MIN_SHARED, Engine, QueueFull
from gemlet.errors import GemletError
from gemlet.generate import generate
from gemlet.lm import LM
from gemlet.ready import decoder
from gemlet.sampling import SamplingParams
from gemlet.testing import tiny_model, tiny_tokenizer

CONTEXT = 400
ENDING = tiny_model(5, max_position_embeddings=CONTEXT)
ENDLESS = tiny_model(5, max_position_embeddings=CONTEXT, eos_token_id=None)
TOKENIZER = tiny_tokenizer()
ids = torch.randint(1, 320, (3, CONTEXT), generator=torch.Generator().manual_seed(0)).tolist()
PROMPTS = (
    ids[0][:1],
    ids[0][:5],
    ids[0][:30],
    ids[0][:30] + ids[1][:9],
    ids[0][:40],
    ids[0][:110],  # more than a ring holds
    ids[0][:90] + ids[1][:30],
    ids[2][:20],
)


def params(**changes):
    return SamplingParams(**{"max_new_tokens": 12, "seed": 0, **changes})


@cache
def alone(prompt, params, model=ENDING):
    return list(generate(model, prompt, params))


class Script(TorchDecoder):
    """A decoder that notes what it is asked for, and calls `before(n)` before step n, in the engine's thread."""

    def __init__(self, model=ENDLESS, slots=3, max_length=200, before=lambda n: None):
        super().__init__(model, slots, max_length)
        self.before, self.calls, self.steps = before, [], 0

    def step(self, tokens, slots, positions, wanted=None):
        self.before(self.steps)
        self.steps += 1
        self.calls.append(("step", *slots))
        return super().step(tokens, slots, positions, wanted)

    def prefill(self, slot, ids, start=0):
        self.calls.append(("prefill", slot, start, start + len(ids)))
        return super().prefill(slot, ids, start)

    def copy(self, source, target, length):
        self.calls.append(("copy", source, target, length))
        super().copy(source, target, length)


def at_once(decoder, requests, **options):
    """The streams of requests that all arrive while the first one writes its first token."""
    streams = []

    def before(n):
        if n == 0:
            streams.extend(engine.submit(*request) for request in requests[1:])

    decoder.before = before
    with Engine(decoder, TOKENIZER, **options) as engine:
        streams.insert(0, engine.submit(*requests[0]))
        streams[0].text()
        for stream in streams:
            stream.text()
        return streams, engine.stats()


# ---- the same tokens


choices = st.builds(
    params,
    seed=st.integers(0, 3),
    max_new_tokens=st.sampled_from([1, 3, 12, 25]),
    temperature=st.sampled_from([0, 0.8, 1.3]),
    top_k=st.sampled_from([None, 5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
)
arrivals = st.lists(st.tuples(st.integers(0, 30), st.sampled_from(PROMPTS), choices, st.booleans()), max_size=8)


@settings(max_examples=15, deadline=None)
@given(arrivals, st.integers(1, 4))
def test_a_stream_is_what_generate_says_whatever_comes_and_goes(arrivals, slots):
    """Requests arrive before the steps they name; some are cancelled two steps later."""
    asked, cancelled = [], []

    def before(n):
        for arrival in [a for a in pending if a[0] <= n]:
            pending.remove(arrival)
            asked.append((engine.submit(*arrival[1:3]), *arrival))
        for stream, at, *_, fickle in asked:
            if fickle and n == at + 2:
                stream.cancel()
                cancelled.append(stream)

    pending = list(arrivals)
    decoder = Script(ENDING, slots, before=before)
    with Engine(decoder, TOKENIZER) as engine:
        while pending or not asked:  # steps only count while something is written
            before(10**6 if decoder.steps else -1)
            opener = engine.submit(PROMPTS[1], params(max_new_tokens=30))
            asked.append((opener, 0, PROMPTS[1], params(max_new_tokens=30), False))
            opener.text()
        for stream, _, prompt, how, _ in asked:
            stream.text()
            expected = alone(tuple(prompt), how)
            if stream in cancelled and stream.finish_reason == "cancelled":
                assert stream.tokens == expected[: len(stream.tokens)]
            else:
                assert stream.tokens == expected
                assert stream.finish_reason == ("length" if len(expected) == how.max_new_tokens else "stop")
        stats = engine.stats()
    assert (stats.running, stats.queued, stats.failed) == (0, 0, 0)
    assert stats.finished + stats.cancelled == stats.submitted == len(asked)
    assert stats.new_tokens == sum(len(stream.tokens) for stream, *_ in asked)


@pytest.mark.parametrize("seed", range(4))
def test_text_and_stop_strings_are_those_of_generate(seed):
    lm, stops = LM(ENDLESS, TOKENIZER), ["e", "th", "\n"][: seed + 1]
    how = {"seed": seed, "max_new_tokens": 40}
    with Engine(Script(), TOKENIZER) as engine:
        stream = engine.submit("Once", SamplingParams(**how), stop=stops)
        pieces = list(stream)
    assert "".join(pieces) == lm.generate("Once", stop=stops, **how)
    assert "" not in pieces
    assert stream.finish_reason == ("length" if len(stream.tokens) == 40 else "stop")


def test_requests_that_draw_differently_are_drawn_together():
    ways = [
        {},
        {"seed": 7},
        {"temperature": 0},
        {"temperature": 0, "repetition_penalty": 1.5},
        {"top_k": 3, "top_p": 1.0},
        {"min_p": 0.1, "repetition_penalty": 1.2},
    ]
    requests = [(PROMPTS[1], params(**way)) for way in ways]
    streams, stats = at_once(Script(slots=6), requests)
    assert [s.tokens for s in streams] == [alone(tuple(p), way, ENDLESS) for p, way in requests]
    assert stats.steps == 13


def test_with_the_fastest_decoder_there_is():
    requests = [(prompt, params(seed=i)) for i, prompt in enumerate(PROMPTS)]
    with Engine(decoder(ENDLESS, slots=3, max_length=200), TOKENIZER) as engine:
        streams = [engine.submit(*request) for request in requests]
        for stream in streams:
            stream.text()
    assert [s.tokens for s in streams] == [alone(tuple(p), how, ENDLESS) for p, how in requests]


def test_no_seed_means_other_draws_every_time():
    streams, _ = at_once(Script(), [(PROMPTS[1], params(seed=None))] * 3)
    assert len({tuple(stream.tokens) for stream in streams}) == 3


def test_no_tokens_are_an_empty_text():
    with Engine(Script(), TOKENIZER) as engine:
        stream = engine.submit("Once", params(max_new_tokens=0))
        assert (stream.text(), stream.tokens, stream.finish_reason) == ("", [], "length")


# ---- places


def test_memory_is_that_of_the_slots_whatever_comes():
    decoder = Script(slots=2)
    before = [keys.data_ptr() for keys, _ in decoder.rings]
    streams, stats = at_once(decoder, [(prompt, params()) for prompt in PROMPTS])
    assert [keys.data_ptr() for keys, _ in decoder.rings] == before
    assert {slot for name, *slots in decoder.calls if name == "step" for slot in slots} == {0, 1}
    assert max(len(call) - 1 for call in decoder.calls if call[0] == "step") == 2
    assert stats.finished == len(streams) == len(PROMPTS)


@pytest.mark.parametrize("max_queue", [0, 2])
def test_a_full_queue_refuses_clearly_and_takes_more_when_it_has_room(max_queue):
    refused = []

    def before(n):
        if n == 3:
            for _ in range(1 + max_queue):
                streams.append(engine.submit(PROMPTS[0], params()))
            with pytest.raises(QueueFull) as error:
                engine.submit(PROMPTS[0], params())
            refused.append(str(error.value))

    with Engine(Script(slots=2, before=before), TOKENIZER, max_queue) as engine:
        streams = [engine.submit(PROMPTS[1], params())]
        streams[0].text()
        for stream in streams:
            stream.text()
            assert len(stream.tokens) == 12
        engine.submit(PROMPTS[0], params()).text()
        assert engine.stats().refused == 1
    assert f"and {1 + max_queue} requests wait" in refused[0]
    assert "try again later" in refused[0]


def test_texts_are_as_long_as_a_slot():
    with Engine(Script(max_length=40), TOKENIZER) as engine:
        stream = engine.submit(PROMPTS[2], params(max_new_tokens=100))
        stream.text()
        assert len(stream.tokens) == 10
        assert stream.tokens == alone(tuple(PROMPTS[2]), params(max_new_tokens=10), ENDLESS)
        with pytest.raises(GemletError, match="40 tokens and up to 12 are to follow, but the context is 40; shorten"):
            engine.submit(PROMPTS[4], params())


def test_nobody_starts_before_one_who_came_earlier():
    class Starts(Script):
        def step(self, tokens, slots, positions, wanted=None):
            starts.extend(token for token, position in zip(tokens, positions, strict=True) if position == 0)
            return super().step(tokens, slots, positions, wanted)

        def prefill(self, slot, ids, start=0):
            starts.extend(ids[:1] if start == 0 else [])
            return super().prefill(slot, ids, start)

    starts = []
    lengths = (1, 9, 70, 3, 150, 2, 40, 1)
    at_once(Starts(slots=2), [([i] * length, params(max_new_tokens=5)) for i, length in enumerate(lengths)])
    assert starts == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_long_prompt_comes_in_parts_between_the_steps_of_others():
    decoder = Script()
    at_once(decoder, [(PROMPTS[1], params(max_new_tokens=20)), (ids[1][:180], params()), (ids[2][:100], params())])
    first = decoder.calls.index(("step", 0))
    parts, between = [], 0
    for name, *rest in decoder.calls[first + 1 :]:
        if name == "step":
            assert 0 in rest or len(parts) >= 5
            between = 0
        else:
            parts.append(tuple(rest))
            between += rest[2] - rest[1]
            assert between <= BETWEEN
    # in turns, so that the shorter one need not wait for the whole of the longer one
    assert parts == [(1, 0, 64), (2, 0, 64), (1, 64, 128), (2, 64, 99), (1, 128, 157), (1, 157, 179)]


def test_a_long_prompt_alone_comes_in_large_parts():
    decoder = Script(max_length=CONTEXT)
    with Engine(decoder, TOKENIZER) as engine:
        engine.submit(ids[0][:399], params()).text()
    assert decoder.calls[0] == ("prefill", 0, 0, min(398, ALONE))


# ---- beginnings in common


@pytest.mark.parametrize("prompt", PROMPTS[2:], ids=len)
def test_equal_prompts_are_taken_in_once(prompt):
    decoder = Script(slots=4)
    requests = [(PROMPTS[0], params())] + [(prompt, params(seed=i)) for i in range(3)]
    streams, stats = at_once(decoder, requests)
    assert [s.tokens for s in streams] == [alone(tuple(p), how, ENDLESS) for p, how in requests]
    taken_in = sum(call[3] - call[2] for call in decoder.calls if call[0] == "prefill")
    assert taken_in == len(prompt) - 1
    assert stats.shared_tokens == 2 * (len(prompt) - 1)
    assert stats.prompt_tokens == 1 + 3 * len(prompt)


@pytest.mark.parametrize("length", [MIN_SHARED - 1, MIN_SHARED, 50, 130])
def test_a_common_beginning_is_taken_in_once(length):
    requests = [(PROMPTS[0], params())] + [(ids[0][:length] + [i] * (i + 1), params()) for i in range(3)]
    streams, stats = at_once(Script(slots=4), requests)
    assert [s.tokens for s in streams] == [alone(tuple(p), how, ENDLESS) for p, how in requests]
    assert stats.shared_tokens == (2 * length if length >= MIN_SHARED else 0)


def test_a_conversation_goes_on_where_it_was():
    with Engine(Script(), TOKENIZER) as engine:
        prompt, shared = ids[0][:90], 0
        for turn in range(3):
            stream = engine.submit(prompt, params(seed=turn))
            stream.text()
            assert stream.tokens == alone(tuple(prompt), params(seed=turn), ENDLESS)
            assert engine.stats().shared_tokens == shared
            shared += len(prompt) + 11  # the last token was written, not read
            prompt = [*prompt, *stream.tokens, *ids[1][:5]]


def test_a_text_that_has_gone_far_beyond_its_beginning_cannot_give_it():
    decoder = Script(slots=2)
    with Engine(decoder, TOKENIZER) as engine:
        for how in (params(max_new_tokens=150), params(max_new_tokens=150, seed=1)):
            stream = engine.submit(PROMPTS[4], how)
            stream.text()
            assert stream.tokens == alone(tuple(PROMPTS[4]), how, ENDLESS)
        assert engine.stats().shared_tokens == 0


def test_going_back_twice_remembers_how_far_it_had_gone():
    """A ring that was once written far beyond has forgotten, even if the text in it is shorter now."""
    decoder = Script(slots=1)
    with Engine(decoder, TOKENIZER) as engine:
        for length in (140, 90, 40, 17):
            prompt = [*ids[0][:length], 3, 3, 3]
            stream = engine.submit(prompt, params(max_new_tokens=2))
            stream.text()
            assert stream.tokens == alone(tuple(prompt), params(max_new_tokens=2), ENDLESS)
        assert engine.stats().shared_tokens == 90 + 17  # at 40 the ring, written up to 141, had forgotten


@pytest.mark.parametrize("end", ["cancel", "error"])
def test_who_waits_for_a_beginning_goes_on_when_its_writer_is_gone(end):
    decoder = Script(slots=4)
    prompt = ids[1][:150]
    original = decoder.prefill
    streams = []

    def prefill(slot, ids, start=0):
        if start >= 64 and end == "error" and slot == 1:
            raise GemletError("lost")
        return original(slot, ids, start)

    def before(n):
        if n == 0:
            streams.extend(engine.submit(prompt, params(seed=i)) for i in range(3))
        if n == 1 and end == "cancel":
            streams[0].cancel()

    decoder.prefill, decoder.before = prefill, before
    with Engine(decoder, TOKENIZER) as engine:
        engine.submit(PROMPTS[1], params(max_new_tokens=20)).text()
        if end == "error":
            with pytest.raises(GemletError, match="lost"):
                streams[0].text()
        else:
            assert (streams[0].text(), streams[0].finish_reason) == ("", "cancelled")
        for i in (1, 2):
            streams[i].text()
            assert streams[i].tokens == alone(tuple(prompt), params(seed=i), ENDLESS)
        assert engine.stats().shared_tokens == 149 + (64 if end == "cancel" else 0)


# ---- leaving


def test_leaving_the_loop_frees_the_slot():
    with Engine(Script(slots=1), TOKENIZER) as engine:
        endless = engine.submit(PROMPTS[1], params(max_new_tokens=190))
        waiting = engine.submit(PROMPTS[2], params())
        for _ in endless:
            break
        waiting.text()
        assert waiting.tokens == alone(tuple(PROMPTS[2]), params(), ENDLESS)
        assert endless.finish_reason == "cancelled"
        assert len(endless.tokens) < 190


def test_who_waits_in_the_queue_can_give_up_and_makes_room():
    def before(n):
        if n == 0:
            second = engine.submit(PROMPTS[2], params())
            second.cancel()
            second.cancel()
            assert second.finish_reason == "cancelled"
            streams.append(engine.submit(PROMPTS[2], params()))

    with Engine(Script(slots=1, before=before), TOKENIZER, max_queue=1) as engine:
        streams = [engine.submit(PROMPTS[1], params())]
        streams[0].text()
        streams[1].text()
        streams[1].cancel()  # too late: nothing happens
        assert streams[1].finish_reason == "length"
        stats = engine.stats()
    assert (stats.finished, stats.cancelled) == (2, 1)


def test_who_does_not_read_keeps_nobody_waiting_and_loses_nothing():
    with Engine(Script(), TOKENIZER) as engine:
        lazy = engine.submit(PROMPTS[1], params(max_new_tokens=100))
        started = iter(lazy)
        first = next(started)
        engine.submit(PROMPTS[2], params(max_new_tokens=150)).text()
        assert lazy.finish_reason == "length"
        rest = list(started)
    assert len(rest) == 1, "what nobody took is one piece"
    assert first + rest[0] == TOKENIZER.decode(alone(tuple(PROMPTS[1]), params(max_new_tokens=100), ENDLESS))


def test_closing_ends_every_stream_with_an_error_that_says_so():
    reached, closing = threading.Event(), threading.Event()

    def before(n):
        if n == 5:
            reached.set()
            closing.wait()

    decoder = Script(slots=1, before=before)
    engine = Engine(decoder, TOKENIZER)
    running, queued = (engine.submit(PROMPTS[i], params(max_new_tokens=100)) for i in (1, 2))
    got, errors = [], []

    def read(stream):
        try:
            for piece in stream:
                got.append((stream, piece))
        except GemletError as error:
            errors.append(str(error))

    readers = [threading.Thread(target=read, args=(stream,)) for stream in (running, queued)]
    for reader in readers:
        reader.start()
    reached.wait()
    closer = threading.Thread(target=engine.close)
    closer.start()
    while not engine._closed:
        pass
    closing.set()
    for thread in (*readers, closer):
        thread.join()
    assert errors == ["the engine was closed before this text had ended; ask another one"] * 2
    assert running.tokens == alone(tuple(PROMPTS[1]), params(max_new_tokens=6), ENDLESS)
    assert {stream for stream, _ in got} == {running}
    assert running.finish_reason == queued.finish_reason == "error"
    engine.close()
    with pytest.raises(GemletError, match="the engine is closed"):
        engine.submit("Once")


def test_an_engine_without_work_closes():
    with Engine(Script(), TOKENIZER):
        pass


# ---- errors


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (([],), "no tokens"),
        (([320],), "token 320"),
        (([-1],), "token -1"),
        ((list(range(1, 200)) * 2,), "context is 200"),
        (("Once", None, ""), "stop is ''"),
    ],
)
def test_what_cannot_be_continued_is_refused_at_once(request_, message):
    with Engine(Script(), TOKENIZER) as engine:
        with pytest.raises(GemletError, match=message):
            engine.submit(*request_)
        assert engine.stats().submitted == 0


def test_logits_that_are_not_finite_end_their_own_request():
    class Poisoned(Script):
        def step(self, tokens, slots, positions, wanted=None):
            logits = super().step(tokens, slots, positions, wanted).clone()
            logits[[p == 8 and s == 1 for p, s in zip(positions, slots, strict=True)], 5] = torch.nan
            return logits

    decoder = Poisoned()
    streams = []
    decoder.before = lambda n: (
        streams.extend(engine.submit(PROMPTS[1], params(seed=i)) for i in (1, 2)) if n == 0 else None
    )
    with Engine(decoder, TOKENIZER) as engine:
        streams.append(engine.submit(PROMPTS[1], params()))
        streams[0].text()
        pieces = []
        with pytest.raises(GemletError, match="not finite after 9 tokens"):
            for piece in streams[1]:
                pieces.append(piece)
        expected = alone(tuple(PROMPTS[1]), params(seed=1), ENDLESS)[:4]
        assert (streams[1].tokens, streams[1].finish_reason) == (expected, "error")
        assert "".join(pieces) == TOKENIZER.decode(expected)
        streams[2].text()
        assert streams[2].tokens == alone(tuple(PROMPTS[1]), params(seed=2), ENDLESS)
        assert streams[0].tokens == alone(tuple(PROMPTS[1]), params(), ENDLESS)
        assert engine.stats().failed == 1


@pytest.mark.parametrize("where", ["prefill", "step"])
def test_a_defect_ends_those_it_strikes_and_the_engine_goes_on(where):
    decoder = Script()
    original = getattr(decoder, where)

    def broken(*args, **options):
        setattr(decoder, where, original)
        raise MemoryError("none left")

    setattr(decoder, where, broken)
    with Engine(decoder, TOKENIZER) as engine:
        with pytest.raises(MemoryError, match="none left"):
            engine.submit(PROMPTS[2], params()).text()
        stream = engine.submit(PROMPTS[2], params())
        stream.text()
        assert stream.tokens == alone(tuple(PROMPTS[2]), params(), ENDLESS)
        assert engine.stats().shared_tokens == 0


def test_a_defect_of_the_engine_itself_is_raised_where_texts_are_read():
    decoder = Script(slots=2)
    setattr(decoder, "copy", lambda *args: 1 / 0)  # noqa: B010
    with pytest.raises(ZeroDivisionError):
        at_once(decoder, [(PROMPTS[2], params())] * 2)


# ---- threads and loops


def test_many_threads_submit_and_read():
    got = {}
    with Engine(Script(ENDING), TOKENIZER) as engine:

        def client(i):
            prompt, how = PROMPTS[i % len(PROMPTS)], params(seed=i)
            stream = engine.submit(prompt, how)
            got[i] = stream.text() == TOKENIZER.decode(alone(tuple(prompt), how))

        threads = [threading.Thread(target=client, args=(i,)) for i in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert got == dict.fromkeys(range(24), True)


def test_async_for_gives_the_same_pieces_of_many_streams_in_one_loop():
    requests = [(PROMPTS[i], params(seed=i, max_new_tokens=30)) for i in range(6)]

    async def read(engine, request):
        return "".join([piece async for piece in engine.submit(*request)])

    async def main():
        with Engine(Script(), TOKENIZER) as engine:
            return await asyncio.gather(*(read(engine, request) for request in requests))

    expected = [TOKENIZER.decode(alone(tuple(p), how, ENDLESS)) for p, how in requests]
    assert asyncio.run(main()) == expected


def test_async_errors_come_behind_the_text():
    async def main():
        decoder = Script()
        decoder.before = lambda n: 1 / 0 if n == 4 else None
        pieces = []
        with Engine(decoder, TOKENIZER) as engine, pytest.raises(ZeroDivisionError):
            async for piece in engine.submit(PROMPTS[1], params()):
                pieces.append(piece)
        return "".join(pieces)

    assert asyncio.run(main()) == TOKENIZER.decode(alone(tuple(PROMPTS[1]), params(max_new_tokens=4), ENDLESS))


def test_a_task_that_is_cancelled_frees_its_slot():
    async def main():
        with Engine(Script(slots=1), TOKENIZER) as engine:
            stream, first = engine.submit(PROMPTS[1], params(max_new_tokens=190)), asyncio.Event()

            async def read():
                async for _ in stream:
                    first.set()

            task = asyncio.create_task(read())
            await first.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            other = engine.submit(PROMPTS[2], params())
            assert [piece async for piece in other]
            return stream.finish_reason, other.tokens

    assert asyncio.run(main()) == ("cancelled", alone(tuple(PROMPTS[2]), params(), ENDLESS))


def test_a_loop_that_is_gone_harms_nobody():
    with Engine(Script(), TOKENIZER) as engine:
        streams = []

        async def main():
            streams.append(engine.submit(PROMPTS[1], params(max_new_tokens=50)))
            reading = aiter(streams[0])
            await anext(reading)

        asyncio.run(main())
        stream = engine.submit(PROMPTS[2], params())
        stream.text()
        assert stream.tokens == alone(tuple(PROMPTS[2]), params(), ENDLESS)
