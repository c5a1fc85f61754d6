"""Text to token ids and back: a byte-level BPE trained here, GPT-2's, or any `tokenizer.json`.

One rule for text that looks like a special token: it is ordinary text and never becomes the special id.

tokenizers (Hugging Face) is the definition. Encoding goes through tiktoken, several times faster, where the
tokenizer is a byte-level BPE with GPT-2's pattern and the two agree on every text; `_gpt2_ranks` says when that is.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from gemlet.errors import GemletError, did_you_mean
from gemlet.files import write_text
from gemlet.hub import may_be_name, repository

END = "<|endoftext|>"

GPT2_PATTERN = (
    r"(?:'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)"  # in a group of its own, which a DFA matches
    r"|\s++$|\s+(?!\S)|\s"
)
"""GPT-2's pre-tokenisation, rearranged for speed; the pieces are the same."""

HF_CLASS = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
"""In every tokenizer_config.json: a class that transformers 4 and 5 know, and what it gives a model. By default it
gives token types, too, which `generate` of transformers 4 refuses."""

_SEPARATOR = "<|endoftext|>"  # between documents that are encoded in one call; no beginning of it is also its ending
_LONG_RUN = 8192  # white space in a row, in characters: the pattern's engine gives up at about a million
_SPACES = re.compile(rf"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{{{_LONG_RUN},}}")
_TRAINING_SLICE = 2048  # characters

_USUAL_ENDS = {END: END, "<eos>": "<bos>", "</s>": "<s>"}  # the usual names of the end token, with its begin token
_KEPT_KEYS = ("pad_token", "unk_token", "chat_template")  # of a tokenizer_config.json, when it is saved again


