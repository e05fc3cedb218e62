"""The Protocol of an accelerator."""

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class MemoryFacts:
    """Memory that this process holds, in bytes."""

    used_bytes: int
    """On CUDA, what the allocator has given to tensors; on a CPU, the process's resident set."""
    peak_bytes: int
    total_bytes: int
    """Of the device; of the machine on a CPU."""


class Accelerator(Protocol):
    """The device one training process computes on."""

    device: torch.device
    backend: str
    """Collective backend: `nccl` or `gloo`."""

    def install(self) -> None:
        """Prepare this process; call before megatron is imported. Repeating it does nothing."""

    def make_deterministic(self) -> None:
        """The same work gives the same bits (--deterministic-mode); call before the first product."""

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""

    def empty_cache(self) -> None:
        """Return freed memory to where others can use it."""

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8 on the host, from and to which the device copies by itself; kept until the process ends."""

    def memory(self) -> MemoryFacts: ...
