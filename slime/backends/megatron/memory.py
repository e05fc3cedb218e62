"""Gives back the memory that only training needs while engines use the devices, and brings it back exactly.

Storages are emptied, not tensors: parameters, gradients and optimizer states are views of shared buffers, and a view
keeps pointing at its storage.
"""

from collections.abc import Iterator, Sequence

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from slime.backends.megatron.accelerator import Accelerator
from slime.backends.megatron.model import unwrap


class TrainingMemory:
    """What `release` frees depends on where it lies.

    Gradient buffers hold nothing between steps, so they are dropped. On a GPU weights, main weights and optimizer
    states move to the host. On a CPU they are on the host already, and stay.
    """

    def __init__(
        self, models: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, accelerator: Accelerator
    ) -> None:
        self._models, self._optimizer, self._accelerator = list(models), optimizer, accelerator
        self._dropped: list[tuple[torch.UntypedStorage, int]] = []
        self._moved: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []
        self.is_released = False

    def release(self) -> None:
        """Idempotent."""
        if self.is_released:
            return
        self._accelerator.synchronize()
        self._optimizer.zero_grad(set_to_none=True)
        gradients = _storages(self._gradient_buffers())
        self._dropped = [(storage, storage.nbytes()) for storage in gradients]
        for storage in gradients:
            storage.resize_(0)
        if self._accelerator.device.type != "cpu":
            for storage in _storages(tensor for tensor in self._kept_tensors() if tensor.is_cuda):
                self._moved.append((storage, storage.cpu()))
                storage.resize_(0)
        self.is_released = True
        self._accelerator.empty_cache()

    def restore(self) -> None:
        """Everything as it was; gradients are zero."""
        if not self.is_released:
            return
        for storage, host in self._moved:
            storage.resize_(host.nbytes())
            storage.copy_(host)
        for storage, num_bytes in self._dropped:
            storage.resize_(num_bytes)
        for gradients in self._gradient_buffers():
            gradients.zero_()
        self._moved, self._dropped = [], []
        self.is_released = False

    def _gradient_buffers(self) -> Iterator[Tensor]:
        for model in self._models:
            for buffer in [*model.buffers, *model.expert_parallel_buffers]:
                yield buffer.grad_data

    def _kept_tensors(self) -> Iterator[Tensor]:
        for model in self._models:
            yield from unwrap(model).parameters()
        for part in self._optimizer.chained_optimizers:
            if part.optimizer is None:
                continue
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    yield parameter
                    yield from (v for v in part.optimizer.state[parameter].values() if isinstance(v, Tensor))


def _storages(tensors: Iterator[Tensor]) -> list[torch.UntypedStorage]:
    """Each storage once."""
    unique: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            unique.setdefault(storage.data_ptr(), storage)
    return list(unique.values())
