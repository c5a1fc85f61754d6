"""The heap of the C library, asked for rows of allocations whose answer is known."""

import platform

import pytest

from gemlet.heap import extent

MIB = 2**20
here = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc says what its heap takes")


@here
def test_what_is_held_together_adds_up() -> None:
    taken = extent([(0, 64 * MIB)], [(1, 32 * MIB), (2, 8 * MIB), (1, -1), (2, -1)])
    assert taken is not None and 104 * MIB <= taken < 106 * MIB


@here
def test_what_follows_takes_the_place_of_what_ended() -> None:
    row = [event for name in range(50) for event in ((name, 16 * MIB), (name, -1))]
    taken = extent([], row)
    assert taken is not None and 16 * MIB <= taken < 34 * MIB


@here
def test_gaps_are_counted() -> None:
    """Small allocations that stay between large ones: what ends there cannot serve a larger one."""
    row = [event for i in range(40) for event in ((2 * i, MIB), (2 * i + 1, 2**12))]
    row += [(2 * i, -1) for i in range(40)] + [(100 + i, 2 * MIB) for i in range(20)]
    taken = extent([], row)
    assert taken is not None and taken > 70 * MIB, "never more than 40 MiB were held at once"
