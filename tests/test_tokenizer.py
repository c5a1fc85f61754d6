import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from gemlet import tokenizer as module
from gemlet.errors import GemletError
from gemlet.hub import Repository
from gemlet.testing import tiny_corpus, tiny_tokenizer
from gemlet.tokenizer import Tokenizer
from tests.loopback_hub import LoopbackHub

END = "<|endoftext|>"
HARD = [
    "",
    " ",
    "x:\n\n   y",
    "a  b   c    d\t\te \n f\n\n\ng   ",
    "   leading and trailing   ",
    "it's I'll we've they're I'd I'm x's 's ' s '' 'S",
    "3.14159 1,000,000 ½ ² Ⅷ ٣ 十2",
    "naïve Zoë café ﬁ e\u0301 a\u0308\u0323",
    "👩\u200d👩\u200d👧 🎈🎈 🇪🇺 ❤\ufe0f",
    "中文字符、日本語のテキスト。한국어 ไทย",
    "\u202eright to left\u202c שלום עולם مرحبا",
    "\x00\x01\x1b[0m\x7f\x80\x85\x1c\x1d\x1e\x1f",
    "\ufeff\u200b\u2028\u2029\u00a0\u3000\u1680\u180e\ufffd",
    "<|endoftext|> <eos></s><bos><start_of_turn>user <|endoftext|",
    '{\'a\': [1, 2, 3]}; // ---- ==== #### \\n \\\\ """',
    "\n" * 50 + "x" + " " * 50,
    "a" * 5000,
    "ab1!" * 700,
]


def shared(name: str) -> Path:
    root = Path(os.environ.get("GEMLET_SHARED", Path(__file__).parents[2] / "shared"))
    if not (root / "data" / name).exists():
        pytest.skip(f"no {root / 'data' / name}; GEMLET_SHARED names the folder that holds data/{name}")
    return root / "data" / name


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer.load(shared("gpt2"))


def reference(tokenizer: Tokenizer, text: str) -> list[int]:
    """What the definition, tokenizers, gives."""
    return tokenizer._backend.encode(text, add_special_tokens=False).ids


