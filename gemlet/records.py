"""Records from outside, a configuration or what lies beside tokens: checked as a whole, and what is wrong in words."""

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from gemlet.errors import GemletError, did_you_mean

Model = TypeVar("Model", bound=BaseModel)


def validated(kind: type[Model], values: dict[str, Any], where: str) -> Model:
    """`kind(**values)`, every problem in one `GemletError` line."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first: dict[str, Any] = {}  # of the errors inside one value the first is enough
        for problem in error.errors():
            first.setdefault(_key(kind, problem["loc"]), problem)
        sentences = [_sentence(kind, key, problem) for key, problem in first.items()]
        raise GemletError(f"{where}: {'; '.join(sentences)}") from None


def _key(kind: Any, place: tuple[int | str, ...]) -> str:
    """The dotted name of the field that an error is in, without where in its value that is."""
    path = []
    for part in place:
        path.append(str(part))
        field = kind.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            break
        kind = field.annotation
    return ".".join(path)


def shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _sentence(kind: type[BaseModel], key: str, error: Any) -> str:
    """One pydantic error in words: the key, what was given, what is allowed."""
    if error["type"] == "extra_forbidden":
        owner: Any = kind
        *sections, name = key.split(".")
        for section in sections:
            owner = owner.model_fields[section].annotation
        return f"unknown key {key!r}{did_you_mean(name, owner.model_fields)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key + ': ' if key else ''}{message}"
    return f"{key} is {shown(error['input'])}: {message[0].lower()}{message[1:]}"
