"""A conversation on a terminal or through a pipe: lines in, replies out; a slash begins what is not for the model."""

import contextlib
import io
import sys
import time

from gemlet.chat import Chat
from gemlet.errors import GemletError, did_you_mean
from gemlet.terminal import note, rate, read_line, tell, without_margin

COMMANDS = {
    "/new": "begin anew",
    "/undo": "take back the last exchange",
    "/help": "list these",
    "/quit": "leave, as Ctrl-D does",
}
"""What can be said that is not for the model."""


def talk(chat: Chat) -> None:
    """Go round until there is no more input. Replies go to stdout, all else to stderr."""
    prompt = ""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (a line can then be edited, and earlier ones come back with the arrows)
        prompt = "> " if sys.stdout.isatty() else ""
        note(
            "The model answers in turns: a line is yours, then comes its answer."
            if chat.turns
            else "The model goes on with your text: a line is added to it, an empty one lets the model write."
        )
        note("Ctrl-C stops it; /undo takes back the last exchange, /new begins anew, Ctrl-D leaves.")
    while (line := read_line(prompt)) is not None and line != "/quit":
        if line.startswith("/"):
            _obey(line, chat)
        else:
            _hear(line, chat)


def _obey(line: str, chat: Chat) -> None:
    """Do what a line with a slash says."""
    if line == "/new":
        chat.new()
        note("begun anew")
    elif line == "/undo":
        note("taken back" if chat.undo() else "there is nothing to take back")
    elif line == "/help":
        note("\n".join(f"{name:<7}{told}" for name, told in COMMANDS.items()))
    else:
        word = line.split()[0]
        note(f"unknown command {word!r}{did_you_mean(word, COMMANDS)} (there are {', '.join(COMMANDS)})")


def _hear(line: str, chat: Chat) -> None:
    """Stream the reply to a line."""
    try:
        reply = chat.say(line)
    except GemletError as error:  # no room for it, say: nothing has changed
        return note(str(error))
    before, start = len(chat.ids), time.perf_counter()
    with contextlib.suppress(KeyboardInterrupt):
        tell("", without_margin(reply))
    chat.stop()
    said = rate(len(chat.ids) - before, time.perf_counter() - start)
    if chat.full:
        note(f"{said}; the context of {len(chat.ids)} tokens is full: /new begins anew, /undo takes a step back")
    elif not chat.ended:
        note(f"{said}; an empty line goes on")
    else:
        note(said if chat.turns else f"{said}; the end: your next line begins another text")
