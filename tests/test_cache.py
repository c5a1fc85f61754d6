"""The cache: what the model computes with it is what it computes without, and its rings do not grow."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemlet.cache import KVCache
from gemlet.config import SLIDING
from gemlet.testing import tiny_config, tiny_model

LENGTH, WINDOW = 40, 8  # beyond three windows


@st.composite
def splits(draw, length=LENGTH):
    """Ways to cut `length` tokens into consecutive parts."""
    cuts = draw(st.sets(st.integers(1, length - 1)))
    edges = [0, *sorted(cuts), length]
    return [b - a for a, b in pairwise(edges)]


MODEL = tiny_model(1)
IDS = torch.randint(0, MODEL.config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    UNCACHED = MODEL(IDS)


@torch.no_grad()
def cached(model, ids, parts, max_length=None):
    cache = KVCache(model.config, ids.shape[0], max_length or ids.shape[1])
    logits = torch.cat([model(part, cache) for part in ids.split(parts, 1)], 1)
    assert cache.length == ids.shape[1]
    return logits


@settings(max_examples=60, deadline=None, derandomize=True)
@given(splits())
def test_any_chunking_equals_no_cache(parts):
    torch.testing.assert_close(cached(MODEL, IDS, parts), UNCACHED, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 2 * WINDOW + 1, LENGTH])
def test_chunks_around_the_window(size):
    parts = [size] * (LENGTH // size) + [LENGTH % size] * (LENGTH % size > 0)
    torch.testing.assert_close(cached(MODEL, IDS, parts), UNCACHED, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 5, LENGTH, 2 * LENGTH])
def test_windows_of_every_size(window):
    model = tiny_model(2, sliding_window=window)
    with torch.no_grad():
        expected = model(IDS)
    for parts in ([1] * LENGTH, [11, 1, 1, 16, 11], [3, 37]):
        torch.testing.assert_close(cached(model, IDS, parts), expected, atol=2e-5, rtol=1e-5)


def test_more_room_than_tokens():
    torch.testing.assert_close(cached(MODEL, IDS, [17, 1, 22], 3 * LENGTH), UNCACHED, atol=2e-5, rtol=1e-5)


def test_a_wrong_window_would_show():
    """The comparison above can tell windows apart that differ by one."""
    with torch.no_grad():
        other = tiny_model(1, sliding_window=WINDOW + 1)(IDS)
    assert (other - UNCACHED)[:, :WINDOW].abs().max() < 1e-5
    assert (other - UNCACHED)[:, WINDOW:].abs().max() > 1e-3


def test_rings_do_not_grow_with_the_length():
    config = tiny_config(max_position_embeddings=4096)
    short, long = KVCache(config, 1, 128), KVCache(config, 1, 4096)
    for kind, a, b in zip(config.layers, short.layers, long.layers, strict=True):
        assert a.k.shape[2] == (8 if kind == SLIDING else 128)
        assert b.k.shape[2] == (8 if kind == SLIDING else 4096)
    per_position = 2 * 4 * config.num_key_value_heads * config.head_dim
    assert long.nbytes - short.nbytes == 2 * per_position * (4096 - 128)  # the two full layers


def test_it_is_allocated_once():
    cache = KVCache(MODEL.config, 2, LENGTH)
    before = [(layer.k.data_ptr(), layer.v.data_ptr()) for layer in cache.layers]
    with torch.no_grad():
        for part in IDS.split([20, 1, 1, 18], 1):
            MODEL(part, cache)
    assert [(layer.k.data_ptr(), layer.v.data_ptr()) for layer in cache.layers] == before


def test_dtype_and_batch():
    cache = KVCache(MODEL.config, 3, 16, torch.bfloat16)
    assert cache.layers[0].k.dtype == torch.bfloat16
    assert cache.layers[0].k.shape == (3, MODEL.config.num_key_value_heads, 8, MODEL.config.head_dim)
