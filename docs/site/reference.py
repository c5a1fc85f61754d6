"""The reference, made from the code: the verbs and their flags, the configuration, the Python API.

A page says `<!-- generated: NAME -->` where something of it belongs: `commands`, `presets`, the name of a configuration
class such as `TrainConfig`, or the name of an object such as `gemlet.load`. The text is that of the docstrings, which
are Markdown; signatures and the docstrings of fields are read from the source (griffe), the rest from the classes.
"""

import dataclasses
import inspect
import types
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import annotated_types
import griffe
import tyro
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gemlet import config
from gemlet.verbs import VERBS

ROOT = Path(__file__).parents[2]
REQUIRED = dataclasses.MISSING


def generated(name: str) -> str:
    """The Markdown of a part of the reference."""
    if name == "commands":
        return "\n\n".join(command(verb) for verb in VERBS)
    if name == "presets":
        return presets()
    if name.startswith("gemlet."):
        return described(name)
    return options(configured(getattr(config, name), f"--{name.removesuffix('Config').lower()}."))


# ---------------------------------------------------------------------------------------------------------------------
# Verbs and configuration


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag as a reader needs it."""

    names: tuple[str, ...]
    """As they are typed, `--out`; a positional argument has its name in capitals."""
    value: str
    """What follows it, such as INT; nothing after a switch."""
    help: str
    default: Any
    """REQUIRED, if it must be given."""
    limits: str = ""
    """The range of a number, in words."""


def flags(verb: str) -> list[Flag]:
    """All flags of a verb but those of a whole run (`--model.*`, `--data.*`, `--train.*`)."""
    kind, found = VERBS[verb], []
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint, *marks = (
            get_args(hints[field.name]) if get_origin(hints[field.name]) is Annotated else [hints[field.name]]
        )
        if hint is config.RunConfig:
            continue
        if isinstance(hint, type) and issubclass(hint, BaseModel):
            found += configured(hint, "--")
            continue
        default = field.default if field.default_factory is REQUIRED else field.default_factory()
        text = told(kind, field.name)
        if POSITIONAL in marks:
            found.insert(0, Flag((_metavar(marks) or field.name.upper(),), "", text, default))
        else:
            found.append(Flag(_names("--", field.name, hint, default), value(hint, *marks), text, default))
    return found


POSITIONAL = get_args(tyro.conf.Positional[str])[1]


def configured(kind: type[BaseModel], prefix: str) -> list[Flag]:
    """The fields of a configuration class as flags."""
    return [
        Flag(
            _names(prefix, name, field.annotation, field.default) + (("--data",) if name == "source" else ()),
            value(field.annotation),
            field.description or "",
            field.default,
            limits(field),
        )
        for name, field in kind.model_fields.items()
    ]


def command(verb: str) -> str:
    """A verb: what it does, how it is called, its flags."""
    kind, found = VERBS[verb], flags(verb)
    call = ["gemlet", verb, *(" ".join([*f.names, f.value]).strip() for f in found if f.default is REQUIRED), "[FLAGS]"]
    parts = [
        f"## {verb}",
        inspect.cleandoc(kind.__doc__ or ""),
        f"```text\n{' '.join(call)}\n```",
        f"```{{program}} gemlet {verb}\n```",
        options(found),
    ]
    if config.RunConfig in get_type_hints(kind).values():
        parts.append(
            "And every field of the [configuration](configuration.md): `--model.*`, `--data.*` and `--train.*`; "
            "`--data` is short for `--data.source`."
        )
    return "\n\n".join(parts)


def options(found: list[Flag]) -> str:
    """Flags as entries that can be linked to."""
    entries = []
    for flag in found:
        heads = ", ".join(f"{name} {flag.value}".strip() for name in flag.names)
        facts = [flag.limits.capitalize()] if flag.limits else []
        if flag.default is REQUIRED:
            facts.append("Required")
        elif flag.value and flag.default not in (None, ()):
            facts.append(f"Default: `{shown(flag.default)}`")
        entries.append(f"````{{option}} {heads}\n{flag.help} {' '.join(f'*{fact}.*' for fact in facts)}\n````")
    return "\n\n".join(entries)


def presets() -> str:
    """The presets as a table: name, size, the comment at the top of the file."""
    rows = ["| preset | parameters | |", "|---|---:|---|"]
    for name in config.presets():
        text = (ROOT / "gemlet" / "presets" / f"{name}.toml").read_text(encoding="utf-8")
        comment = " ".join(line.strip("# ") for line in text.partition("[model]")[0].splitlines())
        rows.append(f"| `{name}` | {config.preset(name).model.num_parameters:,} | {comment} |")
    return "\n".join(rows)


def value(hint: Any, *marks: Any) -> str:
    """What is to be typed after a flag: INT, PATH, one of some words."""
    if said := _metavar(marks):
        return said.strip("{}").replace(",", "|")
    if get_origin(hint) is Annotated:
        return value(*get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return max((value(kind) for kind in get_args(hint) if kind is not types.NoneType), key=len)
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"{value(get_args(hint)[0])} ..."
    return "" if hint is bool else "TEXT" if hint is str else hint.__name__.upper()


def limits(field: FieldInfo) -> str:
    """The range of a number, in words."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds = [mark for mark in field.metadata if isinstance(mark, annotated_types.BaseMetadata)]
    return ", ".join(
        f"{word} {getattr(bound, key):,}" for bound in bounds for key, word in words.items() if hasattr(bound, key)
    )


