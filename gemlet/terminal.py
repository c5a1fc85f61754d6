"""What is shown on a terminal and asked on it: stories as they are written, notes beside them, a line, a yes."""

import itertools
import re
import shutil
import sys
from collections.abc import Iterable, Iterator

from gemlet.errors import GemletError


def confirm(question: str, flag: str) -> None:
    """Go on only at a yes from the terminal; where nobody can answer, the flag has to say it."""
    if not sys.stdin.isatty():
        raise GemletError(f"there is no terminal to ask on; nothing was done: give {flag} to go on without asking")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise GemletError("nothing was done")


def tell_samples(prompt: str, told: list[str], pieces: Iterable[tuple[int, str]]) -> None:
    """Stream continuations of a prompt, (sample, piece): side by side where the terminal is wide enough, else in turn.

    `told`, an empty text for each, holds what was told, also when Ctrl-C ends it.
    """
    heard = _noted(pieces, told)
    if len(told) > 1 and shutil.get_terminal_size().columns // len(told) >= 24 and sys.stdout.isatty():
        _beside(prompt, told, heard)
    else:
        _in_turn(prompt, told, heard)


def _noted(pieces: Iterable[tuple[int, str]], told: list[str]) -> Iterator[tuple[int, str]]:
    """The pieces of several samples, added to what each has told as they pass."""
    for sample, piece in pieces:
        told[sample] += piece
        yield sample, piece


def _in_turn(prompt: str, told: list[str], pieces: Iterator[tuple[int, str]]) -> None:
    """Stream the first of several samples; the others, written meanwhile, follow whole."""
    tell(prompt, (piece for sample, piece in pieces if sample == 0))
    for text in told[1:]:
        print("\n---\n")
        tell(prompt, [text])


def _beside(prompt: str, told: list[str], pieces: Iterator[tuple[int, str]]) -> None:
    """Stream samples into columns of the terminal."""
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    def columns() -> Table:
        table = Table.grid(padding=(0, 3), expand=True)
        for _ in told:
            table.add_column(ratio=1)
        table.add_row(*(Text(prompt + text) for text in told))
        return table

    with Live(get_renderable=columns, refresh_per_second=12):
        for _ in pieces:
            pass


_BREAK = r"(?<=[\s\u2e80-\uffff])"
"""Where a line may end: behind white space, and behind the letters of languages that are written without it."""


def tell(prompt: str, pieces: Iterable[str]) -> str:
    """Stream a prompt and its continuation to stdout, and return the latter; a terminal's edge breaks no word."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    told, column, held = "", 0, ""  # held: the last word, as more of it may come

    def show(words: list[str]) -> None:
        nonlocal column
        for word in words:
            if column and column + len(word) >= width:
                print()
                column = 0
            print(word, end="", flush=True)
            column = 0 if word.endswith("\n") else column + len(word)

    try:
        for piece in itertools.chain([prompt], pieces):
            told += piece
            *whole, held = re.split(_BREAK, held + piece) if width < sys.maxsize else [piece, ""]
            if len(held) >= width:  # no line could hold it: it need not be held back
                whole, held = [*whole, held], ""
            show(whole)
    finally:  # Ctrl-C ends a text, too
        show([held, "\n"])
    return told.removeprefix(prompt)


def without_margin(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces without the white space before the first word: they begin a line."""
    begun = False
    for piece in pieces:
        shown = piece if begun else piece.lstrip()
        begun = begun or shown != ""
        yield shown


def read_line(prompt: str) -> str | None:
    """The next line of the input; None at its end, or at Ctrl-C."""
    try:
        return input(prompt).strip()
    except (EOFError, KeyboardInterrupt):
        if prompt:
            print()
        return None


def note(text: str) -> None:
    """Something beside the text that a model writes: on stderr, dim on a terminal."""
    print(f"\033[2m{text}\033[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def rate(tokens: int, seconds: float) -> str:
    """How many tokens were written, and how fast."""
    return f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s"
