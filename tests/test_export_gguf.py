"""GGUF files, read back with the `gguf` package of llama.cpp's own repository.

What llama.cpp itself makes of them is a matter of tests/interop; here nothing but Python runs.
"""

import json
import math
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers

from gemlet import tensors
from gemlet.checkpoint import load_model, save_model
from gemlet.config import FULL, SLIDING
from gemlet.errors import GemletError
from gemlet.export import gguf as module
from gemlet.export.gguf import DTYPES, export_gguf, quantize_q4_0, quantize_q8_0
from gemlet.export.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, _scores
from gemlet.model import Gemma
from gemlet.testing import HARD_TEXTS, tiny_config, tiny_corpus, tiny_model, tiny_tokenizer
from gemlet.tokenizer import END, Tokenizer

KINDS = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0, "q4_0": Kind.Q4_0}
FIRST = "model.layers.0.self_attn.q_proj.weight"


def exported(tmp_path: Path, dtype: str = "f32", tokenizer: Tokenizer | None = None, **changes: Any) -> Path:
    """A tiny model in `model`, and its file."""
    save_model(tmp_path / "model", tiny_model(**changes), tokenizer or tiny_tokenizer())
    return export_gguf(tmp_path / "model", tmp_path / f"tiny-{dtype}.gguf", dtype)


def contents(path: Path) -> tuple[dict[str, Any], dict[str, tuple[Kind, np.ndarray]]]:
    """Metadata by key, and tensors by name: their format and their bytes or values as they are in the file."""
    reader = gguf.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return metadata, {tensor.name: (tensor.tensor_type, np.array(tensor.data)) for tensor in reader.tensors}


