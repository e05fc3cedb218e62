"""Advantages and returns of a rollout, by the run's estimator.

Letters: R_i response tokens of sample i. Everything per token is a list with one tensor per sample; under context
parallelism each holds the tokens of this rank, while loss masks are always those of the whole response.
"""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slime.data.context_parallel import ContextParallel
from slime.losses.advantages import chunked_discounted_returns, chunked_gae
from slime.losses.kl import compute_approx_kl
from slime.utils.distributed_utils import distributed_masked_whiten
from slime.utils.misc import load_function

Tensors = list[Tensor]


def compute_advantages_and_returns(
    args: Namespace,
    rollout_data: dict[str, Any],
    *,
    process_group: dist.ProcessGroup | None = None,
    context_parallel: ContextParallel | None = None,
) -> None:
    """Add `kl`, `advantages` and `returns` (lists of [R_i]) to the data of a rollout, in place.

    Args:
        args: the algorithm's flags: advantage_estimator, kl_coef, kl_loss_type, gamma, lambd, use_opd, opd_kl_coef,
            normalize_advantages, use_rollout_logprobs, custom_advantage_function_path.
        rollout_data: needs rewards, response_lengths, total_lengths, loss_masks; log_probs, ref_log_probs, values,
            rollout_log_probs, teacher_log_probs where the estimator uses them.
        process_group: data- and context-parallel ranks that whiten together (`normalize_advantages`); every one of them
            must make this call. None: all ranks, or this process alone.
        context_parallel: this rank's place in it; None: no context parallelism.

    Raises:
        ValueError: something that the estimator needs is missing.
    """
    cp = context_parallel or ContextParallel()
    log_probs = rollout_data.get("rollout_log_probs" if args.use_rollout_logprobs else "log_probs")
    kl = _kl_to_reference(args, rollout_data, log_probs, cp)
    rollout_data["kl"] = kl
    if args.custom_advantage_function_path is not None:
        advantages, returns = _custom(args, rollout_data)
    else:
        try:
            estimator = ESTIMATORS[args.advantage_estimator]
        except KeyError:
            raise ValueError(
                f"Unknown advantage estimator {args.advantage_estimator!r}; choose one of {', '.join(ESTIMATORS)}."
            ) from None
        advantages, returns = estimator(args, rollout_data, kl, cp)
    if args.use_opd and log_probs is not None:
        advantages = _distil(args, rollout_data, log_probs, advantages)
    if args.normalize_advantages:
        advantages = _whitened(rollout_data, advantages, process_group, cp)
    rollout_data["advantages"] = advantages
    rollout_data["returns"] = returns


def _kl_to_reference(args: Namespace, data: dict[str, Any], log_probs: Tensors | None, cp: ContextParallel) -> Tensors:
    """Per-token KL to the reference; zeros of the responses' shapes where no KL enters the reward."""
    if args.kl_coef == 0 or log_probs is None:
        like = next((data[k] for k in ("log_probs", "rollout_log_probs", "values") if data.get(k) is not None), None)
        if like is None:
            like = _local_masks(data, cp)
        return [torch.zeros_like(t, dtype=torch.float32) for t in like]
    if data.get("ref_log_probs") is None:
        raise ValueError(
            f"--kl-coef {args.kl_coef} needs the log-probs of the reference model (ref_log_probs), and this rollout "
            "has none. Give --ref-load, or --kl-coef 0."
        )
    return [
        compute_approx_kl(new, base, args.kl_loss_type)
        for new, base in zip(log_probs, data["ref_log_probs"], strict=True)
    ]


def _custom(args: Namespace, data: dict[str, Any]) -> tuple[Tensors, Tensors]:
    load_function(args.custom_advantage_function_path)(args, data)
    missing = [key for key in ("advantages", "returns") if data.get(key) is None]
    if missing:
        raise ValueError(
            f"{args.custom_advantage_function_path} must set rollout_data['advantages'] and ['returns'], lists with "
            f"one tensor per sample; it did not set {' and '.join(missing)}."
        )
    return list(data["advantages"]), list(data["returns"])


def _group_relative(args: Namespace, data: dict[str, Any], kl: Tensors, cp: ContextParallel) -> tuple[Tensors, Tensors]:
    """GRPO (arXiv:2402.03300), GSPO, CISPO: the (group-normalised) reward of a sample for each of its tokens."""
    returns = [torch.full_like(k, float(reward)) for k, reward in zip(kl, data["rewards"], strict=True)]
    return list(returns), returns


def _reinforce_plus_plus_baseline(
    args: Namespace, data: dict[str, Any], kl: Tensors, cp: ContextParallel
) -> tuple[Tensors, Tensors]:
    """REINFORCE++ with the group mean as baseline (arXiv:2501.03262): reward minus the KL penalty of each token."""
    advantages = [float(reward) - args.kl_coef * k for k, reward in zip(kl, data["rewards"], strict=True)]
    return advantages, list(advantages)


