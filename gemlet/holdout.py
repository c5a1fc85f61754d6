"""Which documents are held out to validate on, where nobody has said which: a rule that depends on their texts alone.

The rule is a word: "hundredth", about one document in a hundred, by the sha256 of its text; the sha256 of one document,
where the hundredth would hold out none or all; "tail", the last twentieth of the only document.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator

from gemlet.errors import GemletError

Divide = Callable[[str], list[tuple[str, str]]]
"""A document to the splits that get it, or a part of it: [(split, text)]."""


def choose(documents: Iterator[str]) -> str:
    """The rule by which some of the documents are held out and some are left."""
    held = kept = False
    smallest, several = b"", False
    text = ""
    for text in documents:
        digest = _digest(text)
        several = several or bool(smallest and digest != smallest)
        smallest = min(smallest or digest, digest)
        held, kept = held or _is_hundredth(digest), kept or not _is_hundredth(digest)
        if held and kept:
            return "hundredth"
    if not several and len(_head_and_tail(text)) < 2:
        raise GemletError(f"the only document is {text[:20]!r}: too short to hold out a part; give --data.validation")
    return smallest.hex() if several else "tail"


def divider(rule: str | None, stream: str, validation: Iterable[str] = ()) -> Divide:
    """The function that divides the documents of a stream, "train" or "validation", by a rule.

    Without one a document goes to the split of its stream, unless it is for training and among those of `validation`.
    """
    known = {_digest(text) for text in validation}

    def divide(text: str) -> list[tuple[str, str]]:
        if rule is None:
            return [(stream, text)] if stream == "validation" or _digest(text) not in known else []
        if rule == "tail":
            return _head_and_tail(text)
        digest = _digest(text)
        held = _is_hundredth(digest) if rule == "hundredth" else digest.hex() == rule
        return [("validation" if held else "train", text)]

    return divide


def _head_and_tail(text: str) -> list[tuple[str, str]]:
    """A text cut at the first white space after nineteen twentieths of it, or right there: [(split, part)]."""
    near = len(text) * 19 // 20
    space = re.compile(r"\s").search(text, near)
    cut = space.start() if space else near
    return [(n, part) for n, part in (("train", text[:cut].strip()), ("validation", text[cut:].strip())) if part]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _is_hundredth(digest: bytes) -> bool:
    return int.from_bytes(digest[:8], "big") % 100 == 0