def theirs(model: Gemma) -> dict[str, torch.Tensor]:
    """The model's weights under the names that llama.cpp's own table gives them."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, model.config.num_hidden_layers)
    found = {}
    for name, weight in model.state_dict().items():
        there = names.get_name(name, try_suffixes=(".weight",))
        assert there is not None, name
        found[there] = weight
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tensor_is_the_models_in_the_format_that_was_asked_for(tmp_path, dtype, tied):
    path = exported(tmp_path, dtype, hidden_size=64, intermediate_size=96, tie_word_embeddings=tied)
    _, found = contents(path)
    weights = theirs(load_model(tmp_path / "model"))
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        kind, values = found[name]
        if weight.ndim == 1:
            assert kind == Kind.F32
            assert np.array_equal(values, (weight + 1).numpy()), name
            continue
        output = "token_embd.weight" if tied else "output.weight"
        expected = Kind.Q8_0 if dtype == "q4_0" and name == output else KINDS[dtype]
        reference = gguf.quants.quantize(weight.numpy(), expected)
        assert kind == expected, name
        assert np.array_equal(values.view(np.uint8), reference.view(np.uint8)), name


def test_the_shapes_are_those_of_ggml(tmp_path):
    path = exported(tmp_path)
    shapes = {tensor.name: list(tensor.shape) for tensor in gguf.GGUFReader(path).tensors}
    config = tiny_config()
    assert shapes["token_embd.weight"] == [config.hidden_size, config.vocab_size]
    assert shapes["blk.5.ffn_down.weight"] == [config.intermediate_size, config.hidden_size]
    assert shapes["output_norm.weight"] == [config.hidden_size]


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_rows_that_are_no_whole_blocks_stay_in_half_precision(tmp_path, dtype):
    path = exported(tmp_path, dtype, hidden_size=64, intermediate_size=50)
    _, found = contents(path)
    assert found["blk.0.ffn_down.weight"][0] == Kind.F16
    assert found["blk.0.ffn_up.weight"][0] == KINDS[dtype]
    reference = load_model(tmp_path / "model").state_dict()["model.layers.0.mlp.down_proj.weight"].half().numpy()
    assert np.array_equal(found["blk.0.ffn_down.weight"][1], reference)


QUANTIZERS = [(quantize_q8_0, Kind.Q8_0), (quantize_q4_0, Kind.Q4_0)]


@pytest.mark.parametrize(("quantize", "kind"), QUANTIZERS)
@settings(deadline=None, max_examples=200)
@given(
    rows=hnp.arrays(
        np.float32, (3, 64), elements=st.floats(-1000, 1000, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0])
    ),
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 100.0]),
)
def test_quantisation_is_the_references_bit_for_bit(quantize: Callable, kind: Kind, rows, scale):
    rows = (rows * np.float32(scale)).astype(np.float32)
    with np.errstate(all="ignore"):  # the reference divides by zero
        reference = gguf.quants.quantize(rows, kind)
    assert np.array_equal(quantize(torch.from_numpy(rows).reshape(-1)).numpy().reshape(3, -1), reference)


@pytest.mark.parametrize(("quantize", "kind"), QUANTIZERS)
def test_quantisation_of_many_weights_is_the_references(quantize: Callable, kind: Kind):
    values = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.03
    reference = gguf.quants.quantize(values.numpy(), kind)
    assert np.array_equal(quantize(values).numpy().reshape(-1), reference)


# ---------------------------------------------------------------------------------------------------------------------
# Metadata


def test_the_metadata_describe_the_model(tmp_path):
    path = exported(tmp_path, "q8_0", rope_theta=123.5, rope_local_base_freq=777.25, rms_norm_eps=1e-5, pad_token_id=3)
    found, _ = contents(path)
    config, keys = load_model(tmp_path / "model").config, gguf.Keys
    expected = {
        keys.General.ARCHITECTURE: "gemma3",
        keys.General.TYPE: "model",
        keys.General.NAME: "tiny-q8_0",
        keys.General.FILE_TYPE: int(gguf.LlamaFileType.MOSTLY_Q8_0),
        keys.General.QUANTIZATION_VERSION: gguf.GGML_QUANT_VERSION,
        keys.LLM.CONTEXT_LENGTH: config.max_position_embeddings,
        keys.LLM.EMBEDDING_LENGTH: config.hidden_size,
        keys.LLM.BLOCK_COUNT: config.num_hidden_layers,
        keys.LLM.FEED_FORWARD_LENGTH: config.intermediate_size,
        keys.LLM.VOCAB_SIZE: config.vocab_size,
        keys.Attention.HEAD_COUNT: config.num_attention_heads,
        keys.Attention.HEAD_COUNT_KV: config.num_key_value_heads,
        keys.Attention.KEY_LENGTH: config.head_dim,
        keys.Attention.VALUE_LENGTH: config.head_dim,
        keys.Attention.LAYERNORM_RMS_EPS: pytest.approx(1e-5),
        keys.Attention.SLIDING_WINDOW: config.sliding_window,
        keys.Attention.SLIDING_WINDOW_PATTERN: 3,
        keys.Rope.FREQ_BASE: 123.5,
        keys.Rope.FREQ_BASE_SWA: 777.25,
        keys.Tokenizer.MODEL: "gpt2",
        keys.Tokenizer.PRE: "gpt-2",
        keys.Tokenizer.BOS_ID: 0,
        keys.Tokenizer.EOS_ID: 0,
        keys.Tokenizer.PAD_ID: 3,
        keys.Tokenizer.ADD_BOS: True,
        keys.Tokenizer.ADD_EOS: False,
    }
    expected = {key.format(arch="gemma3"): value for key, value in expected.items()}
    lists = {keys.Tokenizer.LIST, keys.Tokenizer.TOKEN_TYPE, keys.Tokenizer.MERGES}
    assert found.keys() == expected.keys() | lists
    assert {key: value for key, value in found.items() if key not in lists} == expected


def test_every_value_has_the_type_that_llama_cpp_reads(tmp_path):
    fields = gguf.GGUFReader(exported(tmp_path, num_hidden_layers=3, layer_types=(FULL, SLIDING, FULL))).fields
    kinds = {key: [kind.name for kind in field.types] for key, field in fields.items()}
    assert kinds["general.name"] == ["STRING"]
    assert kinds["gemma3.block_count"] == ["UINT32"]
    assert kinds["gemma3.rope.freq_base"] == ["FLOAT32"]
    assert kinds["gemma3.attention.sliding_window_pattern"] == ["ARRAY", "BOOL"]
    assert kinds["tokenizer.ggml.tokens"] == ["ARRAY", "STRING"]
    assert kinds["tokenizer.ggml.token_type"] == ["ARRAY", "INT32"]
    assert kinds["tokenizer.ggml.bos_token_id"] == ["UINT32"]
    assert kinds["tokenizer.ggml.add_bos_token"] == ["BOOL"]


def test_the_file_types_are_llama_cpps():
    named = {dtype: getattr(gguf.LlamaFileType, f"MOSTLY_{dtype.upper()}", 0) for dtype in DTYPES}
    assert {dtype: number for dtype, (_, number) in DTYPES.items()} == named
    assert [format.number for format, _ in DTYPES.values()] == [int(kind) for kind in KINDS.values()]
    assert [(format.block, format.size) for format, _ in DTYPES.values()] == [
        gguf.GGML_QUANT_SIZES[kind] for kind in KINDS.values()
    ]


def pattern(tmp_path: Path, *layers: str) -> dict[str, Any]:
    found, _ = contents(exported(tmp_path, num_hidden_layers=len(layers), layer_types=layers))
    return {key.split(".")[-1]: value for key, value in found.items() if "sliding" in key}


def test_a_pattern_is_a_number_where_it_can_be(tmp_path):
    """llama.cpp's rule: layer i slides where i % pattern < pattern - 1."""
    alternating = pattern(tmp_path, SLIDING, FULL, SLIDING, FULL, SLIDING)
    assert alternating == {"sliding_window": 8, "sliding_window_pattern": 2}


