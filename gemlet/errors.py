"""The one kind of error that is meant for the user.

A `GemletError` carries a single sentence: what happened, what was given, what is allowed, what to do next.
The command line prints that sentence and ends with `exit_code`; from Python it is an ordinary exception.
Everything else that is raised is a defect of gemlet and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class GemletError(Exception):
    """Bad input or a bad environment: nothing was lost, and the message says what to do (exit code 2)."""

    exit_code = 2


class TrainingError(GemletError):
    """A run that cannot go on, such as a loss that is no longer finite (exit code 1)."""

    exit_code = 1


class Mismatch(GemletError):
    """A comparison that was asked for and found a difference (exit code 1)."""

    exit_code = 1


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest allowed word, or an empty string when none is near."""
    near = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
