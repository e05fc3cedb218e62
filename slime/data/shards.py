"""A rank's shard on its way to the trainer: one array a key instead of one tensor a sample.

Pickle, and so Ray, writes each tensor as a file of its own: 256 samples of 500 tokens cost 30 ms on either side. Arrays
go through the object store as they lie in memory.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_DTYPES = frozenset({torch.int32, torch.int64, torch.float32, torch.float64})


class Joined(NamedTuple):
    """One-dimensional tensors of all samples, one after the other."""

    array: np.ndarray[Any, Any]
    lengths: list[int]


def joined(shard: Mapping[str, Any]) -> dict[str, Any]:
    """The shard with every list of one-dimensional tensors as one `Joined`; everything else as it is."""
    return {key: _joined(value) if _can_be_joined(value) else value for key, value in shard.items()}


def separated(shard: Mapping[str, Any]) -> dict[str, Any]:
    """What `joined` was given. The tensors of a list are parts of one memory, which is nobody else's."""
    return {key: _separated(value) if isinstance(value, Joined) else value for key, value in shard.items()}


def _can_be_joined(value: Any) -> bool:
    if not (isinstance(value, list) and value and isinstance(value[0], Tensor)):
        return False
    dtype = value[0].dtype
    return dtype in _DTYPES and all(isinstance(x, Tensor) and x.dim() == 1 and x.dtype is dtype for x in value)


def _joined(tensors: list[Tensor]) -> Joined:
    return Joined(torch.cat(tensors).numpy(), [tensor.numel() for tensor in tensors])


def _separated(value: Joined) -> list[Tensor]:
    whole = torch.from_numpy(value.array.copy())  # the object store's memory cannot be written to
    return list(torch.split(whole, value.lengths))
