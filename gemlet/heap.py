"""How much memory the C library needs for a row of allocations: more than their sum, because of the gaps in its heap.

The library itself is asked: it serves the allocations, one after another as they happened, in a process that has
nothing else on its heap (`python -m gemlet.heap`); memory that nobody touches costs nothing. glibc only: of other
libraries nothing is known.
"""

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence

Event = tuple[int, int]
"""An allocation (its name, its bytes), or its end (its name, -1)."""

ROUNDS = 3
"""How often what repeats is repeated: the heap of the second round is not that of the first."""


def extent(before: Sequence[Event], repeated: Sequence[Event]) -> int | None:
    """The most bytes that the heap takes when `before` happens once and then `repeated` again and again."""
    job = json.dumps([before, repeated])
    command = [sys.executable, "-m", "gemlet.heap"]
    done = subprocess.run(command, input=job, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


class _Info(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        ("arena", ctypes.c_size_t),  # taken by moving the break
        *((name, ctypes.c_size_t) for name in ("ordblks", "smblks", "hblks")),
        ("hblkhd", ctypes.c_size_t),  # taken by mapping
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    ]


def _replayed(before: Sequence[Event], repeated: Sequence[Event]) -> int | None:
    c = ctypes.CDLL(None)
    if not hasattr(c, "mallinfo2"):
        return None
    c.mallinfo2.restype = _Info
    c.free.argtypes = [ctypes.c_void_p]
    c.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]

    def size() -> int:
        info = c.mallinfo2()
        return info.arena + info.hblkhd

    places: dict[int, int | None] = {}

    def happen(events: Sequence[Event]) -> int:
        most = 0
        for name, bytes_ in events:
            if bytes_ >= 0:
                place = ctypes.c_void_p()
                c.posix_memalign(ctypes.byref(place), 64, bytes_)  # torch aligns so
                places[name] = place.value
                if bytes_ >= 2**16:
                    most = max(most, size())
            elif name in places:
                c.free(places.pop(name))
        return most

    start = size()
    happen(before)
    stays = set(places)
    step = [(name, bytes_) for name, bytes_ in repeated if name not in stays]
    most = 0
    for _ in range(ROUNDS):
        most = max(most, happen(step))
        for name in set(places) - stays:
            c.free(places.pop(name))
    return most - start


if __name__ == "__main__":
    print(json.dumps(_replayed(*json.load(sys.stdin))))