def _reinforce_plus_plus(
    args: Namespace, data: dict[str, Any], kl: Tensors, cp: ContextParallel
) -> tuple[Tensors, Tensors]:
    """REINFORCE++ (arXiv:2501.03262): discounted sum of KL penalties, the reward standing at the last trained token.

    A sample without any trained token has no place for its reward, so its returns are 0.
    """
    rewards = _whole_responses(data, kl, cp)
    for row, mask, reward in zip(rewards, data["loss_masks"], data["rewards"], strict=True):
        row *= -args.kl_coef * mask.to(row.device)
        trained = mask.nonzero()
        if trained.numel():
            row[trained[-1]] += float(reward)
    returns = chunked_discounted_returns(_padded(rewards), args.gamma)
    local = _unpadded(data, returns, cp)
    return local, list(local)


def _ppo(args: Namespace, data: dict[str, Any], kl: Tensors, cp: ContextParallel) -> tuple[Tensors, Tensors]:
    """PPO with a critic: GAE over the KL penalties, the reward standing at the last token (arXiv:1506.02438)."""
    if data.get("values") is None:
        raise ValueError("--advantage-estimator ppo needs the critic's values, and this rollout has none.")
    rewards = _whole_responses(data, kl, cp)
    for row, reward in zip(rewards, data["rewards"], strict=True):
        row *= -args.kl_coef
        if row.numel():
            row[-1] += float(reward)
    values = _padded(_whole_responses(data, data["values"], cp))
    advantages, returns = chunked_gae(_padded(rewards), values, args.gamma, args.lambd)
    return _unpadded(data, advantages, cp), _unpadded(data, returns, cp)


Estimator = Callable[[Namespace, dict[str, Any], Tensors, ContextParallel], tuple[Tensors, Tensors]]
ESTIMATORS: dict[str, Estimator] = {
    "grpo": _group_relative,
    "gspo": _group_relative,
    "cispo": _group_relative,
    "reinforce_plus_plus": _reinforce_plus_plus,
    "reinforce_plus_plus_baseline": _reinforce_plus_plus_baseline,
    "ppo": _ppo,
}


def _distil(args: Namespace, data: dict[str, Any], log_probs: Tensors, advantages: Tensors) -> Tensors:
    """On-policy distillation: each token pays its reverse KL to the teacher. Adds `opd_reverse_kl` to the data."""
    if data.get("teacher_log_probs") is None:
        raise ValueError(
            "--use-opd needs teacher_log_probs, and this rollout has none. With --opd-type sglang the reward function "
            "sets them (slime.rollout.on_policy_distillation); with megatron give --opd-teacher-load."
        )
    pairs = zip(log_probs, data["teacher_log_probs"], strict=True)
    reverse_kl = [student - teacher.to(student) for student, teacher in pairs]
    data["opd_reverse_kl"] = reverse_kl
    return [a - args.opd_kl_coef * k for a, k in zip(advantages, reverse_kl, strict=True)]


def _whitened(
    data: dict[str, Any], advantages: Tensors, process_group: dist.ProcessGroup | None, cp: ContextParallel
) -> Tensors:
    """Advantages with mean 0 and variance 1 over the trained tokens of all ranks."""
    nothing = [torch.zeros(0)]  # a rank may have no samples or no tokens, and still takes part
    flat, mask = torch.cat(advantages or nothing), torch.cat(_local_masks(data, cp) or nothing)
    return list(torch.split(distributed_masked_whiten(flat, mask, process_group), [a.numel() for a in advantages]))


def _local_masks(data: dict[str, Any], cp: ContextParallel) -> Tensors:
    lengths = zip(data["loss_masks"], *_lengths(data), strict=True)
    return [cp.slice_response(mask, total, response) for mask, total, response in lengths]


def _lengths(data: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Total and response lengths; the totals only matter (and only exist for sure) under context parallelism."""
    responses = data.get("response_lengths") or [mask.numel() for mask in data["loss_masks"]]
    return data.get("total_lengths") or responses, responses


def _whole_responses(data: dict[str, Any], local: Tensors, cp: ContextParallel) -> Tensors:
    """Per sample a new float32 [R_i] of the whole response."""
    lengths = zip(local, *_lengths(data), strict=True)
    return [cp.gather_response(t.float(), total, response).clone() for t, total, response in lengths]


def _padded(rows: Tensors) -> Tensor:
    """[B, T] with zeros on the right."""
    if not rows:
        return torch.zeros(0, 0)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _unpadded(data: dict[str, Any], padded: Tensor, cp: ContextParallel) -> Tensors:
    """This rank's part of each row of [B, T]."""
    lengths = zip(padded, *_lengths(data), strict=True)
    return [cp.slice_response(row[:response], total, response) for row, total, response in lengths]
