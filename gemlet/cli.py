"""The command line: flags in, an exit code and at most one line of complaint out.

tyro turns the classes of `gemlet.verbs` into flags. Exit codes: 0 success, 1 a failure at run time, 2 bad usage or
input, 128 + n for signal n.
"""

import contextlib
import dataclasses
import errno
import io
import itertools
import os
import re
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import BaseModel
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from gemlet.config import DataConfig, RunConfig, preset
from gemlet.errors import GemletError, did_you_mean
from gemlet.records import validated
from gemlet.verbs import VERBS, Plan, Quickstart, Train

# What is wrong with the machine and not with gemlet: a full disk, a folder that must not be written.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: that of the process) and return its exit code; nothing is raised."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    name = " ".join(["gemlet", *_verb(words)])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a story may hold what an old terminal cannot show
    try:
        _run(words)
        sys.stdout.flush()
        return 0
    except SystemExit as end:  # --help, or a run that a signal ended
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BrokenPipeError:  # whoever read our output has seen enough, as in `gemlet ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        code, message = _explained(error)
        print(f"{name}: {message}", file=sys.stderr)
        return code


def _explained(error: BaseException) -> tuple[int, str]:
    """The exit code of an error, and what it says to a user."""
    if isinstance(error, GemletError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, OSError) and error.errno in _DISK:
        return 2, f"{error.strerror}: {error.filename or 'while writing'}"
    said = " ".join(str(error).split())[:160]
    return 1, f"{type(error).__name__}: {said}: this is a defect of gemlet; run it with --debug to see where"


def _run(words: list[str]) -> None:
    """Run the verb that the first words name with the flags that follow."""
    verb = _verb(words)
    if verb:
        _parse(" ".join(verb), words[len(verb) :])()
    elif not words or words[0] in ("-h", "--help", "help"):
        print("usage: gemlet VERB [FLAGS] [--debug]\n\nBuild, train and run a small Gemma 3 language model.\n")
        _list_verbs(VERBS)
        print("\n`gemlet VERB --help` lists the flags of a verb; --debug shows the traceback of an error.")
    elif words[0] == "--version":
        print(f"gemlet {metadata.version('gemlet')}")
    elif group := {name: kind for name, kind in VERBS.items() if name.startswith(f"{words[0]} ")}:
        if len(words) > 1 and words[1] not in ("-h", "--help"):
            said = f"{words[0]} {words[1]}"
            raise GemletError(f"unknown verb {said!r}{did_you_mean(said, group)} (there are {', '.join(group)})")
        print(f"usage: gemlet {words[0]} FORM [FLAGS]\n")
        _list_verbs(group)
        print(f"\n`gemlet {words[0]} FORM --help` lists the flags of one.")
    else:
        raise GemletError(
            f"unknown verb {words[0]!r}{did_you_mean(words[0], VERBS)} (the verbs are {', '.join(VERBS)}; "
            "`gemlet VERB --help` lists the flags of one)"
        )


def _verb(words: list[str]) -> list[str]:
    """The words at the beginning that name a verb: one, or two as in `export hf`, or none."""
    return next((words[:n] for n in (2, 1) if " ".join(words[:n]) in VERBS), [])


def _list_verbs(verbs: dict[str, type]) -> None:
    for name, kind in verbs.items():
        print(f"  {name:<13}{(kind.__doc__ or '').splitlines()[0]}")


def _parse(verb: str, flags: list[str]) -> Any:
    """The verb with its fields filled in from the flags; a usage error becomes one line."""
    kind = VERBS[verb]
    default: dict[str, Any] = {}
    if kind in (Quickstart, Train, Plan):
        missing = {"out": tyro.MISSING} if kind is Train else {}
        run = _run_before_flags([] if kind is Quickstart else flags)
        default = {"default": kind(run=run, **missing)}
        flags = [flag for flag in flags if not _says_what_is(flag, run)]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), _pydantic_flags():
            parsed = tyro.cli(
                kind, prog=f"gemlet {verb}", args=flags, config=(tyro.conf.FlagCreatePairsOff,), **default
            )
    except SystemExit as end:
        if end.code:
            raise GemletError(f"{_one_line(errors.getvalue())} (gemlet {verb} --help lists the flags)") from None
        raise
    configs = {"run": RunConfig, "data": DataConfig}
    given = {name: value for name, value in vars(parsed).items() if isinstance(value, dict)}
    checked = {name: validated(configs[name], value, "bad flags") for name, value in given.items()}
    return dataclasses.replace(parsed, **checked)


def _run_before_flags(flags: list[str]) -> RunConfig:
    """What the flags of a run change: the preset that is named, else the run that is resumed, else the first preset."""
    given = {"--preset": "", "--out": ""}
    for flag, value in zip(flags, [*flags[1:], ""], strict=False):
        name, equals, rest = flag.partition("=")
        if name in given:
            given[name] = rest if equals else value
    saved = Path(given["--out"], "config.toml")
    if "--resume" in flags and not given["--preset"] and saved.is_file():
        return RunConfig.from_toml(saved.read_text("utf-8"), str(saved))
    return preset(given["--preset"] or "tales")


def _says_what_is(flag: str, run: RunConfig) -> bool:
    """Whether a switch asks for what the run has anyway: tyro knows only the form that changes it."""
    section, _, name = flag.removeprefix("--").replace("-", "_").partition(".")
    wanted = not name.startswith("no_")
    return getattr(getattr(run, section, None), name.removeprefix("no_"), None) is wanted


def _pydantic_flags() -> ConstructorRegistry:
    """How tyro reads a pydantic model: a flag per field, gathered in a dict; `validated` checks it in its own words."""
    registry = ConstructorRegistry()

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not (isinstance(info.type, type) and issubclass(info.type, BaseModel)):
            return None
        base = info.default if isinstance(info.default, BaseModel) else info.type()
        fields = []
        for name, field in info.type.model_fields.items():
            kind: Any = field.annotation
            if name == "source":
                kind = Annotated[kind, tyro.conf.arg(aliases=("--data",))]
            told = " ".join((field.description or "").split())
            fields.append(StructFieldSpec(name=name, type=kind, default=getattr(base, name), helptext=told))
        return StructConstructorSpec(instantiate=dict, fields=tuple(fields))

    return registry


def _one_line(box: str) -> str:
    """What tyro's box says, in one line: its title and help left out, the flag that it suggests put in."""
    rows = [row for line in box.splitlines() if (row := line.strip("│╭╮╰╯ "))]
    parts = [
        list(part) for is_rule, part in itertools.groupby(rows[1:], lambda row: set(row) <= set("─-")) if not is_rule
    ]
    said, more = parts[0] if parts else rows, " ".join(itertools.chain(*parts[1:]))
    if said[0].startswith("Missing from"):
        return "missing " + ", ".join(row.split()[0] for row in said if row.startswith("--"))
    line = " ".join(said).removeprefix("Error parsing ").rstrip(".")
    line = re.sub(r"no type matching (.+?) could be instantiated from \[(.*?)\].*", r"\2 is not \1", line)
    line = line.replace("invalid literal for int() with base 10:", "not a whole number:")
    line = line.replace("could not convert string to float:", "not a number:")
    near = re.search(r"Perhaps you meant:\s+(--\S+)", more)
    return line[:1].lower() + line[1:] + (f"; did you mean {near[1]}?" if near else "")
