"""A model's folder without torch: the same tensors, as arrays on the files' memory."""

import numpy as np
import pytest
import torch

from gemlet.checkpoint import load_model, save_model
from gemlet.errors import GemletError
from gemlet.folder import HEAD, StoredModel, parameter_shapes
from gemlet.ready import Ready
from gemlet.testing import tiny_config, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"num_attention_heads": 8, "head_dim": 10}])
def test_the_tensors_are_those_of_the_model(changes):
    model = tiny_model(0, **changes)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert parameter_shapes(tiny_config(**changes)) == shapes


@pytest.mark.parametrize("shard", [5 * 10**9, 40_000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_stored_model_is_the_loaded_one(tmp_path, dtype, shard):
    save_model(tmp_path / "m", tiny_model(3), tiny_tokenizer(), dtype, shard)
    stored, expected = StoredModel(tmp_path / "m"), load_model(tmp_path / "m").state_dict()
    assert stored.format == ("bf16" if dtype == torch.bfloat16 else "fp32")
    loaded = Ready(stored).model
    assert loaded.config == stored.config and loaded.dtype == torch.float32
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor.float(), expected[name])
        assert tensor.data_ptr() == stored.arrays[name].ctypes.data, "the same memory"
    assert stored.arrays.keys() == expected.keys()


def test_what_is_written_into_it_does_not_reach_the_file(tmp_path):
    save_model(tmp_path / "m", tiny_model(3), tiny_tokenizer())
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    StoredModel(tmp_path / "m").arrays["model.norm.weight"][:] = 7
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before


def rewrite(folder, dtype, **changes):
    """The folder's tensors, some of them changed, by the reference library."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file({name: w.to(dtype) for name, w in (weights | changes).items()}, folder / "model.safetensors")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_named(tmp_path, monkeypatch, dtype, value):
    monkeypatch.setattr("gemlet.folder.PIECE", 7)
    save_model(tmp_path / "m", tiny_model(3), tiny_tokenizer())
    name = "model.layers.2.mlp.down_proj.weight"
    weight = tiny_model(3).get_parameter(name).detach().clone()
    weight[-1, -1] = value
    rewrite(tmp_path / "m", dtype, **{name: weight})
    with pytest.raises(GemletError, match=f"{name} has values that are not finite in (float32|bfloat16)$"):
        StoredModel(tmp_path / "m")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_beside_a_tied_embedding_must_equal_it(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("gemlet.folder.PIECE", 100)
    save_model(tmp_path / "m", tiny_model(3), tiny_tokenizer())
    head = tiny_model(3).model.embed_tokens.weight.detach().clone()
    rewrite(tmp_path / "m", dtype, **{HEAD: head})
    assert HEAD not in StoredModel(tmp_path / "m").arrays
    head[-1, -1] += 1
    rewrite(tmp_path / "m", dtype, **{HEAD: head})
    with pytest.raises(GemletError, match="differs from the embedding"):
        StoredModel(tmp_path / "m")
