"""Safetensors files to tensors and back, in pieces.

Memory stays that of the tensors, a disk that is full is an ordinary error, and a file that is cut short meanwhile does
not kill the process. The format is `gemlet.safetensors`.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemlet.errors import GemletError, TrainingError
from gemlet.safetensors import DTYPES, Stored, read_header

PIECE = 2**22
"""Elements read or written at a time."""


def dtype_of(stored: Stored) -> torch.dtype:
    """Its dtype as torch's."""
    return getattr(torch, stored.dtype)


def pieces(stored: Stored) -> Iterator[Tensor]:
    """The values in order, as one-dimensional tensors of at most PIECE elements."""
    left = math.prod(stored.shape)
    with open(stored.file, "rb") as file:
        file.seek(stored.offset)
        while left:
            piece = torch.empty(min(left, PIECE), dtype=dtype_of(stored))
            data = piece.view(torch.uint8).numpy().data
            if file.readinto(data) < len(data):
                raise GemletError(f"{stored.file} has become shorter while it was read; copy it again")
            left -= len(piece)
            yield piece


def read_into(stored: Stored, target: Tensor) -> None:
    """Copy the values into a contiguous tensor of the same shape and any dtype and device."""
    flat, at = target.detach().view(-1), 0
    for piece in pieces(stored):
        flat[at : at + len(piece)].copy_(piece)
        at += len(piece)


def equals(stored: Stored, other: Tensor) -> bool:
    """Whether `other`, of the same shape and contiguous, has these values (in its own dtype)."""
    flat, at = other.detach().view(-1), 0
    for piece in pieces(stored):
        if not torch.equal(flat[at : at + len(piece)], piece.to(flat)):
            return False
        at += len(piece)
    return True


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU."""
    tensors = {}
    for name, stored in read_header(path).items():
        tensors[name] = torch.empty(stored.shape, dtype=dtype_of(stored))
        read_into(stored, tensors[name])
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write tensors, in `dtype` if one is given; a value that is not finite is a TrainingError with the tensor's name.

    `path` is written in place, which is for a folder that is not yet in its own place (see `files.whole_folder`).
    """
    dtypes = {name: dtype or tensor.dtype for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))  # so that every tensor is aligned
    names = {getattr(torch, dtype): name for name, dtype in DTYPES.items()}
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