def test_layers_that_all_slide_have_a_pattern_longer_than_they(tmp_path):
    assert pattern(tmp_path, SLIDING, SLIDING) == {"sliding_window": 8, "sliding_window_pattern": 3}


def test_any_other_order_is_a_list(tmp_path):
    found = pattern(tmp_path, FULL, SLIDING, SLIDING, FULL)
    assert found == {"sliding_window": 8, "sliding_window_pattern": [False, True, True, False]}


def test_full_layers_have_no_window(tmp_path):
    assert pattern(tmp_path, FULL, FULL) == {}


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def test_a_byte_level_bpe_is_there_token_by_token(tmp_path):
    found, _ = contents(exported(tmp_path, vocab_size=330))
    spec = tiny_tokenizer().spec
    names = {id: token for token, id in spec["model"]["vocab"].items()}
    assert found["tokenizer.ggml.tokens"] == [names.get(i, f"[PAD{i}]") for i in range(330)]
    assert found["tokenizer.ggml.token_type"] == [CONTROL] + [NORMAL] * 319 + [UNUSED] * 10
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in spec["model"]["merges"]]
    assert [int(t) for t in (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE)] == [
        int(gguf.TokenType[t]) for t in ("NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "UNUSED", "BYTE")
    ]


SPACE = "\u2581"


def gemma_like(folder: Path, vocab_size: int = 600, **changes: Any) -> Tokenizer:
    """A tokenizer with all that is peculiar to Gemma's: spaces as U+2581, bytes for unknown characters, special tokens,
    added tokens that are not special (runs of line ends and spaces, tags), and the pairs of every split of a token."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<unused0>", "<h1>", "</h1>"]
    runs = ["\n", "\n\n", "\n\n\n", SPACE * 2, SPACE * 3, SPACE * 4]
    learner = tokenizers.Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", SPACE)
    learner.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size - len(first + runs + bytes_), show_progress=False)
    learner.train_from_iterator(tiny_corpus(), trainer)
    learnt = json.loads(learner.to_str())["model"]
    vocabulary = {token: id for id, token in enumerate(first + runs + bytes_ + [*learnt["vocab"]])}
    # the runs first, the longest best, then each learnt token by all pairs that make it
    merges = [(run[:i], run[i:]) for run in sorted(runs, key=len, reverse=True) for i in range(1, len(run))]
    for left, right in learnt["merges"]:
        token = left + right
        splits = [(left, right), *((token[:i], token[i:]) for i in range(1, len(token)))]
        merges += [split for split in dict.fromkeys(splits) if split not in merges]
    vocabulary |= {SPACE: vocabulary.get(SPACE, len(vocabulary))}
    merges = [(a, b) for a, b in merges if a in vocabulary and b in vocabulary]
    options: dict[str, Any] = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, **options))
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    for name, value in changes.items():
        setattr(backend, name, value)
    backend.add_special_tokens(first[:6])
    backend.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in first[6:] + runs])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return Tokenizer.load(folder)


def sentencepiece(metadata: dict[str, Any], text: str) -> list[int]:
    """The ids that llama.cpp's `llama` tokenizer gives for plain text, as its src/llama-vocab.cpp has it."""
    tokens, types, scores = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "scores"))
    ids = {token: id for id, token in enumerate(tokens)}

    def merged(text: str) -> list[int]:
        pieces = list(text.replace(" ", SPACE))
        while pairs := [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in ids]:
            _, at = min(pairs)
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        known = [[ids[p]] if p in ids else [ids[f"<0x{byte:02X}>"] for byte in p.encode()] for p in pieces]
        return [id for piece in known for id in piece]

    parts: list[str | int] = [text]
    for token in sorted(
        (t for t, type in zip(tokens, types, strict=True) if type == USER_DEFINED), key=len, reverse=True
    ):
        cut: list[str | int] = []
        for part in parts:
            pieces = part.split(token) if isinstance(part, str) else [part]
            cut += [x for piece in pieces for x in (ids[token], piece)][1:]
        parts = cut
    found = [merged(part) if isinstance(part, str) else [part] for part in parts]
    return [metadata["tokenizer.ggml.bos_token_id"], *(id for part in found for id in part)]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> tuple[Tokenizer, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gemma")
    tokenizer = gemma_like(folder / "tokenizer")
    path = exported(
        folder, tokenizer=tokenizer, vocab_size=tokenizer.vocab_size, num_hidden_layers=1, layer_types=(FULL,),
        bos_token_id=2, eos_token_id=(1, 5), pad_token_id=0,
    )  # fmt: skip
    return tokenizer, contents(path)[0]


def test_a_gemma_tokenizer_becomes_sentencepiece(gemma):
    tokenizer, found = gemma
    types = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"], strict=True))
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.add_space_prefix"] is False
    assert "tokenizer.ggml.merges" not in found
    assert [types[t] for t in ("<bos>", "<eos>", "<start_of_turn>", "<unk>")] == [CONTROL, CONTROL, CONTROL, UNKNOWN]
    assert [types[t] for t in ("\n\n", "<h1>", "<unused0>")] == [USER_DEFINED] * 3
    assert [types[t] for t in (SPACE * 3, SPACE + "the", "<0x0A>")] == [NORMAL, NORMAL, BYTE]
    ids = {key: found[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "eot", "padding", "unknown")}
    assert ids == {"bos": 2, "eos": 1, "eot": 5, "padding": 0, "unknown": 3}
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert len(found["tokenizer.ggml.tokens"]) == tokenizer.vocab_size


@pytest.mark.parametrize("text", [*HARD_TEXTS, *tiny_corpus()[:3]])
def test_sentencepiece_gives_the_same_ids(gemma, text):
    tokenizer, found = gemma
    assert sentencepiece(found, text) == tokenizer.prompt_ids(text)


@settings(deadline=None, max_examples=300)
@given(
    text=st.lists(st.sampled_from([*"theoanils.,<>\n", " ", "  ", "   ", "<h1>", "<eos>", " the", "é", "👍"])).map(
        "".join
    )
)
def test_sentencepiece_gives_the_same_ids_for_any_text(gemma, text):
    tokenizer, found = gemma
    assert sentencepiece(found, text) == tokenizer.prompt_ids(text)


def test_the_corpus_takes_many_merges(gemma):
    """Otherwise the tests above would say little."""
    tokenizer, found = gemma
    assert len(tokenizer.encode(tiny_corpus()[0])) < len(tiny_corpus()[0]) / 2
    assert len(set(found["tokenizer.ggml.scores"])) > 100


def refused(tmp_path: Path, tokenizer: Tokenizer, match: str, **changes: Any) -> None:
    rows = {"vocab_size": tokenizer.vocab_size, "num_hidden_layers": 1, "layer_types": (FULL,), **changes}
    with pytest.raises(GemletError, match=match) as error:
        exported(tmp_path, tokenizer=tokenizer, **rows)
    assert len(str(error.value)) < 300
    assert [path.name for path in tmp_path.iterdir() if "gguf" in path.name or "Modelfile" in path.name] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", SPACE)])},
        {"normalizer": normalizers.Lowercase()},
        {"pre_tokenizer": pre_tokenizers.Metaspace()},
    ],
)
def test_other_tokenizers_are_refused(tmp_path, changes):
    refused(tmp_path, gemma_like(tmp_path / "tokenizer", **changes), "llama.cpp does not have this tokenizer")


