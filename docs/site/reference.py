"""The reference, generated from the code: the verbs and their flags, the configuration, the Python API.

A page says `<!-- generated: NAME -->` where something of it belongs: `commands`, `presets`, the name of a configuration
class such as `TrainConfig`, or the dotted name of an object such as `gemlet.lm.load`. The text is that of the docstrings,
which are Markdown; the signatures are read from the source, without importing it.
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
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gemlet import config
from gemlet.cli import VERBS

PACKAGE = Path(__file__).parents[2]


def generated(name: str) -> str:
    """The Markdown of a part of the reference."""
    if name == "commands":
        return "\n\n".join(command(verb, kind) for verb, kind in VERBS.items())
    if name == "presets":
        return presets()
    if not name.startswith("gemlet."):
        kind = getattr(config, name)
        return options(fields(kind, prefix=f"--{name.removesuffix('Config').lower()}."))
    return described(name)


@cache
def source() -> griffe.Object:
    """The package as its source says."""
    package = griffe.load("gemlet", search_paths=[PACKAGE])
    assert isinstance(package, griffe.Object)
    return package


# --- verbs and configuration ---


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag as a reader needs it."""

    name: str
    value: str
    help: str
    default: Any
    """dataclasses.MISSING: it must be given."""
    limits: str = ""
    negation: str = ""


def command(verb: str, kind: type) -> str:
    """A verb: what it does, how it is called, its flags."""
    flags, configured = [], []
    for field in dataclasses.fields(kind):
        hint = get_type_hints(kind, include_extras=True)[field.name]
        hint, *_ = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if hint is config.RunConfig:
            configured = list(config.RunConfig.model_fields)
        elif isinstance(hint, type) and issubclass(hint, BaseModel):
            flags += fields(hint, prefix="--")
        else:
            given = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            flags.append(Flag(dashed(f"--{field.name}"), value(hint), docstring(kind, field.name), given, "", negated("--", field.name, hint)))
    required = " ".join(f"{flag.name} {flag.value}" for flag in flags if flag.default is dataclasses.MISSING)
    parts = [
        f"## {verb}",
        inspect.cleandoc(kind.__doc__ or ""),
        f"```text\n{' '.join(f'gemlet {verb} {required} [FLAGS]'.split())}\n```",
        f"```{{program}} gemlet {verb}\n```",
        options(flags),
    ]
    if configured:
        groups = ", ".join(f"`--{name}.*`" for name in configured)
        parts.append(f"And every field of the [configuration](configuration.md): {groups}; `--data` is short for `--data.source`.")
    return "\n\n".join(parts)


def fields(kind: type[BaseModel], prefix: str) -> list[Flag]:
    """The fields of a configuration class as flags."""
    return [
        Flag(
            dashed(prefix + name) + (", --data" if name == "source" else ""),
            value(field.annotation),
            field.description or "",
            field.default,
            limits(field),
            negated(prefix, name, field.annotation),
        )
        for name, field in kind.model_fields.items()
    ]


def options(flags: Iterable[Flag]) -> str:
    """Flags as entries that can be linked to."""
    entries = []
    for flag in flags:
        heads = [f"{name} {flag.value}".strip() for name in flag.name.split(", ")] + [flag.negation] * bool(flag.negation)
        facts = [flag.limits] if flag.limits else []
        if flag.default is dataclasses.MISSING:
            facts.append("required")
        elif flag.default not in (None, ()):
            facts.append(f"default `{shown(flag.default)}`")
        entries.append(f"````{{option}} {', '.join(heads)}\n{flag.help}\n\n{'; '.join(facts)}\n````")
    return "\n\n".join(entries)


def presets() -> str:
    """The presets as a table: name, size, the first comment of the file."""
    rows = ["| preset | parameters | |", "|---|---:|---|"]
    for name in config.presets():
        file = PACKAGE / "gemlet" / "presets" / f"{name}.toml"
        comment = " ".join(line[1:].strip() for line in file.read_text("utf-8").split("[model]")[0].splitlines())
        rows.append(f"| `{name}` | {config.preset(name).model.num_parameters:,} | {comment} |")
    return "\n".join(rows)


