"""Documents to a folder of tokens that training maps into memory.

The folder: `meta.json`, the tokenizer, and shards `train-00000.bin`, ..., `validation-00000.bin`, ... of little-endian
uint16, or uint32 when the vocabulary needs it: the documents' tokens one after another, each document closed by the
end token. The bytes depend on the documents and the settings alone, not on the machine or on interruptions.

`meta.json` is written last: without it the folder is not whole. Until then `unfinished.json` says which shards are,
and the same call goes on after them. A folder that is whole and of the same data is returned at once.
"""

import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from gemlet import sources
from gemlet.config import DataConfig
from gemlet.errors import GemletError
from gemlet.files import remove, write_bytes, write_text
from gemlet.holdout import Divide, choose, divider
from gemlet.records import validated
from gemlet.tokenizer import Tokenizer

SHARD_TOKENS = 2**25
"""A shard is closed by the batch of documents that brings the tokens since the last one to this."""

BPE_SAMPLE = 20_000_000
"""A BPE is trained on the first training documents, up to this many characters in all."""

_BATCH = 2**20  # characters, about, that a thread encodes at a time
_META, _UNFINISHED = "meta.json", "unfinished.json"
_OURS = re.compile(r"(\.tmp-)?((train|validation)-\d{5}\.bin|unfinished\.json|meta\.json|tokenizer(_config)?\.json)")

