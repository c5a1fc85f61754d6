"""Exported folders: the weights in every form, what goes along and what stays behind, a card that tells the truth."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard

from gemlet.checkpoint import load_model, save_model
from gemlet.config import RunConfig
from gemlet.errors import GemletError
from gemlet.export.card import Run, find_run, model_card
from gemlet.export.hf import export_hf
from gemlet.metrics import read_metrics
from gemlet.prepare import load_meta
from gemlet.safetensors import read_header
from gemlet.tensors import dtype_of
from gemlet.testing import tiny_config, tiny_corpus, tiny_model, tiny_tokenizer
from gemlet.train import train

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def folder(tmp_path) -> Path:
    save_model(tmp_path / "source", tiny_model(3), tiny_tokenizer())
    return tmp_path / "source"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of four steps on a file of stories."""
    home = tmp_path_factory.mktemp("home-of-someone")
    (home / "my-stories.txt").write_text("\n<|endoftext|>\n".join(tiny_corpus()))
    config = RunConfig.model_validate(
        {
            "model": {**tiny_config(bos_token_id=None, eos_token_id=None).model_dump(), "vocab_size": 300},
            "data": {"source": str(home / "my-stories.txt")},
            "train": {
                "max_steps": 4, "sequence_length": 16, "batch_size": 2, "warmup_steps": 1, "log_every": 1,
                "eval_every": 2, "save_every": 1, "keep_checkpoints": 4, "sample_every": 0, "compile": "off",
                "device": "cpu", "sample_prompts": ('A "little" fox',),
            },
        }
    )  # fmt: skip
    return train(config, home / "run", quiet=True).out


def metadata(card: str) -> dict[str, Any]:
    """What the hub reads at the top of a card."""
    return ModelCard(card).data.to_dict()


# --- weights and files


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard", [10**9, 20_000])
def test_weights_are_those_of_the_source_rounded_once(folder, tmp_path, dtype, shard):
    out = export_hf(folder, tmp_path / "out", dtype=dtype, max_shard_bytes=shard)
    files = sorted(out.glob("*.safetensors"))
    assert (len(files) > 3) is (shard < 10**9) is (out / "model.safetensors.index.json").is_file()
    stored = {name: tensor for file in files for name, tensor in read_header(file).items()}
    assert {dtype_of(tensor) for tensor in stored.values()} == {DTYPES[dtype]}
    largest = max(torch.Size(tensor.shape).numel() for tensor in stored.values()) * DTYPES[dtype].itemsize
    assert all(file.stat().st_size < max(shard, largest) + 4096 for file in files)
    expected = {name: tensor.to(DTYPES[dtype]) for name, tensor in tiny_model(3).state_dict().items()}
    got = load_model(out, dtype=DTYPES[dtype]).state_dict()
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)
    values = json.loads((out / "config.json").read_text())
    assert values["dtype"] == values["torch_dtype"] == str(DTYPES[dtype]).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_without_a_dtype_the_bits_stay_as_they_are(tmp_path, dtype):
    save_model(tmp_path / "source", tiny_model(3), tiny_tokenizer(), dtype)
    out = export_hf(tmp_path / "source", tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "source" / "model.safetensors").read_bytes()


def test_of_mixed_weights_the_dtype_that_holds_them_all_is_taken(folder, tmp_path):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    mixed = {name: tensor.to(torch.bfloat16 if "norm" in name else torch.float16) for name, tensor in weights.items()}
    safetensors.torch.save_file(mixed, folder / "model.safetensors")
    out = export_hf(folder, tmp_path / "out")
    assert {tensor.dtype for tensor in read_header(out / "model.safetensors").values()} == {"float32"}
    got = load_model(out).state_dict()
    assert all(torch.equal(got[name], tensor.float()) for name, tensor in mixed.items())


