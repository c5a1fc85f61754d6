import math
from importlib import import_module

import pytest
import torch

from gemlet.errors import GemletError
from gemlet.evaluate import eager, evaluate
from gemlet.testing import tiny_corpus, tiny_model, tiny_tokenizer


def parts():
    tokenizer = tiny_tokenizer()
    return tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=512), tokenizer


def one_by_one(model, tokenizer, documents) -> tuple[float, int]:
    """The protocol, written down naively: each document alone, from its beginning to its end token."""
    nats = tokens = 0.0
    for text in documents:
        ids = [*tokenizer.prompt_ids(text), tokenizer.eos_token_id]
        logp = model(torch.tensor([ids[:-1]]))[0].detach().log_softmax(-1)
        nats -= sum(float(logp[i, token]) for i, token in enumerate(ids[1:]))
        tokens += len(ids) - 1
    return nats, int(tokens)


@pytest.mark.parametrize("budget", [1, 400, 10**6])
def test_equals_documents_scored_one_by_one(budget, monkeypatch):
    monkeypatch.setattr(import_module("gemlet.evaluate"), "BATCH_TOKENS", budget)
    model, tokenizer = parts()
    documents = [*tiny_corpus()[:6], "ü", "a longer one. " * 20]
    result = evaluate(model, tokenizer, documents)
    nats, tokens = one_by_one(model, tokenizer, documents)
    assert result.tokens == tokens and result.documents == 8
    assert result.bytes == sum(len(d.encode()) for d in documents)
    assert result.nats == pytest.approx(nats, rel=1e-5)
    assert result.nats_per_token == pytest.approx(nats / tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / result.bytes, rel=1e-5)


def test_a_document_beyond_the_context_is_scored_in_pieces():
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=32)
    text = "one more word and " * 30
    result = evaluate(model, tokenizer, [text])
    assert result.tokens == len(tokenizer.encode(text)) + 1 > 64
    assert math.isfinite(result.nats)


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(GemletError, match="0 documents"):
        evaluate(*parts(), [])


def test_compiled_functions_run_uncompiled_inside_and_compiled_after():
    ran = []

    @torch.compile(backend=lambda graph, _: lambda *args: ran.append("compiled") or graph(*args))
    def double(x):
        return x * 2

    with eager():
        assert double(torch.ones(2)).tolist() == [2, 2]
    assert not ran
    double(torch.ones(2))
    assert ran == ["compiled"]