def test_a_byte_level_bpe_with_another_pattern_is_refused(tmp_path):
    backend = tokenizers.Tokenizer.from_str(json.dumps(tiny_tokenizer().spec))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    refused(tmp_path, Tokenizer(backend, END, END), "llama.cpp does not have this tokenizer")


def test_a_pair_that_only_llama_cpp_would_merge_is_refused(tmp_path):
    spec = gemma_like(tmp_path / "whole").spec
    spec["model"]["merges"] = [pair for pair in spec["model"]["merges"] if "".join(pair) != SPACE + "the"]
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)), "<bos>", "<eos>")
    refused(tmp_path, tokenizer, "would make '\u2581the' of")


def changed(tokenizer: Tokenizer, change: Callable[[dict[str, Any]], None]) -> Tokenizer:
    """A tokenizer like Gemma's whose tokenizer.json says something else."""
    spec = tokenizer.spec
    change(spec)
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)), "<bos>", "<eos>")


def test_a_byte_that_has_no_token_is_refused(tmp_path):
    def forget(spec: dict[str, Any]) -> None:
        spec["model"]["vocab"]["<0x80>?"] = spec["model"]["vocab"].pop("<0x80>")

    tokenizer = changed(gemma_like(tmp_path / "whole"), forget)
    refused(tmp_path, tokenizer, "llama.cpp does not have this tokenizer")


