"""A second set of weights for the same model, kept on the host and swapped in for a pass: the reference policy."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from slime.backends.megatron.model import unwrap


class HostWeights:
    """A copy of this rank's parameters."""

    def __init__(self, models: Sequence[torch.nn.Module]) -> None:
        self._models = list(models)
        self._copies: list[Tensor] = []
        self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Copy the weights that the model has now."""
        if not self._copies:
            pinned = torch.cuda.is_available()
            self._copies = [torch.empty_like(p, device="cpu", pin_memory=pinned) for p in self._parameters()]
        for copy, parameter in zip(self._copies, self._parameters(), strict=True):
            copy.copy_(parameter)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model computes with these weights inside the block, and has its own back after it, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for copy, parameter in zip(self._copies, self._parameters(), strict=True):
            own = parameter.clone()  # on the device: to pinned memory and from it the device copies by itself
            parameter.copy_(copy, non_blocking=True)
            copy.copy_(own, non_blocking=True)

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for model in self._models for parameter in unwrap(model).parameters()]
