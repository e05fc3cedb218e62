"""Statistics over the ranks of a process group."""

import torch.distributed as dist
from torch import Tensor

from slime.losses.advantages import masked_moments, whiten


def distributed_masked_whiten(
    values: Tensor,
    mask: Tensor,
    process_group: dist.ProcessGroup | None = None,
    shift_mean: bool = True,
    epsilon: float = 1e-8,
) -> Tensor:
    """Give `values` mean 0 and variance 1 over the masked values of all ranks of a group.

    One all-reduce of three float64 numbers, made on every rank whether it has values or not.

    Args:
        values: [N] of this rank; N may be 0 and differ between ranks.
        mask: [N]; which values count. All values are transformed.
        process_group: None means all ranks, or this process alone if torch.distributed is not initialised.
        shift_mean: False keeps the mean and scales only.
        epsilon: added to the unbiased variance.

    Raises:
        ValueError: no masked value on any rank.
    """
    moments = masked_moments(values, mask)
    if process_group is not None or dist.is_initialized():
        dist.all_reduce(moments, group=process_group)
    return whiten(values, moments, shift_mean=shift_mean, epsilon=epsilon)
