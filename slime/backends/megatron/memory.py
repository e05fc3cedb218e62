"""Gives back the memory that only training needs while engines use the devices, and brings it back exactly.

Storages are emptied, not tensors: parameters, gradients and optimizer states are views of shared buffers, and a view
keeps pointing at its storage.
"""

import itertools
from collections.abc import Collection, Iterator, Sequence

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from slime.backends.megatron.accelerator import Accelerator
from slime.backends.megatron.model import unwrap
from slime.utils.memory_utils import host_memory_left

_GIB = 1 << 30
_ALIGNMENT = 512  # bytes; where a buffer starts, as on the device
_WHY_PINNED = (
    "A trainer that gives its GPU's memory back keeps",
    "keep the trainer on its GPU with --no-offload-train",
)


class TrainingMemory:
    """What `release` frees depends on where it lies.

    Gradient buffers hold nothing between steps, so they are dropped. On a GPU the optimizer's main weights and states
    move to pinned memory of the host, and the model's weights too once no sync needs them. On a CPU they are on the
    host already, and stay.
    """

    def __init__(
        self, models: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, accelerator: Accelerator
    ) -> None:
        self._models, self._optimizer, self._accelerator = list(models), optimizer, accelerator
        self._dropped: list[tuple[torch.UntypedStorage, int]] = []
        self._states, self._weights = _OnHost(accelerator), _OnHost(accelerator)
        self.is_released = False

    @property
    def lacks_weights(self) -> bool:
        """Whether the model's weights are on the host, so that nothing can read them."""
        return self._weights.is_filled

    def release(self, *, keep_weights: bool = False) -> None:
        """Idempotent; `keep_weights` leaves the model's weights where a weight sync reads them."""
        if not self.is_released:
            self._drop_gradients()
            self._states.take(_on_device(self._optimizer_tensors(), but=self._weight_storages()))
            self.is_released = True
        if not keep_weights and not self.lacks_weights:
            self._weights.take(_on_device(self._parameters()))
        self._accelerator.synchronize()
        self._accelerator.empty_cache()  # also of what engines had opened and have closed

    def restore_weights(self) -> None:
        """The model's weights as they were, and no more than that."""
        self._weights.give_back()
        self._accelerator.synchronize()

    def restore(self) -> None:
        """Everything as it was; gradients are zero."""
        if not self.is_released:
            return
        self._weights.give_back()
        self._states.give_back()
        for storage, num_bytes in self._dropped:
            storage.resize_(num_bytes)
        for gradients in self._gradient_buffers():
            gradients.zero_()
        self._dropped = []
        self.is_released = False
        self._accelerator.synchronize()

    def _drop_gradients(self) -> None:
        self._accelerator.synchronize()
        self._optimizer.zero_grad(set_to_none=True)
        gradients = _storages(self._gradient_buffers())
        self._dropped = [(storage, storage.nbytes()) for storage in gradients]
        for storage in gradients:
            storage.resize_(0)

    def _gradient_buffers(self) -> Iterator[Tensor]:
        for model in self._models:
            for buffer in [*model.buffers, *model.expert_parallel_buffers]:
                yield buffer.grad_data

    def _parameters(self) -> Iterator[Tensor]:
        for model in self._models:
            yield from unwrap(model).parameters()

    def _weight_storages(self) -> set[int]:
        return {parameter.untyped_storage().data_ptr() for parameter in self._parameters()}

    def _optimizer_tensors(self) -> Iterator[Tensor]:
        for part in self._optimizer.chained_optimizers:
            if part.optimizer is None:
                continue
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    yield parameter
                    yield from (v for v in part.optimizer.state[parameter].values() if isinstance(v, Tensor))


class _OnHost:
    """Storages of a device whose bytes wait on the host. The host's buffers are kept: pinning memory is slow."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._taken: list[tuple[torch.UntypedStorage, Tensor]] = []
        self._buffers: list[Tensor] = []

    @property
    def is_filled(self) -> bool:
        return bool(self._taken)

    def take(self, storages: list[torch.UntypedStorage]) -> None:
        """Copy to the host and free the device's memory."""
        for storage, host in zip(storages, self._buffers_for([s.nbytes() for s in storages]), strict=True):
            host.copy_(_bytes(storage), non_blocking=True)
            self._taken.append((storage, host))
        self._accelerator.synchronize()
        for storage, _ in self._taken:
            storage.resize_(0)

    def give_back(self) -> None:
        for storage, host in self._taken:
            storage.resize_(host.numel())
            _bytes(storage).copy_(host, non_blocking=True)
        self._taken = []

    def _buffers_for(self, sizes: list[int]) -> list[Tensor]:
        """One buffer a size in bytes: those of before, and the missing ones out of one new piece of memory."""
        kept: dict[int, list[Tensor]] = {}
        for buffer in self._buffers:
            kept.setdefault(buffer.numel(), []).append(buffer)
        found = [kept[size].pop() if kept.get(size) else None for size in sizes]
        missing = [size for size, buffer in zip(sizes, found, strict=True) if buffer is None]
        *starts, end = starts_and_end(missing)
        memory = pinned(self._accelerator, end, *_WHY_PINNED) if missing else None
        new = [memory[at : at + size] for at, size in zip(starts, missing, strict=True) if memory is not None]
        self._buffers += new
        rest = iter(new)
        return [next(rest) if buffer is None else buffer for buffer in found]


def starts_and_end(sizes: Sequence[int]) -> list[int]:
    """Where buffers of so many bytes start, side by side in one piece of memory, and where it ends."""
    return list(itertools.accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0))


def pinned(accelerator: Accelerator, num_bytes: int, keeps: str, way_out: str) -> Tensor:
    """[num_bytes] uint8 of the host, pinned until the process ends.

    Args:
        keeps, way_out: for the error: who keeps it, and how to do without.

    Raises:
        MemoryError: the host has not the room. (The system would kill the process, without a word.)
    """
    left = host_memory_left()
    if left is not None and num_bytes > left:
        raise MemoryError(
            f"{keeps} {num_bytes / _GIB:.1f} GiB of it on the host, where this machine or container has "
            f"{left / _GIB:.1f} GiB left: give it more memory, put fewer trainer ranks on it, or {way_out}."
        )
    return accelerator.pinned(num_bytes)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """[bytes] uint8 view of a whole storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _on_device(tensors: Iterator[Tensor], but: Collection[int] = ()) -> list[torch.UntypedStorage]:
    """Storages on a GPU, without those whose address is in `but`."""
    return [s for s in _storages(tensor for tensor in tensors if tensor.is_cuda) if s.data_ptr() not in but]


def _storages(tensors: Iterator[Tensor]) -> list[torch.UntypedStorage]:
    """Each storage once."""
    unique: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            unique.setdefault(storage.data_ptr(), storage)
    return list(unique.values())
