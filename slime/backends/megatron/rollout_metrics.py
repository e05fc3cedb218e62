"""What a rollout looks like to the trainer, before it trains on it: means over the samples of all ranks."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from slime.backends.megatron import parallel
from slime.losses.aggregation import sum_of_sample_mean

_PER_TOKEN = ("log_probs", "ref_log_probs", "rollout_log_probs", "teacher_log_probs", "advantages", "returns", "values", "kl", "entropy", "opd_reverse_kl")  # fmt: skip
_PER_SAMPLE = ("rewards", "response_lengths", "total_lengths", "truncated")


def rollout_metrics(data: Mapping[str, Any], num_rollouts: int) -> dict[str, float]:
    """Means under `rollout/`: per-token values like the loss (mean of each rollout first), others over samples.

    Collective.

    Args:
        data: this rank's part of the rollout.
        num_rollouts: rollouts of all ranks.
    """
    sums: dict[str, float] = {}
    masks = data["loss_masks"]
    reduce = sum_of_sample_mean(masks, data.get("rollout_mask_sums"))
    for key in _PER_TOKEN:
        values = data.get(key)
        if values and all(isinstance(v, Tensor) and v.shape == m.shape for v, m in zip(values, masks, strict=True)):
            sums[key] = float(reduce(torch.cat([value.float() for value in values])))
    for key in _PER_SAMPLE:
        if data.get(key) is not None:
            sums[key] = float(sum(float(value) for value in data[key]))
    names: list[Any] = [sorted(sums)]
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() > 1:  # only the last stage has log-probs
        dist.broadcast_object_list(names, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    device = torch.cuda.current_device()
    counts = [float(len(masks)), *(sums.get(name, 0.0) for name in names[0])]
    totals = parallel.sum_over_data_parallel(torch.tensor(counts, dtype=torch.float64, device=device)).tolist()
    num_samples = max(totals[0], 1.0)
    means = dict(zip(names[0], totals[1:], strict=True))
    return {f"rollout/{k}": v / (num_samples if k in _PER_SAMPLE else num_rollouts) for k, v in means.items()}
