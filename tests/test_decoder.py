"""The contract of a decoder, held by every kind of it: a row is what the whole sequence without a cache gives."""

import pytest
import torch

from gemlet.decoder import SPARE, TorchDecoder
from gemlet.testing import tiny_model

LENGTH = 100  # twelve windows, and more than a ring with its spare places
MODEL = tiny_model(3)
IDS = torch.randint(0, MODEL.config.vocab_size, (3, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()
with torch.no_grad():
    EXPECTED = MODEL(torch.tensor(IDS))

KINDS = [TorchDecoder]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def make(request):
    return lambda slots=3, max_length=LENGTH, model=MODEL: request.param(model, slots, max_length)


def close(logits, expected):
    torch.testing.assert_close(logits, expected, atol=3e-5, rtol=1e-5)


def test_token_by_token_equals_no_cache(make):
    decoder = make()
    got = [decoder.step([row[at] for row in IDS], [0, 1, 2], [at] * 3) for at in range(LENGTH)]
    close(torch.stack(got, 1), EXPECTED)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 63, 64, 65, 72, 73, LENGTH])
def test_a_prompt_equals_no_cache_and_goes_on(make, length):
    decoder = make()
    close(decoder.prefill(1, IDS[1][:length]), EXPECTED[1, length - 1])
    for at in range(length, LENGTH):
        close(decoder.step([IDS[1][at]], [1], [at])[0], EXPECTED[1, at])


def test_a_row_is_the_same_whatever_stands_beside_it(make):
    alone, together = make(), make()
    for row, length in enumerate((5, 40, 71)):
        assert torch.equal(alone.prefill(row, IDS[row][:length]), together.prefill(row, IDS[row][:length]))
    for step in range(25):
        places = [5 + step, 40 + step, 71 + step]
        tokens = [row[at] for row, at in zip(IDS, places, strict=True)]
        both = together.step(tokens, [0, 1, 2], places)
        for row in (2, 0, 1):
            assert torch.equal(alone.step(tokens[row : row + 1], [row], places[row : row + 1])[0], both[row])


@pytest.mark.parametrize("rows", [2, 5, SPARE])
def test_several_rows_of_a_slot_are_as_many_steps(make, rows):
    one, several = make(), make()
    ids = IDS[0]
    one.prefill(0, ids[:4])
    several.prefill(0, ids[:4])
    for start in range(4, LENGTH - rows, rows):
        places = list(range(start, start + rows))
        got = several.step(ids[start : start + rows], [0] * rows, places)
        for i, at in enumerate(places):
            assert torch.equal(one.step([ids[at]], [0], [at])[0], got[i])


def test_only_the_wanted_logits_come(make):
    first, second = make(), make()
    arguments = (IDS[0][:4], [0, 0, 0, 2], [0, 1, 2, 0])
    assert torch.equal(first.step(*arguments)[[3, 1]], second.step(*arguments, wanted=[3, 1]))


@pytest.mark.parametrize("back", [1, 3, SPARE])
def test_going_back_forgets_what_was_rejected(make, back):
    decoder = make()
    ids, wrong = IDS[0], IDS[1]
    start = LENGTH - back
    decoder.prefill(0, ids[:start])
    decoder.step(wrong[start : start + back], [0] * back, list(range(start, start + back)))
    got = decoder.step(ids[start : start + back], [0] * back, list(range(start, start + back)))
    close(got, EXPECTED[0, start:])


@pytest.mark.parametrize(("held", "length"), [(LENGTH, LENGTH), (LENGTH, LENGTH - SPARE), (70, 10), (3, 2)])
def test_a_copy_goes_on_by_itself(make, held, length):
    decoder = make()
    assert decoder.remembers(held, length)
    decoder.prefill(2, IDS[0][:held])
    decoder.prefill(0, IDS[1])  # what is there is overwritten
    decoder.copy(2, 0, length)
    decoder.prefill(2, IDS[2][:20])  # and what becomes of the source does not matter
    for at in range(length, LENGTH):
        close(decoder.step([IDS[0][at]], [0], [at])[0], EXPECTED[0, at])


def test_what_a_ring_has_lost_is_not_remembered(make):
    decoder = make()
    assert not decoder.remembers(LENGTH, LENGTH - SPARE - 1)
    assert not decoder.remembers(10, 11)


def test_a_slot_begins_anew(make):
    decoder = make()
    decoder.prefill(0, IDS[1])
    close(decoder.prefill(0, IDS[0][:30]), EXPECTED[0, 29])
