"""Tokens to batches. A batch is a pure function of (seed, step, rank, world): resuming needs no replay."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gemlet.config import TrainConfig
from gemlet.errors import GemletError
from gemlet.prepare import load_meta

READ = 2**20
"""Tokens read at a time when documents are."""


class TokenStream:
    """A split of a folder of tokens, memory-mapped: all documents one after another, each closed by the end token."""

    def __init__(self, shards: list[np.ndarray], eos_token_id: int, bos_token_id: int | None = None):
        self.shards = shards
        self.eos_token_id = eos_token_id
        self.begin_token_id = eos_token_id if bos_token_id is None else bos_token_id
        self.starts = np.cumsum([0, *(len(s) for s in shards)])

    @classmethod
    def open(cls, folder: str | Path, split: Literal["train", "validation"]) -> "TokenStream":
        """Map a split ("train" or "validation") of a folder that `prepare` wrote; `load_meta` checks it first."""
        folder, meta = Path(folder), load_meta(folder)
        shards = [np.memmap(folder / s.file, dtype=meta.dtype, mode="r") for s in meta.splits[split].shards]
        return cls(list(shards), meta.eos_token_id, meta.bos_token_id)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def slice(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) as int64, across shards."""
        out = np.empty(length, np.int64)
        at, shard = 0, int(np.searchsorted(self.starts, start, "right")) - 1
        while at < length:
            offset = start + at - int(self.starts[shard])
            piece = self.shards[shard][offset : offset + length - at]
            out[at : at + len(piece)] = piece
            at, shard = at + len(piece), shard + 1
        return out

    def documents(self) -> Iterator[list[int]]:
        """The documents in order, without their end tokens."""
        rest = np.empty(0, np.int64)
        for start in range(0, len(self), READ):
            tokens = np.concatenate((rest, self.slice(start, min(READ, len(self) - start))))
            *whole, rest = np.split(tokens, np.flatnonzero(tokens == self.eos_token_id) + 1)
            yield from (document[:-1].tolist() for document in whole)

    def require(self, sequence_length: int) -> None:
        """Refuse a stream that is too short to train on sequences of this length."""
        if len(self) < 2 * sequence_length + 1:
            raise GemletError(
                f"the training data has {len(self)} tokens, but sequences of {sequence_length} need at least "
                f"{2 * sequence_length + 1}; give more text or a smaller --train.sequence-length"
            )


def batch(stream: TokenStream, config: TrainConfig, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a step's rows on one rank, [batch_size / world, T] each; targets are one token ahead.

    The stream is cut into sequences of T, which an epoch visits in an order of its own, each once; every epoch cuts
    at another offset. Row r of the step is the same whatever the number of ranks: rank k takes rows k, k + world, ...
    """
    T = config.sequence_length
    per_epoch = (len(stream) - 1) // T - 1  # one sequence less: room for the epoch's offset
    rows = []
    for row in range(step * config.batch_size + rank, (step + 1) * config.batch_size, world):
        epoch, index = divmod(row, per_epoch)
        offset, order = _epoch(config.seed, epoch, per_epoch, T)
        rows.append(stream.slice(offset + int(order[index]) * T, T + 1))
    tokens = torch.from_numpy(np.stack(rows))
    return tokens[:, :-1], tokens[:, 1:]


def document_starts(input_ids: Tensor, begin_token_id: int) -> Tensor:
    """Where the document of every token begins in its row: [B, T] -> [B, T].

    The token that begins a document is the first of it. Where that is the end token of the one before, it was
    predicted from that one but sees nothing of it: as in generation and evaluation, a story begins with this token.
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    return torch.where(input_ids == begin_token_id, positions, 0).cummax(-1).values


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, sequences: int, T: int) -> tuple[int, np.ndarray]:
    """Where an epoch's first sequence starts, and the order in which it visits its sequences."""
    random = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return int(random.integers(T)), random.permutation(sequences)
