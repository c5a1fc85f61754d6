"""gemlet: build, train and run a Gemma-3-class small language model.

    lm = gemlet.load("runs/tales")
    lm.generate("Once upon a time")

Importing the package loads nothing else; each name below loads its own module when it is first asked for.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemlet.config import DataConfig as DataConfig
    from gemlet.config import ModelConfig as ModelConfig
    from gemlet.config import RunConfig as RunConfig
    from gemlet.config import TrainConfig as TrainConfig
    from gemlet.config import preset as preset
    from gemlet.errors import GemletError as GemletError
    from gemlet.evaluate import evaluate as evaluate
    from gemlet.lm import LM as LM
    from gemlet.lm import load as load
    from gemlet.prepare import prepare as prepare
    from gemlet.tokenizer import Tokenizer as Tokenizer
    from gemlet.train import train as train

    __version__: str

_HOMES = {
    "DataConfig": "config",
    "GemletError": "errors",
    "LM": "lm",
    "ModelConfig": "config",
    "RunConfig": "config",
    "Tokenizer": "tokenizer",
    "TrainConfig": "config",
    "evaluate": "evaluate",
    "load": "lm",
    "prepare": "prepare",
    "preset": "config",
    "train": "train",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("gemlet")
    if name not in _HOMES:
        raise AttributeError(f"module 'gemlet' has no attribute {name!r}")
    return getattr(import_module(f"gemlet.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, "__version__"})


class _Package(ModuleType):
    """Keeps `gemlet.train` the function: the import system sets a module's name on its package when it loads it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