def dashed(name: str) -> str:
    """A flag as it is typed."""
    return name.replace("_", "-")


def negated(prefix: str, name: str, hint: Any) -> str:
    """The other form of a switch: --model.no-tie-word-embeddings."""
    return dashed(f"{prefix}no-{name}") if hint is bool else ""


def value(hint: Any) -> str:
    """What is to be given to a flag: INT, PATH, one of some words."""
    if get_origin(hint) is Annotated:
        return value(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [value(kind) for kind in get_args(hint) if kind is not types.NoneType]
        return max(kinds, key=len)  # INT or INT [INT ...]: the second says both
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        one = value(get_args(hint)[0])
        return f"{one} [{one} ...]"
    return "" if hint is bool else {str: "TEXT"}.get(hint, hint.__name__.upper())


def limits(field: FieldInfo) -> str:
    """The range of a number, in words."""
    said = []
    for bound in field.metadata:
        if isinstance(bound, annotated_types.Ge):
            said.append(f"at least {bound.ge}")
        elif isinstance(bound, annotated_types.Gt):
            said.append(f"above {bound.gt}")
        elif isinstance(bound, annotated_types.Le):
            said.append(f"at most {bound.le:,}")
        elif isinstance(bound, annotated_types.Lt):
            said.append(f"below {bound.lt:,}")
    return ", ".join(said)


def shown(default: Any) -> str:
    """A default as it is typed after its flag."""
    if isinstance(default, tuple):
        return " ".join(f'"{item}"' if " " in str(item) else str(item) for item in default)
    return {True: "on", False: "off"}[default] if isinstance(default, bool) else f"{default}" if default != "" else '""'


def docstring(kind: type, name: str) -> str:
    """What stands under a field of a class, or of the class that it has the field from."""
    for owner in kind.__mro__:
        if name in getattr(owner, "__annotations__", {}):
            written = source()[f"{owner.__module__}.{owner.__qualname__}.{name}".removeprefix("gemlet.")].docstring
            return written.value if written else ""
    raise LookupError(f"{kind.__name__} has no field {name}")


# --- Python ---


def described(name: str) -> str:
    """An object and what is public in it, as entries of the Python reference."""
    found = source()[name.removeprefix("gemlet.")]
    assert isinstance(found, griffe.Object)
    if found.docstring is None:
        raise LookupError(f"{name} is in the reference but has no docstring")
    return entry(found, name, fence=5)


def entry(found: griffe.Object, name: str, fence: int) -> str:
    """One object with its docstring; a class with its members inside."""
    text = found.docstring.value if found.docstring else ""
    head = name
    if isinstance(found, griffe.Function):
        kind, head = ("method", "") if isinstance(found.parent, griffe.Class) else ("function", name)
        head = (name if not head else head).rpartition(".")[0]
        head = f"{head}.{found.signature()}" if kind == "function" else found.signature()
    elif isinstance(found, griffe.Class):
        kind = "class"
        init = found.members.get("__init__")
        if isinstance(init, griffe.Function) and "dataclass" not in found.labels:
            head = f"{name}({init.signature().partition('(')[2].rpartition(')')[0]})"
        members = [
            entry(member, member_name, fence - 1)
            for member_name, member in found.members.items()
            if isinstance(member, griffe.Object) and not member_name.startswith("_") and member.docstring
        ]
        text = "\n\n".join([text, *members])
    else:
        assert isinstance(found, griffe.Attribute)
        kind = "property" if "property" in found.labels else "attribute" if isinstance(found.parent, griffe.Class) else "data"
        facts = [f":type: {found.annotation}"] if found.annotation else []
        if found.value is not None and kind == "attribute":
            facts.append(f":value: {found.value}")
        text = "\n".join([*facts, "", text])
    ticks = "`" * fence
    return f"{ticks}{{py:{kind}}} {head}\n{text}\n{ticks}"
