"""Keys and values of the running sequences: one row a sequence, grown in rows and length as they are needed.

Letters: S rows, H key-value heads, L positions, D head size. A layer's values are [S, H, L, D], its keys [S, H, D, L]:
the product of a query with all keys is fastest that way. Row i belongs to the i-th running sequence, so a decoding step
reads the first B rows as one view and copies nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LENGTH_STEP = 64
"""Positions are allocated in multiples of this."""


@dataclass(frozen=True)
class KVShape:
    """What one layer keeps for one position."""

    num_heads: int
    key_dim: int
    value_dim: int

    @property
    def numbers(self) -> int:
        """Elements kept for one position of one sequence."""
        return self.num_heads * (self.key_dim + self.value_dim)


class SlotCache:
    """The key-value cache of one engine.

    Memory is a rectangle of rows x length, allocated on first use, grown to what the running sequences need and never
    beyond `max_rows` x `max_length`. New memory is zeroed: a masked position is multiplied by 0, which must not meet
    NaN.
    """

    def __init__(self, shapes: list[KVShape], max_rows: int, max_length: int, dtype: torch.dtype) -> None:
        self.shapes, self.max_rows, self.max_length, self.dtype = shapes, max_rows, max_length, dtype
        self.rows = self.length = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @property
    def widest(self) -> int:
        """Elements of the keys, or of the values, of one position in one layer; the most of all layers."""
        return max(shape.num_heads * max(shape.key_dim, shape.value_dim) for shape in self.shapes)

    @property
    def bytes_per_position(self) -> int:
        """Bytes that one position of one sequence takes over all layers."""
        return sum(shape.numbers for shape in self.shapes) * self.dtype.itemsize

    @property
    def size_bytes(self) -> int:
        """Bytes allocated now."""
        return self.rows * self.length * self.bytes_per_position

    def grown(self, rows: int, length: int) -> tuple[int, int]:
        """The (rows, length) that `reserve(rows, length)` would leave allocated."""
        if rows > self.rows:
            rows = min(self.max_rows, max(rows, self.rows * 2, 4))
        if length > self.length:
            length = -(-max(length, self.length * 5 // 4) // LENGTH_STEP) * LENGTH_STEP
            length = min(length, -(-self.max_length // LENGTH_STEP) * LENGTH_STEP)
        return max(rows, self.rows), max(length, self.length)

    def reserve(self, rows: int, length: int) -> None:
        """Make room for `rows` sequences of `length` positions, keeping what is stored."""
        if rows <= self.rows and length <= self.length:
            return
        new_rows, new_length = self.grown(rows, length)
        is_new = not self.keys
        for layer, shape in enumerate(self.shapes):
            keys = torch.zeros(new_rows, shape.num_heads, shape.key_dim, new_length, dtype=self.dtype)
            values = torch.zeros(new_rows, shape.num_heads, new_length, shape.value_dim, dtype=self.dtype)
            if is_new:
                self.keys.append(keys)
                self.values.append(values)
                continue
            keys[: self.rows, ..., : self.length] = self.keys[layer]
            values[: self.rows, :, : self.length] = self.values[layer]
            self.keys[layer], self.values[layer] = keys, values
        self.rows, self.length = new_rows, new_length

    def store(self, layer: int, rows: Tensor, positions: Tensor, key: Tensor, value: Tensor) -> None:
        """Keep one new position of each of B sequences: rows and positions [B], key and value [H, B, D]."""
        self.keys[layer][rows, :, :, positions] = key.transpose(0, 1)
        self.values[layer][rows, :, positions] = value.transpose(0, 1)

    def copy(self, source: int, targets: list[int], length: int) -> None:
        """Copy the first `length` positions of row `source` into the rows `targets`."""
        targets = [row for row in targets if row != source]
        if not targets or not length:
            return
        for keys, values in zip(self.keys, self.values, strict=True):
            # One row at a time: where sequences fill the cache to its end, torch refuses an indexed copy of a whole
            # tensor's row into that tensor, as it does not look which rows are meant.
            for row in targets:
                keys[row, ..., :length] = keys[source, ..., :length]
                values[row, :, :length] = values[source, :, :length]

    def release(self) -> None:
        """Give all memory back."""
        self.keys, self.values = [], []
        self.rows = self.length = 0
