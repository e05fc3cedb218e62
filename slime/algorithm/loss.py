"""The loss of a micro-batch, by the run's flags, from log-probs (or values) that the trainer has computed.

Letters: N response tokens of the micro-batch on one flat axis (`slime.data.packing`), R_i of sample i. A batch is a
dict of lists with one [R_i] tensor per sample: advantages, loss_masks (of whole responses), log_probs (under the policy
that made the rollout), ref_log_probs, rollout_log_probs, values, returns; and total_lengths, response_lengths,
rollout_mask_sums. A loss function returns the sum that a step averages (`slime.losses.aggregation`) and metrics: 0-dim
tensors without gradient, summed in the same way, always under the same names in the same order.
"""

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slime.algorithm.corrections import correction_function
from slime.data.context_parallel import ContextParallel
from slime.losses.aggregation import Reducer
from slime.losses.kl import compute_approx_kl
from slime.losses.policy import (
    cispo_loss,
    clipped_policy_loss,
    gspo_log_ratios,
    masked_mean_difference,
    opsm_mask,
)
from slime.losses.value import clipped_value_loss
from slime.utils.misc import load_function

Metrics = dict[str, Tensor]
LossFunction = Callable[..., tuple[Tensor, Metrics]]


def get_loss_function(args: Namespace) -> LossFunction:
    """The function of `--loss-type`.

    `policy_loss` and `sft_loss` take (args, batch, log_probs [N], entropy [N] or None, sum_of_sample_mean),
    `value_loss` (args, batch, values [N], sum_of_sample_mean), a custom loss (args, batch, logits, sum_of_sample_mean).
    """
    if args.loss_type == "custom_loss":
        if not args.custom_loss_function_path:
            raise ValueError("--loss-type custom_loss needs --custom-loss-function-path.")
        function: LossFunction = load_function(args.custom_loss_function_path)
        return function
    built_in: dict[str, LossFunction] = {"policy_loss": policy_loss, "value_loss": value_loss, "sft_loss": sft_loss}
    if args.loss_type not in built_in:
        raise ValueError(
            f"Unknown loss type {args.loss_type!r}: policy_loss, sft_loss or custom_loss (value_loss for the critic)."
        )
    return built_in[args.loss_type]


def policy_loss(
    args: Namespace,
    batch: Mapping[str, Any],
    log_probs: Tensor,
    entropy: Tensor | None,
    sum_of_sample_mean: Reducer,
    *,
    context_parallel: ContextParallel | None = None,
) -> tuple[Tensor, Metrics]:
    """Policy gradient loss, minus entropy bonus, plus KL to the reference.

    Args:
        args: the algorithm's flags.
        batch: see the module.
        log_probs: [N] nats under the policy being trained; carries the gradient.
        entropy: [N] nats; with gradient if `entropy_coef` is not 0. None leaves the metric out.
        sum_of_sample_mean: over the tokens of this rank.
        context_parallel: this rank's place in it, for losses that need whole sequences.

    Returns:
        the loss and the metrics loss, pg_loss, entropy_loss, pg_clipfrac, ppo_kl, and with what the flags turn on:
        train_rollout_logprob_abs_diff, kl_loss, ois and those of the correction, opsm_clipfrac, opd_reverse_kl.
    """
    cp = context_parallel or ContextParallel()
    tokens = _flat_tokens(args, batch, log_probs)
    log_ratio = _log_ratio(args, batch, tokens, cp)
    pg_loss, is_clipped = _surrogate(args, tokens, log_ratio)

    optional: Metrics = {}
    opsm_metrics: Metrics = {}
    if args.use_opsm:
        dropped = _off_policy_tokens(args, batch, tokens, cp)
        pg_loss = pg_loss.masked_fill(dropped, 0.0)
        opsm_metrics["opsm_clipfrac"] = sum_of_sample_mean(dropped.float())
    reduce = reduce_pg = sum_of_sample_mean
    if args.use_tis or args.get_mismatch_metrics:
        pg_loss, masks, per_token = _corrected(args, batch, pg_loss, tokens)
        optional["ois"] = sum_of_sample_mean(torch.exp(log_ratio))
        optional |= {name: sum_of_sample_mean(values) for name, values in per_token.items()}
        reduce = reduce_pg = _reducer(args, batch, masks, cp)
        batch = {**batch, "loss_masks": masks}
    if args.custom_pg_loss_reducer_function_path is not None:
        reduce_pg = load_function(args.custom_pg_loss_reducer_function_path)(
            batch["total_lengths"], batch["response_lengths"], batch["loss_masks"], args.calculate_per_token_loss
        )

    pg_sum = reduce_pg(pg_loss)
    loss = pg_sum
    metrics: Metrics = {"pg_loss": pg_sum}
    if entropy is not None:
        metrics["entropy_loss"] = reduce(entropy)
        loss = loss - args.entropy_coef * metrics["entropy_loss"]
    elif args.entropy_coef != 0:
        raise ValueError(f"--entropy-coef {args.entropy_coef} needs the entropy of each token, which was not computed.")
    metrics["pg_clipfrac"] = reduce(is_clipped.float())
    metrics["ppo_kl"] = reduce(-log_ratio)
    if tokens.rollout is not None:
        against = tokens.current.detach() if args.use_rollout_logprobs else tokens.trained_before
        metrics["train_rollout_logprob_abs_diff"] = sum_of_sample_mean((against - tokens.rollout).abs())
    if args.use_kl_loss:
        metrics["kl_loss"] = reduce(_kl_to_reference(args, batch, tokens))
        loss = loss + args.kl_loss_coef * metrics["kl_loss"]
    optional |= opsm_metrics
    if batch.get("opd_reverse_kl") is not None:
        optional["opd_reverse_kl"] = sum_of_sample_mean(torch.cat(batch["opd_reverse_kl"]))
    return loss, _detached({"loss": loss} | metrics | optional)


