"""Where documents come from: the embedded tales, files and folders, data sets of the hub.

Everything streams: of a file of any size, packed or not, a megabyte and the current document are in memory. A document
is stripped of white space around it, and dropped if nothing is left. What cannot be read is refused with the file and
the place in it.

The rules of a .txt: UTF-8, a byte order mark is dropped, CRLF becomes LF; `DataConfig.split` says what separates
documents. In .jsonl and .parquet a document is a string of the field `text_field`, as it is: a literal
`<|endoftext|>` in it is text.
"""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from gemlet import tales
from gemlet.errors import GemletError, did_you_mean
from gemlet.hub import Repository, repository

Split = Literal["train", "validation"]

END_LINE = "<|endoftext|>"
TALES = 60_000  # documents of `tales` unless max_documents says otherwise; validation has a hundredth of it

_NAMES = {"tinystories": "hub:roneneldan/TinyStories"}
_SUFFIXES = (".txt", ".jsonl", ".parquet")
_PACKED = (".gz", ".zst")
_CHUNK = 2**20  # bytes
_LONGEST = 2**28  # characters of one document or line
_SPLIT_WORDS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}


def documents(
    source: str,
    *,
    text_field: str = "text",
    split: str = "auto",
    split_name: Split = "train",
    max_documents: int | None = None,
) -> Iterator[str]:
    """The documents of a source, as `DataConfig` names it, in a fixed order; at least one, or a `GemletError`.

    `split_name` chooses between the training and the validation documents of a source that `has_validation`.
    """
    if source == "tales":
        limit = TALES if max_documents is None else max_documents
        found = tales.stories(seed=0) if split_name == "train" else tales.stories(seed=1)
        yield from islice(found, limit if split_name == "train" else max(1, limit // 100))
        return
    if hub_name(source) is not None:
        repo, files = _hub_files(source, split_name)
        opened = (_read(repo.fetch(file), text_field, split) for file in files)
    elif split_name == "train":
        opened = (_read(path, text_field, split) for path in files_of(source))
    else:
        raise GemletError(f"{source} has no validation documents of its own; name some with --data.validation")
    stripped = (text.strip() for text in chain.from_iterable(opened))
    empty = True
    for text in islice((text for text in stripped if text), max_documents):
        empty = False
        yield text
    if empty:
        raise GemletError(f"0 documents in {source}: it is empty or all blank; give a file or folder that holds text")


def has_validation(source: str) -> bool:
    """Whether the source itself says which documents are for validation: tales do, and data sets of the hub may."""
    return source == "tales" or (hub_name(source) is not None and bool(_by_split(_hub_data(source)[1])["validation"]))


def files_of(source: str) -> list[Path]:
    """The files of a local source, in the order in which they are read: by path, folders through and through."""
    path = Path(source)
    if path.is_file():
        if _kind(path) is None:
            raise GemletError(f"{path} is no {_allowed()} file; rename it if it is one of them inside")
        return [path]
    if not path.is_dir():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise GemletError(
            f"no data at {source}{did_you_mean(source, ['tales', *_NAMES]) or did_you_mean(path.name, near)} "
            f"(data is tales, tinystories, hub:OWNER/NAME, or the path of a {_allowed()} file or a folder of them)"
        )
    found = [
        Path(parent, name)
        for parent, _, names in os.walk(path)
        for name in names
        if not any(part.startswith(".") for part in Path(parent, name).relative_to(path).parts)
    ]
    files = sorted((f for f in found if _kind(f)), key=lambda f: f.relative_to(path).as_posix())
    if not files:
        raise GemletError(f"no {_allowed()} file in the folder {path} ({len(found)} others)")
    return files


def text_bytes(source: str) -> int | None:
    """About how many bytes of text the source holds, where that can be told without reading it."""
    if source == "tales" or hub_name(source) is not None:
        return None
    files = files_of(source)
    return sum(f.stat().st_size for f in files) if all(f.suffix in (".txt", ".jsonl") for f in files) else None


def fingerprint(source: str, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the source is, wherever it lies: for files their kinds, sizes and sha256 under `identity`.

    `known` is an earlier fingerprint: files whose name, size and time it has are not read again. A data set of the hub
    is its name: what was prepared from it stays valid without asking the hub.
    """
    if source == "tales":
        first = "\n".join(islice(tales.stories(), 64))
        return {"identity": {"tales": hashlib.sha256(first.encode()).hexdigest()}}
    if (name := hub_name(source)) is not None:
        return {"identity": {"hub": name}}
    seen = {tuple(entry["stat"]): entry["sha256"] for entry in (known or {}).get("files", [])}
    root, entries = Path(source), []
    for path in files_of(source):
        info = path.stat()
        stat = (path.relative_to(root).as_posix() if root.is_dir() else path.name, info.st_size, info.st_mtime_ns)
        entries.append({"stat": list(stat), "sha256": seen.get(stat) or _sha256(path), "kind": _kind(path)})
    return {
        "identity": {"files": [[e["kind"], e["stat"][1], e["sha256"]] for e in entries]},
        "files": [{"stat": e["stat"], "sha256": e["sha256"]} for e in entries],
    }


def _allowed() -> str:
    return ".txt, .jsonl (also .gz, .zst) or .parquet"


def _kind(path: Path) -> str | None:
    """.txt, .jsonl or .parquet; None for anything else."""
    inner = path.with_suffix("") if path.suffix in _PACKED else path
    return inner.suffix if inner.suffix in _SUFFIXES and (inner == path or inner.suffix != ".parquet") else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- files ---


def _read(path: Path, text_field: str, split: str) -> Iterator[str]:
    """The documents of one file, as they stand in it."""
    kind = _kind(path)
    if kind == ".parquet":
        return _read_parquet(path, text_field)
    if kind == ".jsonl":
        return _read_jsonl(path, text_field)
    return _split(_lines(path), _rule(path) if split == "auto" else split, path)


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, buffer_size=_CHUNK) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise GemletError(_no_field(str(path), "column", text_field, names))
            kind = file.schema_arrow.field(text_field).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise GemletError(f"{path}: column {text_field!r} holds {kind}, not strings; give --data.text-field")
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text is None:
                        raise GemletError(f"{path}, row {row}: {text_field!r} is null; remove the row or fill it")
                    yield text
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise GemletError(f"{path} is not a whole .parquet file: {' '.join(str(error).split())[:120]}") from error


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise GemletError(
                f"{where}: not valid JSON ({str(error)[:80]}); every line of a .jsonl is an object with {text_field!r}"
            ) from error
        if not isinstance(value, dict):
            raise GemletError(f"{where}: a {type(value).__name__}, but must be an object with the key {text_field!r}")
        if text_field not in value:
            raise GemletError(_no_field(where, "key", text_field, list(value)))
        text = value[text_field]
        if not isinstance(text, str):
            found = "null" if text is None else f"a {type(text).__name__}"
            raise GemletError(f"{where}: {text_field!r} is {found}, but must be a string; mend or remove the line")
        yield text


def _no_field(where: str, word: str, text_field: str, names: list[str]) -> str:
    return f"{where}: no {word} {text_field!r}, only {_few(names)}; give --data.text-field"


def _rule(path: Path) -> str:
    """What separates the documents of a .txt, by looking: see `DataConfig.split`."""
    rule, blank = "file", False
    for line in _lines(path):
        if _is_end(line):
            return "endoftext"
        if blank and not line.strip():
            rule = "two-blank-lines"
        blank = not line.strip()
    return rule


def _is_end(line: str) -> bool:
    return END_LINE in line and line.strip() == END_LINE


def _split(lines: Iterable[str], rule: str, path: Path) -> Iterator[str]:
    """Lines to documents. `blank-lines` separates at every blank line, `two-blank-lines` at two or more in a row."""
    if rule == "line":
        yield from lines
        return
    needed = {"blank-lines": 1, "two-blank-lines": 2}.get(rule)
    document: list[str] = []
    size = blanks = 0
    for line in lines:
        blanks = 0 if needed is None or line.strip() else blanks + 1
        if _is_end(line) if rule == "endoftext" else blanks and blanks == needed:
            yield "\n".join(document)
            document, size, blanks = [], 0, 0
            continue
        document.append(line)
        size += len(line) + 1
        _check_length(size, path)
    yield "\n".join(document)


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, without their ends: LF or CRLF."""
    started: list[str] = []  # the line that the chunks so far have begun
    size = 0
    for chunk in _chunks(path):
        first, *rest = chunk.split("\n")
        started.append(first)
        size += len(first)
        _check_length(size, path)
        if rest:
            yield "".join(started).removesuffix("\r")
            for line in rest[:-1]:
                yield line.removesuffix("\r")
            started, size = [rest[-1]], len(rest[-1])
    yield "".join(started).removesuffix("\r")


def _check_length(size: int, path: Path) -> None:
    if size > _LONGEST:
        raise GemletError(
            f"{path} has a document of more than {_LONGEST:,} characters; split it: put a line {END_LINE} between "
            "documents, or give --data.split"
        )


def _chunks(path: Path) -> Iterator[str]:
    """The text of a file, unpacked, about a megabyte at a time; refused where it is not UTF-8."""
    import pyarrow as pa

    unpacked = "the unpacked " if path.suffix in _PACKED else "the "
    decoder = codecs.getincrementaldecoder("utf-8")()
    decoded = 0  # bytes
    try:
        with pa.input_stream(str(path), compression={".gz": "gzip", ".zst": "zstd"}.get(path.suffix)) as file:
            while data := file.read(_CHUNK):
                if decoded == 0:
                    _refuse_other_encodings(path, data)
                waiting = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(data)
                except UnicodeDecodeError as error:
                    raise _not_utf8(path, f"byte {decoded + error.start:,} of {unpacked}file", error.reason) from error
                yield text.removeprefix("\ufeff") if decoded == 0 else text
                decoded += waiting + len(data) - len(decoder.getstate()[0])
            if decoder.getstate()[0]:
                raise _not_utf8(path, f"byte {decoded:,} of {unpacked}file", "it ends inside a character")
    except OSError as error:  # pyarrow's errors are of this kind
        raise GemletError(f"{path} cannot be read: {' '.join(str(error).split())[:160]}") from error


def _not_utf8(path: Path, where: str, reason: str) -> GemletError:
    return GemletError(
        f"{path} is not UTF-8 text: {where}: {reason}; convert it first (iconv -f latin1 -t utf-8, if it is Latin-1)"
    )


def _refuse_other_encodings(path: Path, start: bytes) -> None:
    """UTF-16 and much that is binary can pass for UTF-8; a few NULs among text are allowed."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise GemletError(f"{path} is UTF-16 (byte 0: byte order mark); convert it: iconv -f utf-16 -t utf-8")
    if start.count(0) >= 16 and start.count(0) * 4 >= len(start):
        raise GemletError(
            f"{path} is binary or UTF-16, not UTF-8 text: {start.count(0):,} of its first {len(start):,} bytes are "
            f"zero, the first at byte {start.index(0):,}; convert it first"
        )


# --- the hub ---


def hub_name(source: str) -> str | None:
    """OWNER/NAME or OWNER/NAME/FOLDER, if the source is a data set of the hub."""
    source = _NAMES.get(source, source)
    return source.removeprefix("hub:") if source.startswith("hub:") else None


def _hub_data(source: str) -> tuple[Repository, list[str]]:
    """The data files of a set: its .parquet files, or if it has none its .jsonl, or .txt files."""
    name = hub_name(source) or ""
    owner_name, folder = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    repo = repository(owner_name, "dataset")
    inside = [file for file in repo.files if file.startswith(f"{folder}/" if folder else "")]
    for kind in (".parquet", ".jsonl", ".txt"):
        files = [file for file in inside if _kind(Path(file)) == kind and not Path(file).name.startswith(".")]
        if files:
            return repo, files
    raise GemletError(
        f"the hub's dataset {name} holds no {_allowed()} file ({len(inside)} others); download and convert it, then "
        "give the folder"
    )


def _hub_files(source: str, split_name: Split) -> tuple[Repository, list[str]]:
    """The files of one split, in order; refused where several configurations would be mixed."""
    repo, data = _hub_data(source)
    files = _by_split(data)[split_name]
    if not files:
        raise GemletError(f"the hub's dataset {hub_name(source)} has no {split_name} files; it has {_few(data)}")
    folders = sorted({Path(file).parent.as_posix() for file in files})
    if len(folders) > 1:
        raise GemletError(
            f"the hub's dataset {hub_name(source)} has {split_name} files in several folders: {_few(folders)}; choose "
            f"one: hub:{repo.name}/FOLDER"
        )
    return repo, files


def _by_split(files: list[str]) -> dict[str, list[str]]:
    """Files by the last word of their path that names a split; if none names train, those without a word are."""
    found: dict[str, list[str]] = {"train": [], "validation": []}
    unnamed = []
    for file in files:
        words = re.findall(r"[a-z]+", file.lower())[::-1]
        named = next((word for word in words if word in (*_SPLIT_WORDS, "test", "dev")), None)
        if named is None:
            unnamed.append(file)
        elif named in _SPLIT_WORDS:
            found[_SPLIT_WORDS[named]].append(file)
    return found if found["train"] else {**found, "train": unnamed}


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