class Tokenizer:
    """A tokenizer whose end token is known. Made by `train` or `load`."""

    def __init__(self, backend: tokenizers.Tokenizer, bos: str | None, eos: str, extra: dict[str, Any] | None = None):
        self.bos_token, self.eos_token = bos, eos
        backend.add_special_tokens(sorted({eos} if bos is None else {bos, eos}))
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        self.eos_token_id = _known_id(backend, eos)
        self.bos_token_id = None if bos is None else _known_id(backend, bos)
        if bos is not None:  # for those who load the saved file: their text starts with it, as ours in training does
            backend.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, _known_id(backend, bos))]
            )
        self._backend = backend
        self._extra = extra or {}
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        """Rows that the embedding needs, special tokens included."""

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train a byte-level BPE with GPT-2's pattern; the same documents give the same tokenizer.

        `<|endoftext|>` has id 0 and both begins and ends; ids 1 to 256 are the bytes, the rest are merges of pairs that
        occur at least twice, so a small corpus can give fewer than `vocab_size`. Longer documents than 2,048 characters
        are read in slices of that, or a word of a million letters would take hours.
        """
        if vocab_size < 257:
            raise GemletError(
                f"vocab_size is {vocab_size}, but a byte-level BPE has at least 257: 256 bytes and the end token"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[END],
            initial_alphabet=sorted(_ALPHABET),
            show_progress=False,
        )
        backend.train_from_iterator((piece for text in documents for piece in _slices(text)), trainer)
        return cls(backend, END, END)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """`gpt2` (from the hub), a folder with `tokenizer.json` or `vocab.json` and `merges.txt`, a tokenizer.json, or,
        if there is no such path, the tokenizer of a model on the hub: OWNER/NAME.

        The end and begin tokens are those that `tokenizer_config.json`, `special_tokens_map.json` or
        `generation_config.json` beside it name, else the usual ones (`<|endoftext|>`, `<eos>`, `</s>`).
        """
        if str(path) == "gpt2":
            path = repository("openai-community/gpt2", "model").fetch("tokenizer.json")
        elif may_be_name(path):
            path = _from_hub(str(path))
        path = Path(path)
        folder, file = (path, path / "tokenizer.json") if path.is_dir() else (path.parent, path)
        if file.is_file():
            try:
                backend = tokenizers.Tokenizer.from_file(str(file))
            except Exception as error:  # tokenizers raises nothing more precise
                raise GemletError(f"{file} is not a tokenizer that can be read: {str(error)[:120]}") from error
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file() and path.is_dir():
            backend = _from_vocabulary(folder)
        else:
            raise GemletError(
                f"no tokenizer at {path}: give gpt2, a folder with tokenizer.json (or vocab.json and merges.txt), a "
                f"tokenizer.json, or a model on the hub, OWNER/NAME{did_you_mean(str(path), ['gpt2', 'bpe'])}"
            )
        config = _read_json(folder / "tokenizer_config.json")
        if (folder / "chat_template.jinja").is_file():  # where transformers 5 puts it
            config["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        bos, eos = _end_tokens(backend, folder, config)
        loaded = cls(backend, bos, eos, {key: config[key] for key in _KEPT_KEYS if config.get(key)})
        if loaded.eos_token_id in loaded.encode(eos):
            raise GemletError(f"{file}: the text {eos!r} cannot be told from the end token itself; use another one")
        return loaded

    def save(self, folder: str | Path, context: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json, such that `AutoTokenizer.from_pretrained(folder)` gives the
        begin token followed by the ids of `encode`. `context` is the longest text in tokens that a model takes."""
        config = {
            **self._extra,
            **HF_CLASS,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "clean_up_tokenization_spaces": False,
            **({} if context is None else {"model_max_length": context}),
        }
        write_text(Path(folder, "tokenizer.json"), self._backend.to_str(pretty=True) + "\n")
        write_text(Path(folder, "tokenizer_config.json"), json.dumps(config, indent=2) + "\n")

    @property
    def spec(self) -> dict[str, Any]:
        """What `tokenizer.json` says."""
        return json.loads(self._backend.to_str())

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that turns a conversation into a prompt, for the tokenizer of a chat model."""
        template = self._extra.get("chat_template")
        return template if isinstance(template, str) else None

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The special tokens and their ids, which `encode` never gives."""
        return {t.content: id for id, t in self._backend.get_added_tokens_decoder().items() if t.special}

    @cached_property
    def hash(self) -> str:
        """sha256 of all that decides the ids: equal hashes, equal ids. How the file is laid out does not matter."""
        spec = self.spec
        essence: list[Any] = [self.bos_token, self.eos_token, sorted(self._backend.get_vocab().items())]
        if self._ranks is None:
            essence += [spec["normalizer"], spec["pre_tokenizer"], spec["model"], spec["added_tokens"]]
        return hashlib.sha256(json.dumps(essence, sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of a text; nothing is added. A lone surrogate, which is no character, counts as U+FFFD."""
        if self._fast is None:
            return self._backend.encode(_without_surrogates(text), add_special_tokens=False).ids
        return [id for part in _parts(text) for id in self._fast.encode_ordinary(part)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text."""
        if self._fast is None:
            found = self._backend.encode_batch([_without_surrogates(t) for t in texts], add_special_tokens=False)
            return [encoding.ids for encoding in found]
        return [self.encode(text) for text in texts]

    def prompt_ids(self, text: str) -> list[int]:
        """The ids of a text that begins a document: what stood before every document in training, then `encode`."""
        return [self.eos_token_id if self.bos_token_id is None else self.bos_token_id, *self.encode(text)]

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        """The ids of all texts one after another, each followed by the end token: uint32 [tokens].

        Where the begin token is another one (Gemma's), it stands before each text; else the end token before it serves.
        """
        begins = [] if self.bos_token_id in (None, self.eos_token_id) else [self.bos_token_id]
        joined = _SEPARATOR.join([*texts, ""])
        plain = joined.count(_SEPARATOR) == len(texts) and not _may_have_long_run(joined)
        if self._fast is not None and plain and not begins:
            try:
                return self._fast.encode_to_numpy(joined, allowed_special={_SEPARATOR}, disallowed_special=())
            except UnicodeEncodeError:  # a lone surrogate somewhere
                pass
        ends = [self.eos_token_id]
        return np.array([id for ids in self.encode_batch(texts) for id in (*begins, *ids, *ends)], dtype=np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Special tokens are left out; bytes that are no UTF-8 become U+FFFD."""
        if self._bytes is None:
            return self._backend.decode(list(ids), skip_special_tokens=True)
        return b"".join([self._bytes.get(id, b"") for id in ids]).decode("utf-8", "replace")

    def decoder(self) -> IncrementalDecoder:
        """A decoder that takes one id after another, for streaming."""
        return IncrementalDecoder(self)

    @cached_property
    def _ranks(self) -> dict[bytes, int] | None:
        return _gpt2_ranks(self._backend)

    @cached_property
    def _fast(self) -> tiktoken.Encoding | None:
        if self._ranks is None:
            return None
        return tiktoken.Encoding(
            "gemlet",
            pat_str=GPT2_PATTERN,
            mergeable_ranks=self._ranks,
            special_tokens={_SEPARATOR: self.eos_token_id},
        )

    @cached_property
    def _bytes(self) -> dict[int, bytes] | None:
        """{id: bytes} without the special tokens, or None when tokens are not simply bytes."""
        if not isinstance(self._backend.decoder, decoders.ByteLevel):
            return None
        special = set(self.special_ids.values())
        return {id: _to_bytes(t) or t.encode() for t, id in self._backend.get_vocab().items() if id not in special}


class IncrementalDecoder:
    """Ids in, text out, only whole characters. All that `push` and `flush` return, joined, is `Tokenizer.decode`."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._table = tokenizer._bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []  # the last ids; their text depends on those before, hence some that are shown already
        self._shown = 0  # how many of `_ids` are

    def push(self, id: int) -> str:
        """The text that this id completes, often empty."""
        if self._table is not None:
            return self._utf8.decode(self._table.get(id, b""))
        self._ids.append(id)
        new = self._unseen()
        if new.endswith("\ufffd"):  # perhaps half of a character
            return ""
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return new

    def flush(self) -> str:
        """What is left at the end: half a character becomes U+FFFD."""
        if self._table is not None:
            return self._utf8.decode(b"", final=True)
        new, self._ids, self._shown = self._unseen(), [], 0
        return new

    def _unseen(self) -> str:
        decode = self._tokenizer.decode
        return decode(self._ids)[len(decode(self._ids[: self._shown])) :]


_BPE_OPTIONS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")


def is_byte_level(spec: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` is a byte-level BPE with GPT-2's pattern and every byte, and nothing beside it."""
    model, pattern = spec["model"], spec["pre_tokenizer"] or {}
    return (
        spec["normalizer"] is None
        and pattern.get("type") == "ByteLevel"
        and not pattern.get("add_prefix_space")
        and pattern.get("use_regex", True)
        and model["type"] == "BPE"
        and not any(model.get(k) for k in _BPE_OPTIONS)
        and not model.get("byte_fallback")
        and all(token["special"] for token in spec["added_tokens"])
        and all(token in model["vocab"] for token in _ALPHABET)
    )


def _gpt2_ranks(backend: tokenizers.Tokenizer) -> dict[bytes, int] | None:
    """{bytes: id} for tiktoken if it gives the ids of `backend` on every text, else None.

    Both merge by rank, but tokenizers merges the listed pairs only, tiktoken any two neighbours whose union is a token,
    with its id as rank. They agree when ids rise with the merges and every token, spelt alone, comes out as itself: the
    pieces that tiktoken finds at the moment it forms a token are, as no earlier merge crossed the token's borders,
    those which spelling it alone gives, and then they are the listed pair.
    """
    if backend.normalizer is not None:  # Gemma's has one: seen without spelling out a quarter of a million tokens
        return None
    spec = json.loads(backend.to_str())
    if not is_byte_level(spec):
        return None
    model = spec["model"]
    vocabulary = model["vocab"]
    merged = [left + right for left, right in (m.split(" ") if isinstance(m, str) else m for m in model["merges"])]
    ids = [vocabulary[token] for token in merged]
    if any(a >= b for a, b in pairwise(ids)):
        return None
    if any(len(backend.model.tokenize(token)) != 1 for token in merged):
        return None
    ranks = {_to_bytes(token): vocabulary[token] for token in (*_ALPHABET, *merged)}
    return {token: id for token, id in ranks.items() if token is not None}


def _slices(text: str) -> Iterator[str]:
    text = _without_surrogates(text)
    return (text[at : at + _TRAINING_SLICE] for at in range(0, len(text), _TRAINING_SLICE))


def _parts(text: str) -> Iterator[str]:
    """Cut very long runs of white space out of a text, where the pattern cuts it anyway.

    No piece of the pattern goes on from something else into white space, and of several white space characters before
    something else the last one alone can belong to what follows.
    """
    start = 0
    for run in _SPACES.finditer(text) if _may_have_long_run(text) else ():
        yield text[start : run.start()]
        start = run.end() if run.end() == len(text) else run.end() - 1
        yield text[run.start() : start]
    yield text[start:]


def _may_have_long_run(text: str) -> bool:
    """Whether a run of twice `_LONG_RUN` is possible: it would cover one of these blocks. Costs next to nothing."""
    return any(text[at : at + _LONG_RUN].isspace() for at in range(0, len(text) - _LONG_RUN + 1, _LONG_RUN))


def _alphabet() -> dict[str, int]:
    """The character that stands for each byte in the tokens of a byte-level BPE, as GPT-2 chose them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _alphabet()


def _to_bytes(token: str) -> bytes | None:
    """The bytes that a token stands for; None if it has a character that stands for no byte."""
    try:
        return bytes([_ALPHABET[character] for character in token])
    except KeyError:
        return None


def _without_surrogates(text: str) -> str:
    """The text as UTF-8 can hold it: surrogate pairs joined, lone ones replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _from_hub(name: str) -> Path:
    """The folder that has the tokenizer's files of a model on the hub."""
    model = repository(name, "model")
    core = ("tokenizer.json",) if "tokenizer.json" in model.files else ("vocab.json", "merges.txt")
    if not set(core) <= set(model.files):
        raise GemletError(f"the hub's model {name} has no tokenizer.json (nor vocab.json and merges.txt); name another")
    beside = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")
    folders = [model.fetch(file).parent for file in (*core, *beside) if file in model.files]
    return folders[0]


def _from_vocabulary(folder: Path) -> tokenizers.Tokenizer:
    """GPT-2's own format."""
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:
        raise GemletError(f"{folder}: vocab.json and merges.txt are not those of a BPE: {str(error)[:120]}") from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _end_tokens(backend: tokenizers.Tokenizer, folder: Path, config: dict[str, Any]) -> tuple[str | None, str]:
    """The begin and the end token of a tokenizer, from the files beside it or by their usual names."""
    named = {**_read_json(folder / "special_tokens_map.json"), **config}
    numbered = _read_json(folder / "generation_config.json")

    def find(kind: str, usual: Iterable[str]) -> str | None:
        ids = numbered.get(f"{kind}_token_id")
        listed = [backend.id_to_token(id) for id in (ids if isinstance(ids, list) else [ids]) if isinstance(id, int)]
        for token in (named.get(f"{kind}_token"), *listed, *usual):
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str) and backend.token_to_id(text) is not None:
                return text
        return None

    eos = find("eos", _USUAL_ENDS)
    if eos is None:
        raise GemletError(
            f"{folder}: this tokenizer has no end token: name one as eos_token in tokenizer_config.json "
            f"(the usual ones are {', '.join(_USUAL_ENDS)})"
        )
    return find("bos", [_USUAL_ENDS[eos]] if eos in _USUAL_ENDS else []), eos


def _read_json(path: Path) -> dict[str, Any]:
    """An object, empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GemletError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise GemletError(f"{path} holds a {type(values).__name__}, but must hold an object")
    return values


def _known_id(backend: tokenizers.Tokenizer, token: str) -> int:
    id = backend.token_to_id(token)
    assert id is not None, f"{token!r} was added but has no id"
    return id
