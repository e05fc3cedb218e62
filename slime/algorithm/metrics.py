"""From the metrics of micro-batches to those of a step, and from a rollout's train data to its means.

Letters: G rollouts in a step, DP and CP the parallel sizes. Pure arithmetic, and one visible reduction over ranks.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slime.data.context_parallel import ContextParallel

Contribution = tuple[float, float]
"""A sum and the count that divides it, of one rank."""

PER_TOKEN_KEYS = (
    "log_probs",
    "ref_log_probs",
    "rollout_log_probs",
    "teacher_log_probs",
    "values",
    "advantages",
    "returns",
    "kl",
    "entropy",
    "opd_reverse_kl",
)
"""Train data with one value per response token, averaged over the trained tokens of each rollout."""

PER_SAMPLE_KEYS = ("rewards", "raw_reward", "response_lengths", "total_lengths", "truncated")
"""Train data with one number per sample, averaged over samples."""


def micro_batch_record(metrics: Mapping[str, Tensor], num_tokens: Tensor | int = 0) -> dict[str, Any]:
    """What a loss function reports to Megatron: `keys`, and `values` with the number of tokens before the metrics.

    Args:
        metrics: 0-dim tensors, sums over the micro-batch.
        num_tokens: divisor of the per-token loss; 0 without it.

    Raises:
        ValueError: a metric that is not a 0-dim tensor.
    """
    for name, value in metrics.items():
        if not isinstance(value, Tensor) or value.dim() != 0:
            seen = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"The metric {name!r} of a loss must be a 0-dim tensor, got {seen}.")
    device = next((value.device for value in metrics.values()), torch.device("cpu"))
    count = num_tokens if isinstance(num_tokens, Tensor) else torch.full((), num_tokens, device=device)
    values = torch.stack([v.detach().to(device=device, dtype=torch.float64) for v in (count, *metrics.values())])
    return {"keys": list(metrics), "values": values}


def reduce_train_step_metrics(
    losses_reduced: Sequence[Mapping[str, Any]],
    *,
    calculate_per_token_loss: bool,
    step_global_batch_size: int,
    cp_size: int,
    dp_with_cp_group: dist.ProcessGroup | None,
) -> dict[str, float]:
    """Metrics of a step from the records of its micro-batches on this rank and all others of the group.

    Every value is a sum over samples. Default: divided by G, so it is a mean over rollouts. Per token: divided by the
    number of tokens; that was counted by each context-parallel rank for whole samples, hence times CP.

    Args:
        losses_reduced: from `micro_batch_record`, one per micro-batch, all with the same keys.
        step_global_batch_size: G.
        dp_with_cp_group: ranks to sum over; None: this process alone.
    """
    keys = list(losses_reduced[0]["keys"])
    others = [list(record["keys"]) for record in losses_reduced if list(record["keys"]) != keys]
    if others:
        raise ValueError(f"Micro-batches of one step report different metrics: {keys} and {others[0]}.")
    totals = torch.stack([record["values"] for record in losses_reduced]).sum(dim=0)
    if dp_with_cp_group is not None:
        dist.all_reduce(totals, group=dp_with_cp_group)
    num_tokens, *values = totals.tolist()
    divisor = num_tokens / cp_size if calculate_per_token_loss else float(step_global_batch_size)
    return {key: value / divisor for key, value in zip(keys, values, strict=True)}


def rollout_data_contributions(
    args: Namespace,
    rollout_data: Mapping[str, Any],
    *,
    dp_size: int,
    num_rollouts: int,
    context_parallel: ContextParallel | None = None,
) -> dict[str, Contribution]:
    """This rank's part of the means over a rollout's train data; `reduce_contributions` makes the means.

    Values per token: mean over the trained tokens of each rollout, then over rollouts. Values per sample: mean over
    samples. `raw_reward` and `total_lengths` are of this rank's samples here.

    Args:
        rollout_data: of this rank, lists with one entry per sample.
        dp_size: data-parallel ranks, context-parallel ones not counted.
        num_rollouts: of all ranks.
    """
    cp = context_parallel or ContextParallel()
    reduce = cp.get_sum_of_sample_mean(
        rollout_data["total_lengths"],
        rollout_data["response_lengths"],
        rollout_data["loss_masks"],
        rollout_data.get("rollout_mask_sums"),
    )
    contributions: dict[str, Contribution] = {}
    for key in PER_TOKEN_KEYS:
        values = rollout_data.get(key)
        if values:
            contributions[key] = (cp.size * float(reduce(torch.cat(values))), num_rollouts / dp_size)
    for key in PER_SAMPLE_KEYS:
        numbers = rollout_data.get(key)
        if numbers is not None and all(isinstance(number, (int, float)) for number in numbers):
            contributions[key] = (float(sum(numbers)), float(len(numbers)))
    return contributions


def reduce_contributions(ranks: Sequence[Mapping[str, Contribution]]) -> dict[str, float]:
    """Means from the contributions of all data- and context-parallel ranks: sum of sums over sum of counts."""
    keys = dict.fromkeys(key for rank in ranks for key in rank)
    means: dict[str, float] = {}
    for key in keys:
        parts = [rank[key] for rank in ranks if key in rank]
        count = sum(part[1] for part in parts)
        if count > 0:
            means[key] = sum(part[0] for part in parts) / count
    return means