def agrees(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer._fast is not None
    assert ids == reference(tokenizer, text)
    assert tokenizer.decode(ids) == text
    pieces = tokenizer.decoder()
    assert "".join([*map(pieces.push, ids), pieces.flush()]) == text
    assert tokenizer.encode_documents([text]).tolist() == [*ids, tokenizer.eos_token_id]


@pytest.mark.parametrize("text", HARD)
def test_both_encoders_agree_and_the_text_comes_back(text):
    agrees(tiny_tokenizer(), text)


def test_both_encoders_agree_for_gpt2(gpt2):
    for text in HARD:
        agrees(gpt2, text)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t'aB1.s"))))
def test_both_encoders_agree_on_any_text(text):
    agrees(tiny_tokenizer(), text)


def test_every_character_belongs_to_the_same_class_for_both():
    """A letter, a number, white space or something else: two versions of Unicode would cut differently."""
    tokenizer = tiny_tokenizer()
    for start in range(0, 0x20000, 4096):
        points = [p for p in range(start, start + 4096) if not 0xD800 <= p < 0xE000]
        text = "".join(f"a{chr(p)}1{chr(p)}!" for p in points)
        assert tokenizer.encode(text) == reference(tokenizer, text)


def test_gpt2s_ids(gpt2):
    assert gpt2.encode("Hello world") == [15496, 995]
    assert (gpt2.vocab_size, gpt2.eos_token_id, gpt2.bos_token_id) == (50257, 50256, 50256)
    assert 50256 not in gpt2.encode(END)
    assert gpt2.decode([15496, 50256, 995]) == "Hello world"


def test_every_byte_comes_back():
    tokenizer = tiny_tokenizer()
    assert tokenizer._bytes is not None
    assert {tokenizer._bytes[id] for id in range(1, 257)} == {bytes([b]) for b in range(256)}
    ids = {token: id for id, token in tokenizer._bytes.items()}
    everything = bytes(range(256)) * 2
    assert tokenizer.decode([ids[bytes([b])] for b in everything]) == everything.decode("utf-8", "replace")
    pieces = tokenizer.decoder()
    shown = "".join(pieces.push(ids[bytes([b])]) for b in everything) + pieces.flush()
    assert shown == everything.decode("utf-8", "replace")


def test_the_decoder_shows_whole_characters_only():
    tokenizer = tiny_tokenizer()
    pieces = tokenizer.decoder()
    ids = tokenizer.encode("é🎈")
    assert len(ids) > 3
    assert [text for text in map(pieces.push, ids) if text] == ["é", "🎈"]
    pieces.push(tokenizer.encode("🎈")[0])
    assert pieces.flush() == "\ufffd"


def test_lone_surrogates_count_as_replacement_characters():
    tokenizer = tiny_tokenizer()
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")
    assert tokenizer.encode("\ud83c\udf88") == tokenizer.encode("🎈")
    documents = tokenizer.encode_documents(["x", "a\ud800b"])
    assert documents.tolist() == [*tokenizer.encode("x"), 0, *tokenizer.encode("a\ufffdb"), 0]
    assert Tokenizer.train(["a\ud800b"] * 2, 300).vocab_size >= 257


def test_documents_are_their_ids_each_with_the_end_token():
    tokenizer = tiny_tokenizer()
    for texts in (HARD, HARD[:3], [END, "a"], ["x" + END[:-1], END[1:]], []):
        expected = [id for text in texts for id in (*reference(tokenizer, text), 0)]
        found = tokenizer.encode_documents(texts)
        assert found.dtype == np.uint32 and found.tolist() == expected
        assert int((found == 0).sum()) == len(texts)


@pytest.mark.parametrize("space", [" ", "\n", " \n", "\u3000"])
def test_long_runs_of_white_space_are_cut_where_the_pattern_cuts(monkeypatch, space):
    monkeypatch.setattr(module, "_LONG_RUN", 8)
    monkeypatch.setattr(module, "_SPACES", module.re.compile(module._SPACES.pattern.replace("8192", "8")))
    tokenizer = tiny_tokenizer()
    run = space * 30
    for text in (run, f"{run}x", f"x{run}", f"x{run}y", f"{run} y {run}z\n", f"a{run}\x1c{run}b", f"{run}'s{run}12"):
        assert len(list(module._parts(text))) > 1
        agrees(tokenizer, text)


def test_a_million_characters_without_a_break():
    tokenizer = tiny_tokenizer()
    for text in (" " * 10**6 + "x", "a" * 10**6):
        assert tokenizer.encode(text) == reference(tokenizer, text)
    assert Tokenizer.train(["a" * 10**6], 260).vocab_size == 260


def test_training_is_deterministic_and_a_small_corpus_gives_fewer_tokens():
    corpus = tiny_corpus()
    first, second = Tokenizer.train(corpus, 300), Tokenizer.train(iter(corpus), 300)
    assert first.hash == second.hash and first._backend.to_str() == second._backend.to_str()
    assert (first.vocab_size, first.eos_token_id, first.bos_token_id) == (300, 0, 0)
    assert first.hash != Tokenizer.train(corpus, 301).hash
    assert Tokenizer.train(["abc"], 300).vocab_size == 257
    with pytest.raises(GemletError, match="at least 257"):
        Tokenizer.train(corpus, 256)


def test_a_saved_tokenizer_comes_back_and_transformers_reads_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = tiny_tokenizer()
    tokenizer.save(tmp_path / "t", context=128)
    again = Tokenizer.load(tmp_path / "t")
    assert again.hash == tokenizer.hash
    assert again._backend.to_str() == tokenizer._backend.to_str()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    assert (theirs.bos_token, theirs.eos_token, theirs.model_max_length) == (END, END, 128)
    for text in HARD:
        ids = tokenizer.encode(text)
        assert theirs(text, split_special_tokens=True).input_ids == [0, *ids]
        assert theirs.decode(ids) == text
    spec = json.loads((tmp_path / "t" / "tokenizer.json").read_text("utf-8"))
    assert spec["pre_tokenizer"]["type"] == "ByteLevel" and not spec["pre_tokenizer"]["add_prefix_space"]


def test_gpt2_in_either_format_is_the_same_tokenizer(gpt2, tmp_path):
    gpt2.save(tmp_path, context=1024)
    spec = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    spec["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": "", "unk_token": END}  # as on the hub
    spec["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    for path in (tmp_path / "tokenizer.json", tmp_path / "hub"):
        assert Tokenizer.load(path).hash == gpt2.hash


def byte_fallback() -> tokenizers.Tokenizer:
    """A tokenizer built as Gemma's is: spaces become a letter, unknown characters bytes, no pattern."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=names, show_progress=False)
    backend.train_from_iterator(tiny_corpus(), trainer)
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = spec["added_tokens"][:4]  # the bytes are ordinary tokens
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return backend


def test_a_tokenizer_of_another_kind_works(tmp_path):
    byte_fallback().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer._fast is None
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (2, 1)
    for text in HARD:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {1, 2} & set(ids)
        pieces = tokenizer.decoder()
        assert "".join([*map(pieces.push, ids), pieces.flush()]) == text
    # its begin token is not its end token: it stands before every document, as it does before a prompt
    documents = [*tokenizer.prompt_ids("a b"), 1, *tokenizer.prompt_ids("c"), 1]
    assert documents[0] == 2 and tokenizer.encode_documents(["a b", "c"]).tolist() == documents
    tokenizer.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").hash == tokenizer.hash


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(t, "normalizer", normalizers.NFC()),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        lambda t: t.add_tokens(["fox"]),
    ],
)
def test_what_is_not_gpt2s_way_exactly_is_encoded_by_its_definition(change):
    backend = tokenizers.Tokenizer.from_str(tiny_tokenizer()._backend.to_str())
    change(backend)
    tokenizer = Tokenizer(backend, END, END)
    assert tokenizer._fast is None
    assert tokenizer.encode("a fox e\u0301") == reference(tokenizer, "a fox e\u0301")
    assert tokenizer.hash != tiny_tokenizer().hash


def test_merges_that_tiktoken_would_read_differently_are_not_given_to_it():
    """`abc` is merged from a and bc, but ab goes first: tokenizers then never forms it, tiktoken would."""
    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary = {**alphabet, "ab": 256, "bc": 257, "abc": 258}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "b"), ("b", "c"), ("a", "bc")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(backend, None, END)
    assert tokenizer._fast is None
    assert tokenizer.encode("abc") == [256, alphabet["c"]]


def test_the_end_token_is_found_or_asked_for(tmp_path):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<stop>", "<go>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(GemletError, match=r"no end token: name one as eos_token in tokenizer_config\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    assert Tokenizer.load(tmp_path).eos_token_id == 0
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<go>"}, "bos_token": "<stop>"}')
    found = Tokenizer.load(tmp_path)
    assert (found.eos_token_id, found.bos_token_id) == (1, 0)


def test_what_is_no_tokenizer_is_refused(tmp_path):
    for path, words in (
        (tmp_path / "none", "no tokenizer at"),
        ("gpt", "did you mean 'gpt2'"),
        (tmp_path, "no tokenizer at"),
    ):
        with pytest.raises(GemletError, match=words):
            Tokenizer.load(path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(GemletError, match="is not a tokenizer that can be read"):
        Tokenizer.load(tmp_path)
    tiny_tokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(GemletError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(("name", "model"), [("gpt2", "openai-community/gpt2"), ("someone/tiny", "someone/tiny")])
def test_a_tokenizer_by_name_comes_from_the_hub_and_then_from_its_cache(tmp_path, name, model):
    tiny_tokenizer().save(tmp_path / "t")

    def load(**env: str) -> str:
        """The hash of the tokenizer, or the refusal, in a fresh process."""
        code = f"from gemlet.tokenizer import Tokenizer\nprint(Tokenizer.load({name!r}).hash)"
        environment = {**os.environ, **hub.environment(tmp_path / "home", **env)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
        return (done.stdout or done.stderr).splitlines()[-1]

    with LoopbackHub() as hub:
        files = {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir()}
        hub.add("model", model, {**files, "model.safetensors": b"large"})
        assert f"GemletError: the hub's model {model} is not in the cache" in load(HF_HUB_OFFLINE="1")
        assert load() == tiny_tokenizer().hash
        assert load(HF_HUB_OFFLINE="1") == tiny_tokenizer().hash
        assert hub.downloads("tokenizer.json") == 1 and hub.downloads("model.safetensors") == 0


def test_the_tokenizer_of_a_model_on_the_hub_has_the_tokens_that_its_files_name(tmp_path, monkeypatch):
    """GPT-2's own form, with an end token that only tokenizer_config.json names; without any form it is refused."""
    vocabulary = json.loads(tiny_tokenizer()._backend.to_str())["model"]["vocab"]
    files = {
        "vocab.json": json.dumps({**vocabulary, "<end>": 320}),
        "merges.txt": "#version: 0.2\n",
        "tokenizer_config.json": json.dumps({"eos_token": "<end>"}),
        "config.json": "{}",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, "utf-8")

    class Hub(Repository):
        def fetch(self, file):
            return tmp_path / file

    monkeypatch.setattr(module, "repository", lambda name, kind: Hub(name, kind, "main", tuple(files), False))
    assert Tokenizer.load("someone/old").eos_token_id == 320
    del files["merges.txt"]
    with pytest.raises(GemletError, match=r"the hub's model someone/old has no tokenizer\.json \(nor"):
        Tokenizer.load("someone/old")
