"""Safetensors files (https://huggingface.co/docs/safetensors): tensors on disk that cannot run code.

A file is the length of its header (8 bytes, little-endian), the header (JSON: every tensor's dtype, shape and place),
then the values. The header is checked in full before anything is allocated. Values are read and written in pieces:
memory stays that of the tensors, a disk that is full is an ordinary error, and a file that is cut short meanwhile does
not kill the process. Only a model that is to write is mapped (`map_tensors`): it is there at once, and once in memory
for all processes.
"""

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemlet.errors import GemletError, TrainingError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MAX_HEADER = 16 * 2**20
"""Bytes; a hundred times what the largest Gemma needs."""
PIECE = 2**22
"""Elements read or written at a time."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, not read yet."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Where its values begin in the file, in bytes."""

    def pieces(self) -> Iterator[Tensor]:
        """The values in order, as one-dimensional tensors of at most PIECE elements."""
        left = math.prod(self.shape)
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            while left:
                piece = torch.empty(min(left, PIECE), dtype=self.dtype)
                data = piece.view(torch.uint8).numpy().data
                if file.readinto(data) < len(data):
                    raise GemletError(f"{self.file} has become shorter while it was read; copy it again")
                left -= len(piece)
                yield piece

    def read_into(self, target: Tensor) -> None:
        """Copy the values into a contiguous tensor of the same shape and any dtype and device."""
        flat, at = target.detach().view(-1), 0
        for piece in self.pieces():
            flat[at : at + len(piece)].copy_(piece)
            at += len(piece)

    def equals(self, other: Tensor) -> bool:
        """Whether `other`, of the same shape and contiguous, has these values (in its own dtype)."""
        flat, at = other.detach().view(-1), 0
        for piece in self.pieces():
            if not torch.equal(flat[at : at + len(piece)], piece.to(flat)):
                return False
            at += len(piece)
        return True


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
        if end - begin != math.prod(shape) * dtype.itemsize:
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


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU."""
    tensors = {}
    for name, stored in read_header(path).items():
        tensors[name] = torch.empty(stored.shape, dtype=stored.dtype)
        stored.read_into(tensors[name])
    return tensors


def map_tensors(stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """The tensors as they lie in their files, read when they are used; what is written to them stays in memory.

    A tensor that does not begin at a multiple of its item size is read. The files must stay as they are: a file that
    is cut short ends the process.
    """
    sizes = {tensor.file: tensor.file.stat().st_size for tensor in stored.values()}
    memory = {file: torch.from_file(str(file), False, size, dtype=torch.uint8) for file, size in sizes.items()}
    tensors = {}
    for name, tensor in stored.items():
        if tensor.offset % tensor.dtype.itemsize:
            tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            tensor.read_into(tensors[name])
            continue
        end = tensor.offset + math.prod(tensor.shape) * tensor.dtype.itemsize
        tensors[name] = memory[tensor.file][tensor.offset : end].view(tensor.dtype).view(tensor.shape)
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write tensors, in `dtype` if one is given; a value that is not finite is a TrainingError with the tensor's name.

    `path` is written in place, which is for a folder that is not yet in its own place (see `files.whole_folder`).
    """
    dtypes = {name: dtype or tensor.dtype for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))  # so that every tensor is aligned
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        end = at + tensors[name].numel() * dtypes[name].itemsize
        header[name] = {"dtype": names[dtypes[name]], "shape": list(tensors[name].shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            for part in tensors[name].detach().reshape(-1).split(PIECE):
                piece = part.to("cpu", dtypes[name])
                if not is_finite(piece):
                    raise TrainingError(f"{name} has values that are not finite; nothing was saved to {path.parent}")
                file.write(piece.contiguous().view(torch.uint8).numpy().data)


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is; in two numbers' memory, not in a mask's."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = tensor.detach().aminmax()
    return math.isfinite(low) and math.isfinite(high)


def _entry(path: Path, name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
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
