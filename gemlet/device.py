"""Which device to compute on, in which precision, whether blocks can be compiled there, and how a CPU rounds to 0."""

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gemlet.errors import GemletError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """A device by name; `auto` takes a CUDA or Apple GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise GemletError(
            f"device {name!r} is not to be had here ({reason:.120}); use auto, cpu, cuda or mps"
        ) from None
    return device


def pick_precision(precision: str, device: torch.device) -> str:
    """What matrix products compute in, a key of DTYPES; `auto` takes bf16 where the device multiplies it fast."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "mps" or _bf16_is_fast() else "fp32"


@functools.cache
def _bf16_is_fast() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware: measured, since no public call tells."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(512, 512, dtype=dtype)
        torch.mm(x, x)
        start = time.perf_counter()
        for _ in range(4):
            torch.mm(x, x)
        seconds[dtype] = time.perf_counter() - start
    return seconds[torch.bfloat16] < seconds[torch.float32]


@functools.cache
def can_compile(device_type: str) -> bool:
    """Whether torch.compile works on this kind of device here: tried, on one line, since it needs a compiler."""
    if device_type == "mps":
        return False
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.ones(16, device=device_type))
    except Exception:  # whatever is missing: a compiler, headers, Triton
        return False
    return True


@contextmanager
def flush_denormals() -> Iterator[None]:
    """Numbers below 1e-38 become 0 on a CPU, which is slow at them.

    A trained model's step has so many that it takes a fifth longer than a fresh one's. Threads inherit the setting
    from the one that starts them: those that torch has started before keep theirs.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
