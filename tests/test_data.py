import numpy as np
import pytest
import torch

from gemlet.config import DataConfig, TrainConfig
from gemlet.data import TokenStream, batch, document_starts
from gemlet.errors import GemletError
from gemlet.prepare import prepare


def stream(length=1000, cuts=(300, 301, 777), eos=0):
    return TokenStream(np.split(np.arange(length, dtype=np.uint16), cuts), eos)


def config(**changes):
    return TrainConfig(**{"sequence_length": 16, "batch_size": 8, **changes})


def test_slices_across_shards():
    s = stream()
    assert len(s) == 1000
    for start, length in ((0, 1000), (299, 4), (300, 1), (301, 476), (776, 2), (999, 1)):
        assert s.slice(start, length).tolist() == list(range(start, start + length))


def test_targets_are_the_inputs_one_ahead_and_rows_are_pieces_of_the_stream():
    inputs, targets = batch(stream(), config(), step=3)
    assert inputs.shape == targets.shape == (8, 16)
    assert torch.equal(targets, inputs + 1)  # the stream counts up
    assert inputs.dtype == torch.int64


def test_a_batch_is_a_pure_function_of_the_step():
    a, b = (batch(stream(), config(), step=5)[0] for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, batch(stream(), config(), step=6)[0])
    assert not torch.equal(a, batch(stream(), config(seed=1), step=5)[0])


def test_an_epoch_visits_every_sequence_once_and_the_next_one_cuts_elsewhere():
    s, c = stream(), config(batch_size=61)  # 61 sequences an epoch: (1000 - 1) // 16 - 1
    first, second = (batch(s, c, step)[0] for step in range(2))
    assert len({int(row[0]) for row in first}) == 61
    assert len(first.unique()) == 61 * 16
    assert first[0, 0] % 16 != second[0, 0] % 16 or set(first[:, 0].tolist()) != set(second[:, 0].tolist())
    assert not torch.equal(first, second)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batch_of_one(world):
    whole = batch(stream(), config(), step=2)[0]
    parts = [batch(stream(), config(), step=2, rank=rank, world=world)[0] for rank in range(world)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole)


def test_documents_come_back_without_their_end_tokens(monkeypatch):
    monkeypatch.setattr("gemlet.data.READ", 5)
    tokens = np.array([3, 4, 0, 5, 0, 6, 7, 8, 9, 1, 2, 0, 0], np.uint16)
    found = list(TokenStream([tokens[:6], tokens[6:]], 0).documents())
    assert found == [[3, 4], [5], [6, 7, 8, 9, 1, 2], []]


def test_a_document_starts_at_the_token_that_begins_it():
    ids = torch.tensor([[5, 5, 0, 5, 5, 0, 0, 5], [0, 5, 5, 5, 5, 5, 5, 0]])
    assert document_starts(ids, 0).tolist() == [[0, 0, 2, 2, 2, 5, 6, 6], [0, 0, 0, 0, 0, 0, 0, 7]]
    assert TokenStream([], 0).begin_token_id == 0  # the end token before a document serves
    assert TokenStream([], 1, 2).begin_token_id == 2  # where there is no other (Gemma's)


def test_a_prepared_folder_opens_and_a_short_one_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(f"Story {i} of a cat." for i in range(300)))
    folder = prepare(DataConfig(source=str(tmp_path / "a.txt")), tmp_path / "tokens", vocab_size=300)
    train = TokenStream.open(folder, "train")
    train.require(16)
    assert sum(1 for _ in train.documents()) + sum(1 for _ in TokenStream.open(folder, "validation").documents()) == 300
    with pytest.raises(GemletError, match=r"sequences of 100000 need at least 200001"):
        train.require(100_000)