Count = Annotated[int, Field(ge=0)]
Progress = Callable[[int, int, int, int | None], None]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Record):
    """One file of tokens."""

    file: Annotated[str, Field(pattern=r"^(train|validation)-\d{5}\.bin$")]
    tokens: Annotated[int, Field(ge=1)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Split(_Record):
    """What there is to train or to validate on; `tokens` has the end tokens in it, `bytes` counts the texts' UTF-8."""

    documents: Count
    tokens: Count
    bytes: Count
    shards: tuple[Shard, ...]


class Meta(_Record):
    """`meta.json`. `source` says what was asked for, for comparison with what is asked for later."""

    format: Literal[1]
    dtype: Literal["uint16", "uint32"]
    vocab_size: Annotated[int, Field(ge=1)]
    eos_token_id: Count
    bos_token_id: Count | None
    tokenizer_hash: str
    source: dict[str, Any]
    splits: dict[str, Split]
    """"train" and "validation"."""

    @property
    def fingerprint(self) -> str:
        """sha256 of what training sees: equal fingerprints, equal batches."""
        shards = {name: [(s.tokens, s.sha256) for s in split.shards] for name, split in sorted(self.splits.items())}
        seen = [self.tokenizer_hash, self.dtype, self.eos_token_id, self.bos_token_id, shards]
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def prepare(data: DataConfig, out: str | Path, *, vocab_size: int, progress: Progress | None = None) -> Path:
    """Write the folder of tokens that `data` describes to `out`; a folder that is whole already is left as it is.

    `vocab_size` is for `data.tokenizer == "bpe"`, which is trained on the documents. `progress` is called with the
    documents, the tokens and the bytes of text so far, and about how many bytes there are, where that is known.
    Returns the folder: `out`, or `data.source` itself if that is a folder of tokens.

    Validation is what `data.validation` names, else what the source itself keeps for it, else about one document in a
    hundred, chosen by the sha256 of its text; of a single document, its last twentieth. A training document that is
    also a validation document, word for word, is left out.
    """
    out, source = Path(out), Path(data.source)
    if (source / _META).is_file():
        load_meta(source)
        return source
    whole = load_meta(out) if (out / _META).is_file() else None
    unfinished = None if whole else _Unfinished.read(out)
    before = whole.source if whole else unfinished.wanted if unfinished else {}
    given = None if data.tokenizer in ("bpe", "gpt2") else Tokenizer.load(data.tokenizer)
    wanted = _wanted(data, {"bpe": vocab_size} if given is None else {"hash": given.hash}, before)
    if whole:
        _require_same(out, whole, wanted)
        remove(out / _UNFINISHED)  # a kill right after meta.json leaves it
        return out
    if out.exists() and not out.is_dir():
        raise GemletError(f"{out} is a file; give a folder for the tokens")
    strangers = sorted(p.name for p in out.iterdir() if not _OURS.fullmatch(p.name)) if out.is_dir() else []
    if strangers:
        raise GemletError(f"{out} is not empty ({', '.join(strangers[:3])}); give a new folder for the tokens")
    if unfinished and _identity(unfinished.wanted) == _identity(wanted):
        tokenizer = Tokenizer.load(out)
    else:
        own = data.validation is not None or sources.has_validation(data.source)
        unfinished = _Unfinished(wanted, hold_out=None if own else choose(_documents(data, "train")))
        tokenizer = given or _tokenizer(data, vocab_size, unfinished.hold_out)
        for file in out.iterdir() if out.is_dir() else ():
            remove(file)
        tokenizer.save(out)
        unfinished.write(out)
    _tokenize(data, out, unfinished, tokenizer, progress)
    meta = {
        "format": 1,
        "dtype": _dtype(tokenizer).name,
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "tokenizer_hash": tokenizer.hash,
        "source": wanted,
        "splits": unfinished.splits,
    }
    validated(Meta, meta, "what was prepared")
    write_text(out / _META, json.dumps(meta, indent=1) + "\n")
    remove(out / _UNFINISHED)
    return out


def load_meta(folder: str | Path) -> Meta:
    """Read and check `meta.json`, that every shard has the size it says, and that the tokenizer is the one it names."""
    folder = Path(folder)
    file = folder / _META
    if not file.is_file():
        half = (folder / _UNFINISHED).is_file()
        raise GemletError(
            f"{folder} is half prepared; run the same gemlet prepare again and it goes on"
            if half
            else f"no folder of tokens at {folder}: it has no {_META}; make one with gemlet prepare"
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GemletError(f"{file} is not valid JSON: {error}; prepare the data again") from error
    if not isinstance(values, dict) or values.get("format") != 1:
        raise GemletError(f"{file} is not of format 1, the one this gemlet reads; prepare the data again")
    meta = validated(Meta, values, str(file))
    if sorted(meta.splits) != ["train", "validation"]:
        raise GemletError(f"{file} has the splits {', '.join(meta.splits)}, but must have train and validation")
    for name, split in meta.splits.items():
        for shard in split.shards:
            path, expected = folder / shard.file, shard.tokens * np.dtype(meta.dtype).itemsize
            if not path.is_file():
                raise GemletError(f"{path} is missing; prepare the data again")
            if path.stat().st_size != expected:
                raise GemletError(
                    f"{path} has {path.stat().st_size:,} bytes, but must have {expected:,} ({shard.tokens:,} tokens of "
                    f"{meta.dtype}): it is cut off or not ours; prepare the data again"
                )
        if sum(shard.tokens for shard in split.shards) != split.tokens:
            raise GemletError(f"{file}: the shards of {name} are not {split.tokens:,} tokens; prepare the data again")
    files = [folder / "tokenizer.json", folder / "tokenizer_config.json"]
    if _tokenizer_hash(folder, tuple(f.stat().st_mtime_ns for f in files if f.is_file())) != meta.tokenizer_hash:
        raise GemletError(f"{folder}: its tokens were made with another tokenizer than its own; prepare the data again")
    return meta


def verify(folder: str | Path) -> None:
    """Read every shard: its sha256 must be that of `meta.json`, and every id within the vocabulary."""
    folder, meta = Path(folder), load_meta(folder)
    for shard in (shard for split in meta.splits.values() for shard in split.shards):
        path = folder / shard.file
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                raise GemletError(f"{path} was changed: its sha256 is not that of {_META}; prepare the data again")
        tokens = np.memmap(path, dtype=np.dtype(meta.dtype).newbyteorder("<"), mode="r")
        if tokens.max() >= meta.vocab_size:
            at = int(np.argmax(tokens >= meta.vocab_size))
            raise GemletError(f"{path}: token {at:,} is {tokens[at]}, but the vocabulary has {meta.vocab_size:,}")


@dataclass
class _Unfinished:
    """`unfinished.json`: how far the folder is. All the documents counted here are in the shards listed here."""

    wanted: dict[str, Any]
    hold_out: str | None
    """How validation is chosen from the documents (`gemlet.holdout`); None: it has documents of its own."""
    stage: int = 0
    """Which of the streams of documents is read."""
    documents: int = 0
    """How many of the stream are read."""
    splits: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {
            name: {"documents": 0, "tokens": 0, "bytes": 0, "shards": []} for name in ("train", "validation")
        }
    )

    @classmethod
    def read(cls, folder: Path) -> "_Unfinished | None":
        file = folder / _UNFINISHED
        return cls(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None

    def write(self, folder: Path) -> None:
        write_text(folder / _UNFINISHED, json.dumps(asdict(self)))


@dataclass
class _Encoded:
    """A batch of documents as tokens, by split."""

    documents: int
    parts: dict[str, tuple[int, int, np.ndarray]]  # documents, bytes, tokens


def _tokenize(data: DataConfig, out: Path, done: _Unfinished, tokenizer: Tokenizer, progress: Progress | None) -> None:
    """Write the shards that are missing, and keep `done` up to date."""
    streams = ["train"] if done.hold_out else ["validation", "train"]
    total = sources.text_bytes(data.source)
    if data.validation is not None and total is not None:
        more = sources.text_bytes(data.validation)
        total = None if more is None else total + more
    waiting: dict[str, list[np.ndarray]] = {name: [] for name in done.splits}
    texts = tokens = size = 0  # so far, for the progress

    def close_shards() -> None:
        for name, arrays in waiting.items():
            if arrays:
                content = b"".join(array.tobytes() for array in arrays)
                shards = done.splits[name]["shards"]
                file = f"{name}-{len(shards):05}.bin"
                write_bytes(out / file, content)
                count = sum(len(array) for array in arrays)
                shards.append({"file": file, "tokens": count, "sha256": hashlib.sha256(content).hexdigest()})
                arrays.clear()
        done.write(out)

    while done.stage < len(streams):
        stream = streams[done.stage]
        known = _documents(data, "validation") if stream == "train" and not done.hold_out else ()
        divide = divider(done.hold_out, stream, known)
        for encoded in _encode(islice(_documents(data, stream), done.documents, None), divide, tokenizer):
            done.documents += encoded.documents
            for name, (documents, utf8, array) in encoded.parts.items():
                split = done.splits[name]
                split["documents"] += documents
                split["bytes"] += utf8
                split["tokens"] += len(array)
                waiting[name].append(array)
                texts, tokens, size = texts + documents, tokens + len(array), size + utf8
            if progress:
                progress(texts, tokens, size, total)
            if sum(len(array) for arrays in waiting.values() for array in arrays) >= SHARD_TOKENS:
                close_shards()
        done.stage, done.documents = done.stage + 1, 0
        close_shards()
    if not done.splits["train"]["documents"]:
        raise GemletError(
            f"0 documents to train on in {data.source}: every one is also in {data.validation}; give other ones there"
        )


def _encode(documents: Iterator[str], divide: Divide, tokenizer: Tokenizer) -> Iterator[_Encoded]:
    """Encode documents in batches, in their order. Threads: the encoders let go of Python's lock while they work."""
    dtype = _dtype(tokenizer)

    def encode(batch: list[str]) -> _Encoded:
        texts: dict[str, list[str]] = {}
        for text in batch:
            for name, part in divide(text):
                texts.setdefault(name, []).append(part)
        return _Encoded(
            len(batch),
            {
                name: (len(parts), sum(map(_utf8_length, parts)), tokenizer.encode_documents(parts).astype(dtype))
                for name, parts in texts.items()
            },
        )

    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        running: deque[Future[_Encoded]] = deque()
        for batch in _batches(documents):
            running.append(pool.submit(encode, batch))
            if len(running) > 2 * workers:  # so that a fast reader does not fill the memory
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _documents(data: DataConfig, stream: str) -> Iterator[str]:
    """The documents of a stream: those of `data.validation`, or those of the source."""
    other = stream == "validation" and data.validation is not None
    return sources.documents(
        data.validation if other and data.validation is not None else data.source,
        text_field=data.text_field,
        split=data.split,
        split_name="validation" if stream == "validation" and not other else "train",
        max_documents=None if other else data.max_documents,
    )


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def _tokenizer(data: DataConfig, vocab_size: int, hold_out: str | None) -> Tokenizer:
    """GPT-2's, or a BPE that is trained on the documents that are not held out."""
    if data.tokenizer == "gpt2":
        return Tokenizer.load("gpt2")
    divide = divider(hold_out, "train")

    def sample() -> Iterator[str]:
        left = BPE_SAMPLE
        for text in _documents(data, "train"):
            for part in (part for name, part in divide(text) if name == "train"):
                yield part[:left]
                left -= len(part)
            if left <= 0:
                return

    return Tokenizer.train(sample(), vocab_size)


def _wanted(data: DataConfig, tokenizer: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """What is asked for, in comparable form; `before` spares reading files again that have not changed."""

    def fingerprint(source: str, key: str) -> dict[str, Any]:
        name = Path(source).name if Path(source).exists() else source
        return {"name": name, **sources.fingerprint(source, before.get(key))}

    return {
        "source": fingerprint(data.source, "source"),
        "validation": None if data.validation is None else fingerprint(data.validation, "validation"),
        "text_field": data.text_field,
        "split": data.split,
        "max_documents": data.max_documents,
        "tokenizer": {"name": "gpt2"} if data.tokenizer == "gpt2" else tokenizer,
    }


def _identity(wanted: dict[str, Any]) -> dict[str, Any]:
    """The part of what is asked for that decides the tokens: names and times of files do not."""
    return {k: v["identity"] if isinstance(v, dict) and "identity" in v else v for k, v in wanted.items()}


def _require_same(out: Path, whole: Meta, wanted: dict[str, Any]) -> None:
    """Refuse, by name, to take tokens of something else for what is asked for."""
    old, new = _identity(whole.source), _identity(wanted)
    if _same_tokenizer(whole, new["tokenizer"]):
        new["tokenizer"] = old.get("tokenizer")
    for key in new:
        if old.get(key) != new[key]:
            values = [w.get(key) for w in (whole.source, wanted)]
            was, now = (v["name"] if isinstance(v, dict) and "identity" in v else v for v in values)
            what = f"{key} {was!r}, now {now!r}" if was != now else f"{key} {was!r}, which has changed since"
            raise GemletError(f"{out} holds tokens of other data ({what}); choose another folder, or delete it")


def _same_tokenizer(whole: Meta, asked: dict[str, Any]) -> bool:
    """Whether the tokenizer that is asked for is the one of a folder that is whole, however it was named then."""
    old = whole.source.get("tokenizer", {})
    if asked == old:
        return True
    if "bpe" in asked:  # the documents may have given fewer than were asked for, which is what a run then asks for
        return "bpe" in old and asked["bpe"] == whole.vocab_size
    return whole.tokenizer_hash == (asked["hash"] if "hash" in asked else Tokenizer.load(asked["name"]).hash)


@lru_cache(maxsize=8)
def _tokenizer_hash(folder: Path, stamp: tuple[int, ...]) -> str:
    return Tokenizer.load(folder).hash
