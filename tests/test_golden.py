"""The golden story: a model of 250,000 parameters, trained on tales, tells it greedily, byte for byte.

`tests/parity` has transformers tell it, `tests/interop` every other runtime.
"""

from pathlib import Path

import torch

from gemlet.eager import generate_uncached
from gemlet.lm import load
from gemlet.sampling import SamplingParams

GOLDEN = Path(__file__).parent / "golden"
MODEL = GOLDEN / "model"
PROMPT = "One day"
STORY = (GOLDEN / "story.txt").read_text(encoding="utf-8")


def test_the_story():
    assert PROMPT + load(MODEL).generate(PROMPT, temperature=0, max_new_tokens=400) == STORY


def test_the_story_without_a_cache():
    lm = load(MODEL)
    ids = generate_uncached(
        lm.model, lm.tokenizer.prompt_ids(PROMPT), SamplingParams(temperature=0, max_new_tokens=400)
    )
    assert PROMPT + lm.tokenizer.decode(ids) == STORY


def test_the_story_is_a_fair_one():
    """It passes the window several times, and no choice in it is so close that rounding could turn it."""
    lm = load(MODEL)
    start, ids = len(lm.tokenizer.prompt_ids(PROMPT)), lm.tokenizer.prompt_ids(STORY)
    first, second = lm.logits(ids)[0, start - 1 :].topk(2).values.unbind(-1)
    assert len(ids) > 8 * lm.config.sliding_window
    assert torch.min(first - second) > 0.02
