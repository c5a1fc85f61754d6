"""Text through a model: stops and streams against cutting the whole text; loading; the package's own names."""

import importlib
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gemlet
import gemlet.generate
import gemlet.lm
from gemlet.checkpoint import save_model
from gemlet.config import TrainConfig
from gemlet.errors import GemletError
from gemlet.hub import Repository
from gemlet.kernels.build import library
from gemlet.lm import LM, TextWriter, load
from gemlet.sampling import Draws, SamplingOptions, SamplingParams
from gemlet.testing import tiny_corpus, tiny_model, tiny_tokenizer
from gemlet.tokenizer import IncrementalDecoder

PROMPT = "Once there was a little"


@pytest.fixture(scope="module")
def lm():
    """Random weights: what it writes is noise, with many broken and many multibyte characters."""
    return LM(tiny_model(3, eos_token_id=None, max_position_embeddings=300), tiny_tokenizer())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(path, tiny_model(3), tiny_tokenizer())
    return path


# ---- text


def test_generate_gives_the_continuation_of_the_prompt_behind_the_begin_token(lm):
    ids = [0, *tiny_tokenizer().encode(PROMPT)]
    params = SamplingParams(max_new_tokens=50, seed=1)
    tokens = list(gemlet.generate.generate(lm.model, ids, params))
    assert lm.generate(PROMPT, max_new_tokens=50, seed=1) == tiny_tokenizer().decode(tokens) != ""


def test_an_empty_prompt_starts_from_the_begin_token_alone(lm):
    tokens = list(gemlet.generate.generate(lm.model, [0], SamplingParams(max_new_tokens=9, seed=1)))
    assert lm.generate(max_new_tokens=9, seed=1) == lm.generate("", max_new_tokens=9, seed=1)
    assert lm.generate(max_new_tokens=9, seed=1) == tiny_tokenizer().decode(tokens)


def test_text_that_looks_like_the_end_token_is_text(lm, monkeypatch):
    """The prompt's ids hold no end token but the first, so the model sees what it saw in training."""
    seen = []
    monkeypatch.setattr(gemlet.lm, "generate_samples", lambda ready, ids, *_: seen.append(ids) or iter(()))
    lm.generate("a<|endoftext|>b", max_new_tokens=1)
    assert seen[0][0] == 0 and len(seen[0]) > 3 and 0 not in seen[0][1:]


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_joined_is_the_text(lm, seed):
    sampling = SamplingOptions(max_new_tokens=200, temperature=1.5, top_p=1.0, seed=seed)
    whole, pieces = lm.generate(PROMPT, **sampling), list(lm.stream(PROMPT, **sampling))
    assert "".join(pieces) == whole and "" not in pieces
    assert len(pieces) > 50


@pytest.mark.parametrize("seed", range(4))
def test_stops_cut_the_text_before_the_first_of_them(lm, seed):
    """Stop strings taken from the text itself: across tokens, of one character and of several, overlapping."""
    sampling = SamplingOptions(max_new_tokens=100, temperature=1.0, seed=seed)
    whole = lm.generate(PROMPT, **sampling)
    for stops in ([whole[20:21]], [whole[30:37]], [whole[50:52], whole[31:45]], [whole[40:48], whole[41:43]], ["\0\0"]):
        expected = whole[: min((whole.find(s) for s in stops if s in whole), default=len(whole))]
        assert lm.generate(PROMPT, stop=stops, **sampling) == expected
        assert "".join(lm.stream(PROMPT, stop=stops, **sampling)) == expected
    assert lm.generate(PROMPT, stop=whole[30:37], **sampling) == whole[: whole.find(whole[30:37])]


def test_a_stop_ends_the_computation(lm, monkeypatch):
    whole = lm.generate(PROMPT, seed=0, max_new_tokens=200)
    calls, draws = [], Draws.__call__
    monkeypatch.setattr(Draws, "__call__", lambda self: calls.append(1) or draws(self))
    for tell in (lm.generate, lm.stream):
        list(tell(PROMPT, seed=0, max_new_tokens=200, stop=whole[10:14]))
        assert 0 < len(calls) < 60
        calls.clear()
    next(lm.stream(PROMPT, seed=0, max_new_tokens=200))
    assert 0 < len(calls) < 10


