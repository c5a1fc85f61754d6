"""A kernel's source file to a library in the user's cache, compiled once for each machine.

The name in the cache is a digest of all that the result depends on: the source, the compiler, the flags and the
processor. Without a compiler there is no library, and the caller does without.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

FLAGS = "-std=c++17 -O3 -march=native -ffp-contract=off -fPIC -shared -pthread -w"
SECONDS = 120
"""A compiler that takes longer is taken for one that does not work."""


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The library of `NAME.cpp` beside this file, compiled now if the cache has it not; None if that cannot be done."""
    with suppress(OSError, subprocess.SubprocessError):
        return ctypes.CDLL(str(_compiled(Path(__file__).with_name(f"{name}.cpp"))))
    return None


def _compiled(source: Path) -> Path:
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler")
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=SECONDS, check=True).stdout
    parts = (source.read_bytes(), version, FLAGS.encode(), _processor().encode())
    target = _folder() / f"{source.stem}-{hashlib.sha256(bytes(1).join(parts)).hexdigest()[:16]}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as place:  # several processes may be at it: one move
            made = Path(place) / "made.so"
            command = [compiler, *FLAGS.split(), str(source), "-o", str(made)]
            subprocess.run(command, capture_output=True, timeout=SECONDS, check=True)
            made.replace(target)
    return target


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemlet"


def _processor() -> str:
    """What `-march=native` goes by: a home folder may be shared by several kinds of machine."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return platform.machine() + platform.processor()