@pytest.mark.parametrize("key", ["normalized", "lstrip", "rstrip", "single_word"])
def test_added_tokens_that_are_found_in_other_ways_are_refused(tmp_path, key):
    def change(spec: dict[str, Any]) -> None:
        next(token for token in spec["added_tokens"] if token["content"] == "<h1>")[key] = True

    tokenizer = changed(gemma_like(tmp_path / "whole"), change)
    refused(tmp_path, tokenizer, "llama.cpp does not have this tokenizer")


def test_a_token_called_like_a_row_without_one_is_refused(tmp_path):
    backend = tokenizers.Tokenizer.from_str(json.dumps(tiny_tokenizer().spec))
    backend.add_special_tokens(["[PAD321]"])  # of row 320
    refused(tmp_path, Tokenizer(backend, END, END), r"called \[PAD", vocab_size=322)


def test_of_equal_pairs_the_leftmost_is_merged_first():
    assert _scores(["aaa", "aa", "a"], [("a", "a"), ("aa", "a")], set()) == {"aa": 0, "aaa": -1}
    with pytest.raises(GemletError, match="of 'aa' and 'a'"):
        _scores(["a", "aa", "aaa"], [("a", "a"), ("a", "aa")], set())


def test_tokens_without_a_row_are_refused_but_for_special_ones(tmp_path):
    tokenizer = tiny_tokenizer()
    refused(tmp_path, tokenizer, "1 tokens, such as .*beyond the model's vocab_size of 319", vocab_size=319)
    backend = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.spec))
    backend.add_special_tokens(["<image>"])
    longer = Tokenizer(backend, END, END)
    assert longer.vocab_size == 321
    found, _ = contents(exported(tmp_path / "again", tokenizer=longer))
    assert len(found["tokenizer.ggml.tokens"]) == 320


def test_more_end_tokens_than_a_file_holds_are_refused(tmp_path):
    refused(tmp_path, tiny_tokenizer(), "4 end tokens", eos_token_id=(0, 1, 2, 3))


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_chat_template_goes_along(tmp_path, where):
    template = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
    save_model(tmp_path / "model", tiny_model(), tiny_tokenizer())
    file = tmp_path / "model" / where
    config = json.loads(file.read_text()) | {"chat_template": template} if file.exists() else None
    file.write_text(json.dumps(config) if config else template)
    path = export_gguf(tmp_path / "model", tmp_path / "chat.gguf", "f32")
    assert contents(path)[0]["tokenizer.chat_template"] == template
    assert "TEMPLATE" not in path.with_suffix(".Modelfile").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# What llama.cpp would compute otherwise, and weights that are no numbers


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"query_pre_attn_scalar": 64}, r"query_pre_attn_scalar is 64, .* by 16\*\*-0.5"),
        ({"num_hidden_layers": 62, "layer_types": None}, r"query_pre_attn_scalar is 16, .* by 8\*\*-0.5"),
        ({"num_hidden_layers": 513, "layer_types": None}, "at most 512"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(changes, match):
    with pytest.raises(GemletError, match=match):
        module.model_metadata(tiny_config(**changes), "name", 0)


def test_62_layers_are_taken_for_the_27b_model(tmp_path):
    config = tiny_config(num_hidden_layers=62, layer_types=None, query_pre_attn_scalar=8)  # 32 wide, 4 heads
    assert module.model_metadata(config, "name", 0)["gemma3.block_count"] == 62


def with_weights(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A model's folder whose weights were changed."""
    save_model(tmp_path / "model", tiny_model(), tiny_tokenizer())
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})
    return tmp_path / "model"


