"""What gemlet finds on a machine: versions, device, compiler, disk."""

import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from urllib import request

import torch
from huggingface_hub import constants

PACKAGES = ("gemlet", "torch", "numpy", "tokenizers", "tiktoken", "safetensors", "huggingface_hub", "pyarrow")


def findings(*, hub: bool = False) -> Iterator[tuple[str, str]]:
    """What there is and what was found of it, one after the other; only with `hub` is the network tried."""
    for package in PACKAGES:
        yield package, metadata.version(package)
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    yield from _devices()
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))), None)
    yield "compiler", compiler or "none, so that torch.compile stays off on the cpu"
    yield "free disk", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB here"
    if hub:
        yield "hub", _reached()


def _devices() -> Iterator[tuple[str, str]]:
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        yield f"cuda:{i}", f"{card.name}, {card.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        yield "mps", "available"
    elif not torch.cuda.is_available():
        yield "device", "cpu only"


def _reached() -> str:
    """Whether the hub answers."""
    try:
        with request.urlopen(constants.ENDPOINT, timeout=10) as answer:
            return f"{constants.ENDPOINT} answers ({answer.status})"
    except OSError as error:
        return f"{constants.ENDPOINT} cannot be reached: {error}"
