"""The import path under which users' losses find advantages and losses; the code is in `slime.algorithm`.

Custom losses get logits, so the losses here take logits too: [1, T, V] of the whole vocabulary, of the sequences of the
batch one after another (`batch["tokens"]`, a list with one [L] tensor per sample), then padding.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slime.algorithm.advantages import compute_advantages_and_returns
from slime.algorithm.corrections import icepop_function, vanilla_tis_function
from slime.algorithm.loss import Metrics, policy_loss, sft_loss, value_loss
from slime.algorithm.metrics import reduce_train_step_metrics
from slime.backends.megatron_utils.cp_utils import get_context_parallel
from slime.losses.aggregation import Reducer
from slime.utils.ppo_utils import calculate_log_probs_and_entropy

__all__ = [
    "compute_advantages_and_returns",
    "get_responses",
    "icepop_function",
    "policy_loss_function",
    "reduce_train_step_metrics",
    "sft_loss_function",
    "value_loss_function",
    "vanilla_tis_function",
]


def get_responses(
    logits: Tensor, *, tokens: Sequence[Tensor], total_lengths: Sequence[int], response_lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The rows of packed logits [1, T, V] that predict response tokens, and those tokens: [N, V] and [N].

    Raises:
        ValueError: under context parallelism, where a rank does not hold the whole sequences.
    """
    if get_context_parallel().size > 1:
        raise ValueError(
            "Losses on logits are not available under context parallelism: each rank holds parts of the sequences. "
            "Use --context-parallel-size 1, or slice with slime.backends.megatron_utils.cp_utils."
        )
    rows: list[Tensor] = []
    targets: list[Tensor] = []
    end = 0
    for ids, total, response in zip(tokens, total_lengths, response_lengths, strict=True):
        end += total
        if response > 0:
            rows.append(logits[0, end - response - 1 : end - 1])
            targets.append(ids[total - response :])
    if not rows:
        return logits[0, :0], torch.zeros(0, dtype=torch.long, device=logits.device)
    return torch.cat(rows), torch.cat(targets)


def policy_loss_function(
    args: Namespace, batch: Mapping[str, Any], logits: Tensor, sum_of_sample_mean: Reducer
) -> tuple[Tensor, Metrics]:
    """`slime.algorithm.loss.policy_loss` on logits."""
    log_probs, entropy = _log_probs_and_entropy(args, batch, logits, with_entropy=True)
    return policy_loss(args, batch, log_probs, entropy, sum_of_sample_mean)


def sft_loss_function(
    args: Namespace, batch: Mapping[str, Any], logits: Tensor, sum_of_sample_mean: Reducer
) -> tuple[Tensor, Metrics]:
    """`slime.algorithm.loss.sft_loss` on logits."""
    log_probs, _ = _log_probs_and_entropy(args, batch, logits, with_entropy=False)
    return sft_loss(args, batch, log_probs, None, sum_of_sample_mean)


def value_loss_function(
    args: Namespace, batch: Mapping[str, Any], logits: Tensor, sum_of_sample_mean: Reducer
) -> tuple[Tensor, Metrics]:
    """`slime.algorithm.loss.value_loss` on the value head's output [1, T, 1]."""
    rows, _ = get_responses(logits, **_layout(batch))
    return value_loss(args, batch, rows.float().squeeze(-1), sum_of_sample_mean)


def _log_probs_and_entropy(
    args: Namespace, batch: Mapping[str, Any], logits: Tensor, *, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    rows, targets = get_responses(logits, **_layout(batch))
    log_probs, entropy = calculate_log_probs_and_entropy(
        rows.float() / args.rollout_temperature,
        targets,
        None,
        with_entropy=with_entropy,
        chunk_size=args.log_probs_chunk_size,
        with_entropy_grad=with_entropy and args.entropy_coef != 0,
    )
    return log_probs.flatten(), entropy


def _layout(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "tokens": batch["tokens"],
        "total_lengths": batch["total_lengths"],
        "response_lengths": batch["response_lengths"],
    }