def test_a_weight_beyond_fp16_is_named_and_nothing_is_left(tmp_path):
    model = tiny_model(3)
    with torch.no_grad():
        model.get_parameter("model.layers.2.mlp.up_proj.weight")[1, 1] = 70_000.0
    save_model(tmp_path / "source", model, tiny_tokenizer())
    with pytest.raises(GemletError, match=r"layers\.2\.mlp\.up_proj\.weight has values .* float16.*take bf16 or fp32"):
        export_hf(tmp_path / "source", tmp_path / "out", dtype="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_others_wrote_goes_along_and_the_state_of_the_training_does_not(folder, tmp_path):
    (folder / "train_state").mkdir()
    (folder / "train_state" / "optimizer.safetensors").write_bytes(b"large")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    kept = {
        "chat_template.jinja": "{{ messages }}\n",
        "special_tokens_map.json": '{"eos_token": "<|endoftext|>"}',
        "tokenizer.model": "\x00\x01",
        "generation_config.json": '{"eos_token_id": [0, 5], "top_k": 64, "cache_implementation": "hybrid"}',
        "tokenizer.json": (folder / "tokenizer.json").read_text() + "\n",
    }
    for name, text in kept.items():
        (folder / name).write_text(text)
    out = export_hf(folder, tmp_path / "out")
    assert {name: (out / name).read_text() for name in kept} == kept
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*kept, "README.md", "config.json", "model.safetensors", "tokenizer_config.json"]
    )


