"""Cosines and sines of rotary positions out of a table: looked up in two calls, and the same in every pass."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

TABLE_BLOCK = 1024
"""Positions whose rotations are computed at once."""
CHANGING_ROTATIONS = ("dynamic", "longrope")
"""Rotations that depend on the longest sequence of a pass."""


class RotationTable(nn.Module):
    """Stands for a model's rotary embedding: cosines and sines looked up, so that they depend on the position only.

    A cosine that is computed may differ in its last bit with its place in the vector registers.
    """

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary
        self._cos, self._sin = torch.empty(0), torch.empty(0)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids [1, T] -> cos and sin [1, T, D] in the dtype of x."""
        positions = position_ids[0]
        missing = int(positions.max()) + 1 - self._cos.shape[0]
        if missing > 0:
            self._grow(x, -(-missing // TABLE_BLOCK))
        return self._cos[positions][None], self._sin[positions][None]

    def _grow(self, x: Tensor, num_blocks: int) -> None:
        cosines, sines = [self._cos], [self._sin]
        for index in range(num_blocks):
            start = self._cos.shape[0] + index * TABLE_BLOCK
            cos, sin = self.rotary(x, torch.arange(start, start + TABLE_BLOCK)[None])
            cosines.append(cos[0])
            sines.append(sin[0])
        parts = slice(0 if self._cos.numel() else 1, None)
        self._cos, self._sin = torch.cat(cosines[parts]), torch.cat(sines[parts])


def changing_rotations(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(name, type) of every part of a model whose rotations no table can hold."""
    for name, part in module.named_modules():
        kinds = getattr(part, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if kind in CHANGING_ROTATIONS:
                yield name, kind