class Spelling(IncrementalDecoder):
    """A decoder whose tokens are strings."""

    def __init__(self, pieces):
        self.pieces = list(pieces)

    def push(self, id):
        return self.pieces[id]

    def flush(self):
        return ""


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
)
def test_stops_are_found_however_the_text_comes_in_pieces(pieces, stops):
    text = "".join(pieces)
    expected = text[: min((text.find(s) for s in stops if s in text), default=len(text))]
    writer, got = TextWriter(Spelling(pieces), tuple(stops)), ""
    for i in range(len(pieces)):
        got += writer.push(i)
        assert expected.startswith(got)  # nothing leaks
        if writer.ended:
            break
    assert got + writer.flush() == expected
    assert not (writer.ended and expected == text and not any(s in text for s in stops))


def test_a_stop_that_begins_another_ends_at_once():
    writer = TextWriter(Spelling(["xa", "b"]), ("abc", "ab"))
    assert [writer.push(0), writer.push(1), writer.ended] == ["x", "", True]


def test_what_cannot_be_part_of_a_stop_is_not_held_back():
    writer = TextWriter(Spelling(["ab", "c", "xa", "b", "y"]), ("abd",))
    assert [writer.push(i) for i in range(5)] == ["", "abc", "x", "", "aby"]


def spelt(text):
    """The ids of a text, every byte a token of its own."""
    table = tiny_tokenizer()._bytes
    assert table is not None
    id_of = {token: id for id, token in table.items()}
    return [id_of[bytes([byte])] for byte in text.encode()]


@pytest.mark.parametrize("text", ["né🦀.", "Zoë said 你好"])
def test_characters_of_several_bytes_come_whole(text):
    for stop, expected in (((), text), ((text[-2],), text[:-2]), ((text[-2:] + "!",), text)):
        writer = TextWriter(tiny_tokenizer().decoder(), stop)
        pieces = []
        for id in spelt(text):
            pieces.append(writer.push(id))
            if writer.ended:
                break
        assert "".join([*pieces, writer.flush()]) == expected
        assert "\ufffd" not in "".join(pieces)


def test_half_a_character_at_the_end_is_one_replacement_character():
    writer = TextWriter(tiny_tokenizer().decoder(), ("never",))
    assert "".join([*map(writer.push, spelt("🦀")[:3]), writer.flush()]) == "\ufffd"


def test_several_samples_are_those_of_the_seeds(lm):
    tell = partial(lm.generate, PROMPT, max_new_tokens=40, temperature=1.0)
    alone = [tell(seed=5 + i) for i in range(4)]
    assert tell(seed=5, num_samples=4) == alone and len(set(alone)) == 4
    stop = [alone[1][3:5], alone[2][20:24]]
    stopped = [tell(seed=5 + i, stop=stop) for i in range(4)]
    assert tell(seed=5, num_samples=4, stop=stop) == stopped != alone


def test_no_seed_is_another_text_every_time(lm):
    assert lm.generate(PROMPT, max_new_tokens=40) != lm.generate(PROMPT, max_new_tokens=40)


def test_no_tokens_no_text(lm):
    assert lm.generate(PROMPT, max_new_tokens=0) == "" and list(lm.stream(PROMPT, max_new_tokens=0)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temprature": 1}, "unknown argument 'temprature'; did you mean 'temperature'?"),
        ({"temperature": -1}, "temperature is -1"),
        ({"stop": ""}, "none of them empty"),
        ({"stop": ["a", ""]}, "none of them empty"),
        ({"stop": [3]}, "must be a text or several"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"num_samples": 1.5}, "num_samples is 1.5"),
    ],
)
def test_wrong_arguments_are_refused_at_once(lm, arguments, message):
    with pytest.raises(GemletError, match=message.replace("?", r"\?")):
        lm.generate(PROMPT, **arguments)
    if "num_samples" not in arguments:
        with pytest.raises(GemletError):
            lm.stream(PROMPT, **arguments)


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(lm):
    with pytest.raises(GemletError, match=r"prompt has \d{3,} tokens .* context is 300; shorten the prompt to 299"):
        lm.stream("many words " * 100)