def test_a_tokenizer_that_transformers_5_saved_loads_in_transformers_4(folder, tmp_path):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({"tokenizer_class": "TokenizersBackend", "eos_token": "<|endoftext|>", "mine": "é"}))
    values = json.loads((export_hf(folder, tmp_path / "out") / "tokenizer_config.json").read_text("utf-8"))
    assert values.pop("tokenizer_class") == "PreTrainedTokenizerFast"
    assert values.pop("model_input_names") == ["input_ids", "attention_mask"]
    assert values == {"eos_token": "<|endoftext|>", "mine": "é"}
    file.write_text(json.dumps({"tokenizer_class": "GemmaTokenizer"}))  # both generations have it
    values = json.loads((export_hf(folder, tmp_path / "again") / "tokenizer_config.json").read_text())
    assert values == {"tokenizer_class": "GemmaTokenizer"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8', but must be one of fp32, bf16, fp16"),
        ({"max_shard_bytes": 0}, "max_shard_bytes is 0"),
        ({"license": "my own: words"}, "license is 'my own: words', but must be an identifier"),
    ],
)
def test_wrong_ways_to_export(folder, tmp_path, options, message):
    with pytest.raises(GemletError, match=message):
        export_hf(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_in_use_stays_as_it_is(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(GemletError, match="not empty"):
        export_hf(folder, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["precious"]


# --- the card


def test_the_card_of_a_run_says_what_its_files_say(run, tmp_path):
    out = export_hf(run, tmp_path / "little-fox", dtype="bf16", license="cc-by-4.0")
    card = (out / "README.md").read_text("utf-8")
    assert (out / "loss.png").read_bytes() == (run / "loss.png").read_bytes() and "(loss.png)" in card
    best, records = find_run(run / "checkpoints" / "best"), read_metrics(run / "metrics.jsonl")
    assert best is not None
    measured = next(record for record in records if record["step"] == best.step)
    for key in ("train/loss", "val/loss", "val/ppl", "val/bpb"):
        assert f"| {measured[key]:.4g} |" in card
    meta = load_meta(run / "tokens")
    for split in meta.splits.values():
        assert f"{split.documents:,} ({split.tokens:,} tokens, {split.bytes:,} bytes of text)" in card
    for words in (
        "# little-fox\n", "trained from scratch", "does not come from Google", f"| steps | {best.step} ",
        f"| tokens | {best.step * 32} ", "| batch | 2 sequences of 16 tokens |", "| optimizer | AdamW |",
        f"| parameters | {load_model(out).config.num_parameters:,} |", "`my-stories.txt`", 'name = "little-fox"',
        r'tokenizer("A \"little\" fox", return', "byte-level BPE of 300 tokens",
    ):  # fmt: skip
        assert words in card
    assert "no license" not in card
    assert metadata(card) == {
        "library_name": "transformers", "license": "cc-by-4.0", "pipeline_tag": "text-generation", "tags": ["gemlet"]
    }  # fmt: skip


def test_the_card_tells_nothing_of_the_machine(run, tmp_path):
    card = (export_hf(run, tmp_path / "out") / "README.md").read_text("utf-8")
    assert "home-of-someone" not in card and str(tmp_path) not in card


def test_the_configuration_in_the_card_trains_the_same_run_again(run, tmp_path):
    card = (export_hf(run, tmp_path / "out") / "README.md").read_text("utf-8")
    (toml,) = re.findall(r"```toml\n(.*?)```", card, re.DOTALL)
    mine = RunConfig.from_toml((run / "config.toml").read_text())
    assert RunConfig.from_toml(toml) == mine.replace(data=mine.data.replace(source="my-stories.txt"))


def test_every_checkpoint_has_the_figures_of_its_own_step(run, tmp_path):
    """A checkpoint between two validations says at which step it was validated; one before the first, nothing."""
    records = {record["step"]: record for record in read_metrics(run / "metrics.jsonl")}
    cards = {
        step: (export_hf(run / f"checkpoints/step-0000000{step}", tmp_path / str(step)) / "README.md").read_text()
        for step in (1, 3)
    }
    assert "validation loss" not in cards[1] and f"| {records[1]['train/loss']:.4g} |" in cards[1]
    assert f"| {records[3]['train/loss']:.4g} |" in cards[3]
    assert f"| {records[2]['val/loss']:.4g} (at step 2) |" in cards[3]
    assert "| steps | 3 of 4 |" in cards[3]


def test_counts_of_other_tokens_are_not_told(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    state = next((tmp_path / "run" / "checkpoints").glob("step-*4")) / "train_state" / "state.json"
    state.write_text(state.read_text().replace(json.loads(state.read_text())["data"], "0" * 64))
    found = find_run(state.parent.parent)
    assert found is not None and found.tokens is None
    assert "documents for training" not in model_card("x", found.config.model, found)


def test_a_checkpoint_of_another_model_gets_no_card_of_this_run(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    step = next((tmp_path / "run" / "checkpoints").glob("step-*4"))
    config = json.loads((step / "config.json").read_text())
    (step / "config.json").write_text(json.dumps({**config, "sliding_window": 9}))
    with pytest.raises(GemletError, match=r"is not a checkpoint of the run .*: its config\.json is another model's"):
        find_run(step)


@pytest.mark.parametrize(
    ("source", "datasets", "language", "words"),
    [
        ("tales", None, "en", "written by gemlet's own grammar"),
        ("tinystories", ["roneneldan/TinyStories"], "en", "CDLA-Sharing-1.0"),
        ("hub:someone/poems/fr", ["someone/poems"], None, "(https://huggingface.co/datasets/someone/poems)"),
        ("/somewhere/se|cret/notes.jsonl", None, None, "`notes.jsonl`"),
    ],
)
def test_data_are_told_as_far_as_they_are_known(source, datasets, language, words):
    config = RunConfig.model_validate({"data": {"source": source, "tokenizer": "gpt2"}})
    card = model_card("x", config.model, Run(Path("run"), config, 500, [], None))
    found = metadata(card)
    assert (found.get("datasets"), found.get("language")) == (datasets, language) and words in card
    assert "license" not in found and "has named no license" in card and "somewhere" not in card and "GPT-2's" in card
    assert "Nothing was measured" in card
    assert metadata(model_card("x", config.model, None, language="nl"))["language"] == "nl"


def test_of_a_folder_without_a_run_the_card_claims_nothing(folder, tmp_path):
    card = (export_hf(folder, tmp_path / "out") / "README.md").read_text()
    assert "Nothing beside its weights tells how it was trained" in card
    for claim in ("trained with", "from scratch", "Recipe", "Measured", "## Data", "toml"):
        assert claim not in card
    assert "license" not in metadata(card)


def test_a_card_that_is_there_is_kept(folder, tmp_path):
    own = "---\nlicense: gemma\n---\n\n# Theirs ü\n"
    (folder / "README.md").write_text(own, encoding="utf-8")
    out = export_hf(folder, tmp_path / "out", dtype="bf16")
    assert (out / "README.md").read_text("utf-8") == own
    with pytest.raises(GemletError, match=r"README\.md is there and is kept; write the license"):
        export_hf(folder, tmp_path / "again", license="mit")


def test_an_export_can_be_exported_again(run, tmp_path):
    """The card and its plot go along."""
    first = export_hf(run, tmp_path / "a")
    second = export_hf(first, tmp_path / "b")
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


def test_the_python_in_the_card_runs(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers", reason="transformers, the oracle, is not installed")
    export_hf(run, tmp_path / "little-fox")
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r"```python\n(.*?)```", (tmp_path / "little-fox" / "README.md").read_text(), re.DOTALL):
        exec(compile(code, "README.md", "exec"), {})
    assert 'A "little" fox' in capsys.readouterr().out