def value_loss(
    args: Namespace, batch: Mapping[str, Any], values: Tensor, sum_of_sample_mean: Reducer
) -> tuple[Tensor, Metrics]:
    """The critic's clipped squared error against the returns.

    Args:
        batch: needs values (before the update) and returns.
        values: [N] from the critic being trained; carries the gradient.

    Returns:
        the loss and the metrics value_loss and value_clipfrac.
    """
    old_values, returns = torch.cat(batch["values"]), torch.cat(batch["returns"])
    per_token, is_clipped = clipped_value_loss(values, old_values, returns, clip_distance=args.value_clip)
    loss = sum_of_sample_mean(per_token)
    return loss, _detached({"value_loss": loss, "value_clipfrac": sum_of_sample_mean(is_clipped.float())})


def sft_loss(
    args: Namespace,
    batch: Mapping[str, Any],
    log_probs: Tensor,
    entropy: Tensor | None,
    sum_of_sample_mean: Reducer,
    **kwargs: Any,
) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood of the response; arguments as in `policy_loss`. The only metric is loss."""
    loss = -sum_of_sample_mean(log_probs)
    return loss, _detached({"loss": loss})


@dataclass(frozen=True)
class _FlatTokens:
    """Log-probs [N] of the micro-batch's tokens in nats, and their advantages.

    Attributes:
        current: under the policy being trained, with gradient.
        trained_before: by the trainer under the policy that made the rollout, or current ones without gradient where
            that is the same (on-policy steps compute no second forward pass).
        old: what the importance ratio compares with: `trained_before`, or the engine's with use_rollout_logprobs.
        rollout: by the engine; None if it recorded none.
        advantages: in units of reward.
    """

    current: Tensor
    trained_before: Tensor
    old: Tensor
    rollout: Tensor | None
    advantages: Tensor


def _flat_tokens(args: Namespace, batch: Mapping[str, Any], log_probs: Tensor) -> _FlatTokens:
    rollout = _flat(batch, "rollout_log_probs")
    trained_before = _flat(batch, "log_probs")
    if trained_before is None:
        trained_before = log_probs.detach()
    old = trained_before
    if args.use_rollout_logprobs:
        if rollout is None:
            raise ValueError("--use-rollout-logprobs needs rollout_log_probs, and this batch has none.")
        old = rollout
    return _FlatTokens(log_probs, trained_before, old, rollout, torch.cat(batch["advantages"]))


def _flat(batch: Mapping[str, Any], key: str) -> Tensor | None:
    """None where the rollout does not have it, or not for the samples of this step."""
    values = batch.get(key)
    return None if values is None or any(value is None for value in values) else torch.cat(values)


def _log_ratio(args: Namespace, batch: Mapping[str, Any], tokens: _FlatTokens, cp: ContextParallel) -> Tensor:
    """[N] log of the importance ratio, per token, or per sequence for GSPO. Carries the gradient."""
    if args.advantage_estimator != "gspo":
        return tokens.current - tokens.old
    new, old = _whole(batch, tokens.current, cp), _whole(batch, tokens.old, cp)
    ratios = gspo_log_ratios(new, old, batch["loss_masks"])
    lengths = zip(ratios, batch["total_lengths"], batch["response_lengths"], strict=True)
    return torch.cat([cp.slice_response(ratio, total, response) for ratio, total, response in lengths])


def _surrogate(args: Namespace, tokens: _FlatTokens, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """[N] policy loss and where it was clipped."""
    eps_clip_high = args.eps_clip if args.eps_clip_high is None else args.eps_clip_high
    clip_range = (1 - args.eps_clip, 1 + eps_clip_high)
    if args.advantage_estimator == "cispo":
        return cispo_loss(tokens.current, tokens.old, tokens.advantages, clip_range=clip_range)
    return clipped_policy_loss(
        log_ratio, torch.zeros_like(log_ratio), tokens.advantages, clip_range=clip_range, dual_clip=args.eps_clip_c
    )


def _off_policy_tokens(args: Namespace, batch: Mapping[str, Any], tokens: _FlatTokens, cp: ContextParallel) -> Tensor:
    """[N] bool, what off-policy sequence masking leaves out."""
    new, old = _whole(batch, tokens.current.detach(), cp), _whole(batch, tokens.old, cp)
    dropped = [
        opsm_mask(advantages, masked_mean_difference(o, n, mask), delta=args.opsm_delta)
        for advantages, o, n, mask in zip(batch["advantages"], old, new, batch["loss_masks"], strict=True)
    ]
    return torch.cat(dropped)


def _corrected(
    args: Namespace, batch: Mapping[str, Any], pg_loss: Tensor, tokens: _FlatTokens
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """The loss corrected for the engine's log-probs, the masks to average it with, and metrics per token."""
    if batch.get("rollout_log_probs") is None:
        raise ValueError(
            "--use-tis and --get-mismatch-metrics compare with the engine's log-probs (rollout_log_probs), and this "
            "batch has none: the generate function must record them."
        )
    lengths = [t.numel() for t in batch["rollout_log_probs"]]
    return correction_function(args)(
        args=args,
        pg_loss=pg_loss,
        train_log_probs=list(torch.split(tokens.trained_before, lengths)),
        rollout_log_probs=batch["rollout_log_probs"],
        loss_masks=batch["loss_masks"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
    )


def _reducer(args: Namespace, batch: Mapping[str, Any], loss_masks: list[Tensor], cp: ContextParallel) -> Reducer:
    """As the batch's own reducer, but with other masks: a rejected token still counts in the denominator."""
    denominators = batch.get("rollout_mask_sums")
    if denominators is None:
        denominators = torch.stack([mask.sum() for mask in batch["loss_masks"]])
    return cp.get_sum_of_sample_mean(
        batch["total_lengths"], batch["response_lengths"], loss_masks, denominators, args.calculate_per_token_loss
    )


def _kl_to_reference(args: Namespace, batch: Mapping[str, Any], tokens: _FlatTokens) -> Tensor:
    """[N] KL of the current policy to the reference, with gradient."""
    reference = _flat(batch, "ref_log_probs")
    if reference is None:
        raise ValueError(
            "--use-kl-loss needs the log-probs of the reference model (ref_log_probs), and this batch has none."
        )
    importance_ratio = torch.exp(tokens.current - tokens.old) if args.use_unbiased_kl else None
    return compute_approx_kl(tokens.current, reference, args.kl_loss_type, importance_ratio)


def _whole(batch: Mapping[str, Any], flat: Tensor, cp: ContextParallel) -> list[Tensor]:
    """Flat tokens of this rank to one whole response [R_i] per sample."""
    lengths = list(zip(batch["total_lengths"], batch["response_lengths"], strict=True))
    local = torch.split(flat, [cp.local_response_length(total, response) for total, response in lengths])
    return [cp.gather_response(part, *length) for part, length in zip(local, lengths, strict=True)]


def _detached(metrics: Metrics) -> Metrics:
    return {name: value.detach() for name, value in metrics.items()}