def setting(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[FIRST][3, 5] = value

    return change


@pytest.mark.parametrize(
    ("dtype", "value", "match"),
    [
        *((dtype, math.nan, "not finite") for dtype in DTYPES),
        *((dtype, -math.inf, "not finite") for dtype in DTYPES),
        ("f16", 65520.0, "too large for this dtype"),
        ("bf16", 3.4e38, "too large for this dtype"),
        ("q8_0", -1e7, "too large for this dtype"),
        ("q4_0", 1e6, "too large for this dtype"),
    ],
)
def test_a_weight_that_the_file_cannot_hold_is_named(tmp_path, dtype, value, match):
    with pytest.raises(GemletError, match=f"{FIRST} has values that are {match}"):
        export_gguf(with_weights(tmp_path, setting(value)), tmp_path / "out" / "x.gguf", dtype)
    assert [*(tmp_path / "out").iterdir()] == []


def test_the_largest_half_is_no_overflow(tmp_path):
    path = export_gguf(with_weights(tmp_path, setting(65519.0)), tmp_path / "x.gguf", "f16")
    assert contents(path)[1]["blk.0.attn_q.weight"][1][3, 5] == 65504


def test_a_tensor_of_another_model_is_refused(tmp_path):
    def extra(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)

    with pytest.raises(GemletError, match=r"q_proj\.bias unknown"):
        export_gguf(with_weights(tmp_path, extra), tmp_path / "x.gguf", "f32")


def test_a_superfluous_head_has_to_be_the_embedding(tmp_path):
    def head(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    folder = with_weights(tmp_path / "equal", head)
    assert "output.weight" not in contents(export_gguf(folder, tmp_path / "x.gguf", "f32"))[1]

    def other(weights: dict[str, torch.Tensor]) -> None:
        head(weights)
        weights["lm_head.weight"][7, 7] += 1

    with pytest.raises(GemletError, match=r"lm_head\.weight differs from the embedding"):
        export_gguf(with_weights(tmp_path / "other", other), tmp_path / "y.gguf", "f32")
    assert not (tmp_path / "y.gguf").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The file


def test_the_same_model_gives_the_same_bytes_however_it_is_cut_and_read(tmp_path, monkeypatch):
    whole = exported(tmp_path, "q8_0").read_bytes()
    sharded = tmp_path / "sharded"
    save_model(sharded, load_model(tmp_path / "model"), tiny_tokenizer(), max_shard_bytes=50_000)
    assert len([*sharded.glob("*.safetensors")]) > 3
    monkeypatch.setattr(tensors, "PIECE", 1024)
    for folder in (tmp_path / "model", sharded):
        (tmp_path / "tiny-q8_0.gguf").unlink()
        assert export_gguf(folder, tmp_path / "tiny-q8_0.gguf", "q8_0").read_bytes() == whole


def test_every_tensor_begins_at_a_multiple_of_32_bytes(tmp_path):
    path = exported(tmp_path, "q8_0", hidden_size=36, intermediate_size=33, num_attention_heads=6)
    reader = gguf.GGUFReader(path)
    assert struct.unpack("<4sI", path.read_bytes()[:8]) == (b"GGUF", 3)
    assert reader.alignment == 32
    assert {tensor.data_offset % 32 for tensor in reader.tensors} == {0}
    assert path.stat().st_size % 32 == 0


def test_progress_goes_from_nothing_to_all(tmp_path):
    save_model(tmp_path / "model", tiny_model(), tiny_tokenizer())
    seen: list[tuple[int, int]] = []
    path = export_gguf(tmp_path / "model", tmp_path / "x.gguf", "f32", lambda *at: seen.append(at))
    size = path.stat().st_size
    assert {total for _, total in seen} == {size}
    assert sorted(done for done, _ in seen) == [done for done, _ in seen]
    assert seen[-1][0] == size


def test_bf16_and_fp16_weights_are_taken_as_they_are(tmp_path):
    model = tiny_model()
    for dtype in (torch.bfloat16, torch.float16):
        save_model(tmp_path / str(dtype), model, tiny_tokenizer(), dtype)
        _, found = contents(export_gguf(tmp_path / str(dtype), tmp_path / f"{dtype}.gguf", "f32"))
        for name, weight in theirs(model).items():
            stored = weight.to(dtype).float()
            assert np.array_equal(found[name][1], (stored + 1 if weight.ndim == 1 else stored).numpy()), name


@pytest.mark.parametrize(
    ("name", "dtype", "match"),
    [
        ("x.gguf", "q5_0", "dtype is 'q5_0', but must be one of f32, f16, bf16, q8_0, q4_0"),
        ("x.bin", "f32", "does not end in .gguf"),
        ("there.gguf", "f32", "is there already"),
    ],
)
def test_a_mistake_is_told_before_anything_is_read(tmp_path, name, dtype, match):
    (tmp_path / "there.gguf").write_bytes(b"precious")
    with pytest.raises(GemletError, match=match):
        export_gguf(tmp_path / "nowhere", tmp_path / name, dtype)
    assert (tmp_path / "there.gguf").read_bytes() == b"precious"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interruption_leaves_nothing(tmp_path, error):
    save_model(tmp_path / "model", tiny_model(), tiny_tokenizer())

    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise error

    with pytest.raises(error):
        export_gguf(tmp_path / "model", tmp_path / "out" / "x.gguf", "f32", interrupt)
    assert [*(tmp_path / "out").iterdir()] == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_a_kill_leaves_no_file_and_the_next_attempt_is_as_if_nothing_had_happened(tmp_path):
    save_model(tmp_path / "model", tiny_model(), tiny_tokenizer())
    program = (
        "import os, sys\n"
        "from gemlet.export.gguf import export_gguf\n"
        "die = lambda done, total: done * 2 > total and os.kill(os.getpid(), 9)\n"
        "export_gguf(sys.argv[1], sys.argv[2], 'f32', die)\n"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path / "model"), str(tmp_path / "out" / "x.gguf")]
    killed = subprocess.run(arguments, cwd=Path(module.__file__).parents[2], env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".tmp-x.gguf"]
    path = export_gguf(tmp_path / "model", tmp_path / "out" / "x.gguf", "f32")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["x.Modelfile", "x.gguf"]
    whole = export_gguf(tmp_path / "model", tmp_path / "x.gguf", "f32")
    assert path.read_bytes() == whole.read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Ollama


def test_the_modelfile_samples_as_the_model_wants(tmp_path):
    official = {"num_hidden_layers": 6, "layer_types": None}
    text = exported(tmp_path, **official).with_suffix(".Modelfile").read_text()
    assert text.splitlines() == [
        "FROM ./tiny-f32.gguf",
        "TEMPLATE {{ .Prompt }}",
        "PARAMETER temperature 0.8",
        "PARAMETER top_k 0",
        "PARAMETER top_p 0.95",
        "PARAMETER min_p 0.0",
        "PARAMETER repeat_penalty 1.0",
        "PARAMETER num_ctx 128",
        'PARAMETER stop "<|endoftext|>"',
    ]


def test_a_model_without_sampling_is_greedy(tmp_path):
    save_model(tmp_path / "model", tiny_model(), tiny_tokenizer())
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": 0}')
    path = export_gguf(tmp_path / "model", tmp_path / "x.gguf", "f32")
    assert "PARAMETER temperature 0\n" in path.with_suffix(".Modelfile").read_text()


def test_the_modelfile_says_what_ollamas_own_engine_would_get_wrong(tmp_path):
    assert exported(tmp_path).with_suffix(".Modelfile").read_text().startswith("# Ollama's own engine")


def test_a_modelfile_that_is_there_is_kept(tmp_path):
    (tmp_path / "tiny-f32.Modelfile").write_text("mine")
    assert exported(tmp_path).with_suffix(".Modelfile").read_text() == "mine"
