"""Weights in pages of 2 MiB: every token reads all of them, and each small page has to be looked up."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25


def move_into_large_pages() -> int:
    """Ask Linux to move this process's private memory into large pages; returns the bytes that it did move.

    0 where the system has no such call (Linux before 6.1) or no such pages to give: nothing but speed depends on it.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    moved = 0
    for start, size in _private_regions(maps.read_text()):
        madvise(start, size, _MADV_HUGEPAGE)
        if madvise(start, size, _MADV_COLLAPSE) == 0:
            moved += size
    return moved


def _private_regions(maps: str) -> Iterator[tuple[int, int]]:
    """(start, bytes) of the whole large pages in every anonymous region that may be written."""
    for line in maps.splitlines():
        addresses, rights, _, _, inode, *_ = line.split()
        if rights != "rw-p" or inode != "0":
            continue
        first, end = (int(address, 16) for address in addresses.split("-"))
        start = -(-first // _HUGE_PAGE) * _HUGE_PAGE
        size = end // _HUGE_PAGE * _HUGE_PAGE - start
        if size > 0:
            yield start, size
