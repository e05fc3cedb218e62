"""Copies of what a checkpoint holds, so that training can go on over the originals while they are written.

A GPU copies to pinned memory by itself, many times faster than to new pages of the host, each of which the system must
first find and clear. Pinning is as slow as that, so what was pinned is kept from one save to the next.
"""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from slime.backends.megatron.accelerator import Accelerator
from slime.backends.megatron.memory import pinned, starts_and_end


class Staging:
    """Lends memory for copies until it is given back; what a save has not given back, another does not get."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._free: list[Tensor] = []
        self._lock = threading.Lock()

    def copies(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """Copies on the host, each with a storage of its own, made when this returns.

        Returns:
            the copies, and the memory that those of a GPU's tensors lie in, to be given back (None: there are none).

        Raises:
            MemoryError: the host has not the room.
        """
        sizes = [tensor.nbytes if _is_on_gpu(tensor) else 0 for tensor in tensors]
        *starts, end = starts_and_end(sizes)
        memory = self._lent(end) if end else None
        copies = []
        for tensor, start, size in zip(tensors, starts, sizes, strict=True):
            if not size or memory is None:
                copies.append(tensor.detach().clone())
                continue
            part = memory.untyped_storage()[start : start + size]
            copy = torch.empty(0, dtype=tensor.dtype).set_(part, 0, tensor.shape)
            copies.append(copy.copy_(tensor.detach(), non_blocking=True))
        self._accelerator.synchronize()
        return copies, memory

    def give_back(self, memory: Tensor) -> None:
        """Nobody reads the copies in it any more. Any thread may say so."""
        with self._lock:
            self._free.append(memory)

    def _lent(self, num_bytes: int) -> Tensor:
        with self._lock:
            for i, memory in enumerate(self._free):
                if memory.numel() >= num_bytes:
                    return self._free.pop(i)
        return pinned(
            self._accelerator,
            num_bytes,
            "With --async-save a trainer copies what it saves and keeps",
            "leave --async-save out",
        )


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda
