"""What this machine has, found out without torch, which takes seconds to load."""

import ctypes
import functools
import os
import sys
from pathlib import Path


def threads() -> int:
    """Threads to compute with: torch's number where it is loaded, else OMP_NUM_THREADS, else the cores to be had."""
    if "torch" in sys.modules:
        return sys.modules["torch"].get_num_threads()
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) else _cores()


@functools.cache
def _cores() -> int:
    """Cores, not their hyperthreads, that this process may run on."""
    try:
        allowed = os.sched_getaffinity(0)
        of_core = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
        return len({Path(of_core.format(cpu)).read_text() for cpu in allowed})
    except (AttributeError, OSError):  # not Linux
        return os.cpu_count() or 1


def may_have_gpu(devices: Path = Path("/dev")) -> bool:
    """Whether torch might find a GPU here; False is certain, and spares the time to load it."""
    drivers = ("nvidia[0-9]*", "kfd", "dxg")  # NVIDIA's, AMD's, that of Windows as Linux has it under WSL
    return sys.platform != "linux" or any(any(devices.glob(name)) for name in drivers)


def reuse_memory() -> None:
    """Make the large buffers of a training step cheap to get again, on Linux: a step frees and asks for gigabytes.

    torch asks for pages of 2 MiB if told so before its first tensor, and glibc keeps what is freed for the next step
    instead of returning it, since the kernel clears every page that it gives.
    """
    if sys.platform != "linux":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    trim_threshold, mmap_max = -1, -4  # their numbers in malloc.h
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)  # nothing beside the heap, whatever its size
