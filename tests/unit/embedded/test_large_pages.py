"""Moving memory changes no byte of it."""

import torch

from benchmarks.cpu_engine import move_into_large_pages, private_regions

MAPS = """7f0000000000-7f0000100000 rw-p 00000000 00:00 0
7f0000300000-7f0000b00000 rw-p 00000000 00:00 0                          [anon]
7f0001000000-7f0001800000 r--p 00000000 00:00 0
7f0002000000-7f0002800000 rw-p 00000000 08:01 4711                       /lib/libc.so
"""


def test_whole_large_pages_of_private_memory_are_moved() -> None:
    assert list(private_regions(MAPS)) == [(0x7F0000400000, 0x600000)]


def test_memory_keeps_its_contents() -> None:
    numbers = torch.arange(8 << 20)
    assert move_into_large_pages() >= 0
    assert torch.equal(numbers, torch.arange(8 << 20))
