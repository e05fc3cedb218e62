"""One fingerprint a tensor: xxh3-128 over its raw bytes, cheap enough to take of every weight at every sync."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import torch
import xxhash

if TYPE_CHECKING:
    from torch import Tensor


def tensor_digest(tensor: "Tensor") -> str:
    """xxh3-128 (32 hex digits) of a tensor's bytes in row-major order; dtype and shape are not part of it."""
    return xxhash.xxh3_128_hexdigest(raw_bytes(tensor).numpy())


def raw_bytes(tensor: "Tensor") -> "Tensor":
    """[numel * itemsize] uint8 view of a contiguous CPU tensor (copied where it is neither)."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


class ExpectedDigests(Protocol):
    """What every engine must report once it holds the tensors that went by.

    Engines digest the memory that computes, so the names and the fusion are the engine's:
    the trainer's side imitates them.
    """

    def add(self, named_tensors: Iterable[tuple[str, "Tensor"]]) -> None:
        """Take note of a bucket on its way out."""

    def result(self) -> dict[str, str]:
        """Engine's tensor name -> digest, for all tensors added."""


class TensorDigests:
    """Expected digests of engines that report one a HuggingFace tensor (the embedded engine)."""

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}

    def add(self, named_tensors: Iterable[tuple[str, "Tensor"]]) -> None:
        for name, tensor in named_tensors:
            self._digests[name] = tensor_digest(tensor)

    def result(self) -> dict[str, str]:
        return dict(self._digests)
