"""How well a model predicts documents: nats per token, perplexity, bits per byte.

Protocol Pdoc: every document is scored from its own start, after the beginning-of-text token, to its end token,
which counts. Bits per byte divides by the UTF-8 bytes of the documents, so models with different tokenizers compare.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from gemlet.errors import GemletError
from gemlet.loss import IGNORE, cross_entropy
from gemlet.model import Gemma
from gemlet.tokenizer import Tokenizer

BATCH_TOKENS = 8192
"""Tokens, padding included, that are scored at a time."""


@dataclass(frozen=True)
class Evaluation:
    """The sums behind the figures, and the figures."""

    nats: float
    tokens: int
    bytes: int
    documents: int

    @property
    def nats_per_token(self) -> float:
        """Mean -log p of a token, end tokens included."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """e to the nats per token."""
        return math.exp(min(self.nats_per_token, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Nats in bits over the bytes of the text: nats / ln 2 / bytes."""
        return self.nats / math.log(2) / self.bytes


def evaluate(model: Gemma, tokenizer: Tokenizer, documents: Iterable[str]) -> Evaluation:
    """Score documents by protocol Pdoc. Longer ones than the context are scored in pieces of the context."""
    texts = list(documents)
    if not texts:
        raise GemletError("0 documents to evaluate; give a file or a set that holds at least one")
    encoded = tokenizer.encode_batch(texts)
    return evaluate_tokens(model, tokenizer, encoded, sum(len(t.encode()) for t in texts))


def evaluate_tokens(model: Gemma, tokenizer: Tokenizer, documents: list[list[int]], n_bytes: int) -> Evaluation:
    """`evaluate` for documents that are encoded already, without special tokens, and their UTF-8 bytes in all."""
    start = tokenizer.prompt_ids("")
    context = model.config.max_position_embeddings
    pieces = []
    for ids in documents:
        whole = [*start, *ids, tokenizer.eos_token_id]
        pieces += [whole[i : i + context + 1] for i in range(0, len(whole) - 1, context)]
    nats, device = 0.0, model.device
    with torch.no_grad(), eager():
        for rows in _batches(sorted(pieces, key=len)):
            longest = len(rows[-1]) - 1
            inputs = torch.zeros(len(rows), longest, dtype=torch.long)
            targets = torch.full_like(inputs, IGNORE)
            for i, row in enumerate(rows):
                inputs[i, : len(row) - 1] = torch.tensor(row[:-1])
                targets[i, : len(row) - 1] = torch.tensor(row[1:])
            hidden = model.model(inputs.to(device))
            nats += cross_entropy(hidden, model.head_weight, targets.to(device)).double().sum().item()
    return Evaluation(nats, sum(len(p) - 1 for p in pieces), n_bytes, len(documents))


def _batches(rows: list[list[int]]) -> Iterator[list[list[int]]]:
    """Groups of rows, shortest first, of at most BATCH_TOKENS once padded to the group's longest."""
    group: list[list[int]] = []
    for row in rows:
        if group and (len(group) + 1) * len(row) > BATCH_TOKENS:
            yield group
            group = []
        group.append(row)
    yield group


@contextmanager
def eager() -> Iterator[None]:
    """Run compiled blocks uncompiled inside: every new shape would be compiled anew otherwise."""
    torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")
