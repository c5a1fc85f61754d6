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
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

FLAGS = "-std=c++17 -O3 -march=native -fPIC -shared -w"
FLAGS_OF = {
    "attention": "-fopenmp -ffp-contract=fast",
    "decode": "-pthread -ffp-contract=off",  # a row is the same to the last bit however the rows are cut
    "linear": "-fopenmp -ffp-contract=fast",
    "loss": "-fopenmp -ffp-contract=fast",
    "muon": "-fopenmp -ffp-contract=fast",
    "norm": "-fopenmp -ffp-contract=fast -fno-trapping-math",  # GCC makes no vectors of what might trap, for AVX2
    "train": "-fopenmp -ffp-contract=fast -fno-trapping-math",
}
SECONDS = 120
"""A compiler that takes longer is taken for one that does not work."""


_loaded: dict[str, ctypes.CDLL] = {}
_started: dict[str, subprocess.Popen[bytes]] = {}


def library(name: str, wait: bool = True) -> ctypes.CDLL | None:
    """The library of `NAME.cpp` beside this file, compiled if the cache has it not; None if that cannot be done.

    Without `wait` a process of its own compiles it, and None is the answer until that is done.
    """
    if name not in _loaded:
        target = _target(name)
        if target is None or (not target.is_file() and not (_compile(name) if wait else _start(name))):
            return None
        with suppress(OSError):  # a cache that forbids running what it holds
            _loaded[name] = ctypes.CDLL(str(target))
    return _loaded.get(name)


@functools.cache
def _compiler() -> tuple[str, bytes] | None:
    """The path of a C++ compiler, and its version."""
    for found in filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))):
        with suppress(OSError, subprocess.SubprocessError):
            asked = subprocess.run([found, "--version"], capture_output=True, timeout=SECONDS, check=True)
            return found, asked.stdout
    return None


@functools.cache
def _target(name: str) -> Path | None:
    """Where the library is, or will be."""
    compiler = _compiler()
    if compiler is None:
        return None
    shared = (header.read_bytes() for header in sorted(Path(__file__).parent.glob("*.h")))
    parts = (_source(name).read_bytes(), *shared, compiler[1], _flags(name).encode(), _processor().encode())
    return _folder() / f"{name}-{hashlib.sha256(bytes(1).join(parts)).hexdigest()[:16]}.so"


@functools.cache
def _compile(name: str) -> bool:
    """Compile it now. Tried once: it may fail for want of headers, of a place to write to, of time."""
    compiler, target = _compiler(), _target(name)
    assert compiler is not None and target is not None
    with suppress(OSError, subprocess.SubprocessError):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as place:  # several processes may be at it: one move
            made = Path(place) / "made.so"
            command = [compiler[0], *_flags(name).split(), str(_source(name)), "-o", str(made)]
            subprocess.run(command, capture_output=True, timeout=SECONDS, check=True)
            made.replace(target)
        return True
    return False


def _start(name: str) -> bool:
    """Let another process compile it, which outlives this one. It is not there yet."""
    if name not in _started:
        command = [sys.executable, "-m", "gemlet.kernels.build", name]
        with suppress(OSError):
            _started[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
    return False


def _flags(name: str) -> str:
    return f"{FLAGS} {FLAGS_OF[name]}"


def _source(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.cpp")


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemlet"


def _processor() -> str:
    """What `-march=native` goes by: a home folder may be shared by several kinds of machine."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return platform.machine() + platform.processor()


if __name__ == "__main__":
    library(sys.argv[1])