def shown(default: Any) -> str:
    """A default as it is typed."""
    if isinstance(default, tuple):
        return " ".join(map(shown, default))
    return f'"{default}"' if default == "" or " " in str(default) else str(default)


def told(kind: type, name: str) -> str:
    """The docstring under a field of a class, or of the class that it inherits the field from."""
    owner = next(owner for owner in kind.__mro__ if name in vars(owner).get("__annotations__", {}))
    docstring = source()[f"{owner.__module__.removeprefix('gemlet.')}.{owner.__name__}.{name}"].docstring
    assert docstring, f"{owner.__name__}.{name} has no docstring"
    return docstring.value


def _metavar(marks: Iterable[Any]) -> str | None:
    """What `tyro.conf.arg(metavar=...)` says."""
    return next((mark.metavar for mark in marks if getattr(mark, "metavar", None)), None)


def _names(prefix: str, name: str, hint: Any, default: Any) -> tuple[str, ...]:
    """A flag as it is typed; a switch that is on by default is there to turn it off."""
    return (prefix + ("no-" if hint is bool and default else "") + name.replace("_", "-"),)


# ---------------------------------------------------------------------------------------------------------------------
# Python


@cache
def source() -> griffe.Module:
    """The package as its source says."""
    package = griffe.load("gemlet", search_paths=[ROOT])
    assert isinstance(package, griffe.Module)
    return package


def described(name: str) -> str:
    """An object by the name that a user gives it; a class with what is public in it."""
    found = source()[name.removeprefix("gemlet.")]
    if isinstance(found, griffe.Module):  # gemlet.train is the function
        found = found[found.name]
    found = found.final_target if isinstance(found, griffe.Alias) else found
    assert found.docstring, f"{name} is in the reference but has no docstring"
    return entry(found, name.rpartition(".")[0] + ".", fence=5)


def entry(found: griffe.Object, prefix: str, fence: int) -> str:
    """One object, as a directive of Sphinx's for its kind."""
    head, facts, members = prefix + found.name, [], []
    inside = isinstance(found.parent, griffe.Class)
    if isinstance(found, griffe.Function):
        kind, head = "method" if inside else "function", prefix + found.signature()
        facts += [":classmethod:"] if "classmethod" in found.labels else []
    elif isinstance(found, griffe.Class):
        kind = "class"
        init = found.members.get("__init__")
        if isinstance(init, griffe.Function) and not {"dataclass"} & found.labels:
            head += init.signature().removeprefix("__init__").partition(" -> ")[0]
        public = [member for member in found.members.values() if not member.name.startswith("_") and member.docstring]
        members = [entry(member, "", fence - 1) for member in public if isinstance(member, griffe.Object)]
    else:
        assert isinstance(found, griffe.Attribute)
        kind = "property" if "property" in found.labels else "attribute" if inside else "data"
        facts += [f":type: {found.annotation}"] if found.annotation else []
        facts += [f":value: {found.value}"] if found.value is not None else []
    text = found.docstring.value if found.docstring else ""
    ticks = "`" * fence
    return "\n".join([f"{ticks}{{py:{kind}}} {head}", *facts, "", text, "", *members, ticks])