def test_the_options_are_the_fields_of_the_params():
    assert SamplingOptions.__annotations__.keys() == SamplingParams.__dataclass_fields__.keys()


# ---- logits


def test_logits_of_a_list_and_of_a_batch(lm):
    ids = torch.tensor([[0, 5, 9, 11], [0, 7, 8, 300]])
    with torch.no_grad():
        expected = lm.model(ids)
    got = lm.logits(ids)
    assert got.dtype == torch.float32 and got.shape == (2, 4, 320) and not got.requires_grad
    assert torch.equal(got, expected)
    torch.testing.assert_close(lm.logits([0, 7, 8, 300]), expected[1:])
    torch.testing.assert_close(lm.logits(ids[1].int()), expected[1:])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], r"\[0\]|\[1, 0\]"),
        ([0, 320], "320"),
        ([-1, 3], "-1"),
        ([0.5], "whole numbers"),
        (torch.zeros(1, 1, 1, dtype=torch.long), r"\[B, T\]"),
        ([3] * 301, "301 tokens, but the model's context is 300"),
    ],
)
def test_ids_that_are_none(lm, ids, message):
    with pytest.raises(GemletError, match=message):
        lm.logits(ids)


# ---- loading


def test_load_gives_back_what_was_saved(folder):
    lm, model = load(folder), tiny_model(3)
    assert lm.config == model.config
    assert lm.tokenizer.hash == tiny_tokenizer().hash
    ids = torch.arange(30)[None]
    assert torch.equal(lm.logits(ids), LM(model, tiny_tokenizer()).logits(ids))
    assert lm.generate(PROMPT, seed=0) == LM(model, tiny_tokenizer()).generate(PROMPT, seed=0)
    assert load(str(folder), device="cpu", dtype="bf16").model.head_weight.dtype == torch.bfloat16
    assert load(folder, dtype=torch.float16).model.head_weight.dtype == torch.float16


