"""From host to device without waiting: a plain copy to a GPU waits until the GPU has done all that it was given."""

from collections.abc import Sequence

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; the copy to a GPU is queued there, from memory that stays until it is made."""
    if tensor.device == device or device.type == "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def sent_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """One-dimensional tensors of one dtype, in one copy."""
    if device.type == "cpu":
        return [tensor.to(device) for tensor in tensors]
    whole = sent(torch.cat(list(tensors)), device)
    return list(whole.split([tensor.numel() for tensor in tensors]))
