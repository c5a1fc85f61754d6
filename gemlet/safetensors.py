"""The format of safetensors files (https://huggingface.co/docs/safetensors): tensors on disk that cannot run code.

A file is the length of its header (8 bytes, little-endian), the header (JSON: every tensor's dtype, shape and place),
then the values. The header is checked in full before anything is allocated. `Stored.map` leaves the values where they
are; `gemlet.tensors` reads them into tensors of torch, and writes files.
"""

import json
import math
import mmap
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemlet.errors import GemletError

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""The dtypes, and what torch calls them."""
MAX_HEADER = 16 * 2**20
"""Bytes; a hundred times what the largest Gemma needs."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, not read yet."""

    file: Path
    name: str
    dtype: str
    """One of the values of DTYPES."""
    shape: tuple[int, ...]
    offset: int
    """Where its values begin in the file, in bytes."""

    @property
    def nbytes(self) -> int:
        """The bytes of its values."""
        return math.prod(self.shape) * itemsize(self.dtype)


def itemsize(dtype: str) -> int:
    """Bytes of a number."""
    return numpy_dtype(dtype).itemsize


def numpy_dtype(dtype: str) -> np.dtype:
    """numpy's dtype; it has no bfloat16, whose bits are a uint16."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def map_arrays(stored: Iterable[Stored]) -> dict[str, np.ndarray]:
    """The tensors by name, as they lie in their files, read when they are used; what is written to them stays here.

    The files must stay as they are: one that is cut short ends the process. A tensor that does not begin at a multiple
    of its item size is copied.
    """
    memory: dict[Path, mmap.mmap] = {}
    arrays = {}
    for tensor in stored:
        if tensor.file not in memory:
            with open(tensor.file, "rb") as file:
                memory[tensor.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        values = np.frombuffer(memory[tensor.file], np.uint8, tensor.nbytes, tensor.offset)
        aligned = values if tensor.offset % itemsize(tensor.dtype) == 0 else values.copy()
        arrays[tensor.name] = aligned.view(numpy_dtype(tensor.dtype)).reshape(tensor.shape)
    return arrays


def read_header(path: Path) -> dict[str, Stored]:
    """What a file holds, by name. Anything that does not fit together is a GemletError; no tensor is read."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if start == b"version ":
            raise _bad(path, "is a git-lfs pointer, not the weights: run `git lfs pull` where it came from")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise _bad(path, f"has {size} bytes and a header of {length}: it is cut short or not a safetensors file")
        try:
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise _bad(path, f"has a header that is not JSON ({str(error)[:80]})") from None
    if not isinstance(header, dict):
        raise _bad(path, "has a header that is not a JSON object")
    header.pop("__metadata__", None)
    data, places = 8 + length, []
    stored = {}
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(path, name, entry)
        if end - begin != math.prod(shape) * itemsize(dtype):
            raise _bad(path, f"gives {name} {end - begin} bytes, but {list(shape)} of {dtype} are not that many")
        places.append((begin, end, name))
        stored[name] = Stored(path, name, dtype, shape, data + begin)
    expected = 0
    for begin, end, name in sorted(places):
        if begin != expected:
            raise _bad(path, f"has {'an overlap' if begin < expected else 'a gap'} before {name}")
        expected = end
    if data + expected != size:
        what = "is cut short" if data + expected > size else "has bytes after its end"
        raise _bad(path, f"{what}: {size} bytes, but {data + expected} by its header; copy or download it again")
    return stored


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, begin and end of one tensor in the header."""
    try:
        dtype, shape, (begin, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _bad(path, f"does not say what {name} is") from None
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)) or begin > end:
        raise _bad(path, f"gives {name} an impossible shape or place")
    if dtype not in DTYPES:
        raise _bad(path, f"has {name} in {dtype[:20]!r}; gemlet reads {', '.join(DTYPES)}")
    return DTYPES[dtype], shape, begin, end


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _bad(path: Path, what: str) -> GemletError:
    return GemletError(f"{path} {what}")