@pytest.mark.skipif(library("decode") is None, reason="no C++ compiler here, without which torch writes")
@pytest.mark.parametrize("dtype", ["auto", "int8", "int4"])
def test_writing_on_a_cpu_needs_no_torch(folder, dtype):
    """Nor the seconds it takes to load: the story is the same, and the model in torch is there when it is asked for."""
    code = (
        "import sys, gemlet\n"
        f"lm = gemlet.load({str(folder)!r}, device='cpu', dtype={dtype!r})\n"
        "print(ascii(lm.generate('Once', seed=1, max_new_tokens=30)), 'torch' in sys.modules)\n"
        "print(tuple(lm.logits([0, 5]).shape))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    story = LM(tiny_model(3), tiny_tokenizer(), dtype).generate("Once", seed=1, max_new_tokens=30)
    assert done.stdout == f"{story!a} False\n(1, 2, 320)\n"


def test_a_run_is_its_best_checkpoint_or_else_its_last(folder, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    (tmp_path / "run" / "tokens").mkdir(parents=True)
    for name, seed in (("last", 1), ("best", 2)):
        save_model(checkpoints / name, tiny_model(seed), tiny_tokenizer())
        expected = LM(tiny_model(seed), tiny_tokenizer()).logits([0, 1])
        assert torch.equal(load(tmp_path / "run").logits([0, 1]), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int2"}, "dtype is 'int2', but must be auto, fp32, bf16, fp16, int8, int4"),
        ({"dtype": torch.int32}, "torch.int32"),
        ({"device": "gpu"}, "gpu"),
    ],
)
def test_wrong_ways_to_load(folder, arguments, message):
    with pytest.raises(GemletError, match=message):
        load(folder, **arguments)


def test_what_is_no_model_is_refused_without_asking_the_hub(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(gemlet.lm, "repository", lambda *args: pytest.fail("the hub was asked"))
    (tmp_path / "a-file").write_text("hello")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    for source in ("nowhere", "empty/nowhere", "./nowhere", "a/b/c", tmp_path / "x" / "y", "a-file", "empty", ""):
        with pytest.raises(GemletError) as error:
            load(source)
        assert len(str(error.value)) < 300 + len(str(tmp_path))


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A hub with one model, whose files appear in a cache as they are fetched."""
    source, cache, fetched = tmp_path / "hub", tmp_path / "cache", []
    shutil.copytree(folder, source)
    (source / "pytorch_model.bin").write_text("a pickle")
    (source / "README.md").write_text("hello")
    (source / "onnx").mkdir()
    (source / "onnx" / "config.json").write_text("{}")

    class Hub(Repository):
        def fetch(self, file):
            fetched.append(file)
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            return Path(shutil.copy(source / file, cache / file))

    def found(name, kind):
        assert (name, kind) == ("someone/tiny", "model")
        files = tuple(sorted(p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()))
        return Hub(name, kind, "main", files, offline=False)

    monkeypatch.setattr(gemlet.lm, "repository", found)
    monkeypatch.chdir(tmp_path)
    return source, fetched


def test_a_model_of_the_hub(folder, hub):
    _, fetched = hub
    assert torch.equal(load("someone/tiny").logits([0, 1, 2]), load(folder).logits([0, 1, 2]))
    assert fetched[0] == "config.json"
    assert set(fetched) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_folder_goes_before_the_hub(hub, tmp_path):
    shutil.copytree(hub[0], tmp_path / "someone" / "tiny")
    load("someone/tiny")
    assert hub[1] == []


def test_another_kind_of_model_is_refused_before_its_weights_are_downloaded(hub):
    source, fetched = hub
    config = (source / "config.json").read_text()
    (source / "config.json").write_text(config.replace("gemma3_text", "llama"))
    with pytest.raises(GemletError, match="llama"):
        load("someone/tiny")
    assert fetched == ["config.json"]
    (source / "model.safetensors").unlink()
    with pytest.raises(GemletError, match=r"pytorch_model\.bin of the hub's model someone/tiny is a pickle"):
        load("someone/tiny")
    assert fetched == ["config.json"]
    (source / "config.json").unlink()
    with pytest.raises(GemletError, match=r"no config\.json"):
        load("someone/tiny")


# ---- the package


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys; before = set(sys.modules); import gemlet; dir(gemlet)\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'tokenizers', 'tiktoken', 'huggingface_hub', 'gemlet.config'}\n"
        "print(sorted(heavy & set(sys.modules) - before), len(set(sys.modules) - before) < 40)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] True\n"


def test_every_public_name_is_there():
    for name in dir(gemlet):
        assert getattr(gemlet, name) is not None
    assert gemlet.load is load and gemlet.LM is LM and gemlet.TrainConfig is TrainConfig
    with pytest.raises(AttributeError, match="'gemlet' has no attribute 'nothing'"):
        _ = gemlet.nothing  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", ["train", "prepare", "evaluate"])
def test_a_function_stays_a_function_when_its_module_is_imported(name):
    """`gemlet.train` is the function, whether or not the file of that name was imported before."""
    module = importlib.import_module(f"gemlet.{name}")
    assert callable(getattr(gemlet, name)) and getattr(gemlet, name) is getattr(module, name)


# ---- stand-ins


def test_the_stand_ins_are_whole_and_deterministic():
    corpus = tiny_corpus()
    assert len(set(corpus)) == len(corpus) >= 36
    tokenizer = tiny_tokenizer()
    assert tokenizer.vocab_size == tiny_model().config.vocab_size == 320
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in corpus)
    a, b, c = tiny_model(1), tiny_model(1), tiny_model(2)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert all(not torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))
