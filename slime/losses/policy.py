"""Policy losses per token: PPO's clipped surrogate, dual clip, CISPO, GSPO's sequence ratio, sequence masking, SFT.

Letters: N response tokens of a micro-batch on one flat axis; R_i tokens of sample i. `log_probs` are in nats under the
policy being trained and carry the gradient; `old_log_probs` under the policy that made the rollout. The importance
ratio is exp(log_probs - old_log_probs). Losses are per token; the caller averages them (`slime.losses.aggregation`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def clipped_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_range: tuple[float, float],
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate, per token (arXiv:1707.06347, eq. 7).

    Args:
        log_probs: [N] nats, under the policy being trained; carries the gradient.
        old_log_probs: [N] nats, under the policy that made the rollout.
        advantages: [N] in units of reward.
        clip_range: bounds of the importance ratio, e.g. (0.8, 1.2); unequal distances from 1 are DAPO's clip-higher
            (arXiv:2503.14476, section 3.1).
        dual_clip: c > 1 bounds the loss of a bad action at c * |advantage| (dual-clip PPO, arXiv:1912.09729).

    Returns:
        loss [N], and is_clipped [N] bool: where the clipped term was the larger one.

    Raises:
        ValueError: `dual_clip` that is not above 1.
    """
    if dual_clip is not None and dual_clip <= 1.0:
        raise ValueError(f"Dual clip (--eps-clip-c) must be above 1, got {dual_clip}; 3.0 is usual.")
    ratio = torch.exp(log_probs - old_log_probs)
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(*clip_range) * advantages
    loss = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(-dual_clip * advantages, loss), loss)
    return loss, clipped > unclipped


def cispo_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, *, clip_range: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """CISPO: policy gradient weighted with the clipped ratio as a constant, so no token loses its gradient
    (MiniMax-M1, arXiv:2506.13585, section 3.1).

    Args and returns as in `clipped_policy_loss`; is_clipped is where the clip changed the ratio. (A lower bound of 0 or
    less, `--eps-clip` of 1 or more, is the paper's own setting: it clips from above only.)
    """
    ratio = torch.exp(log_probs - old_log_probs)
    clipped = ratio.clamp(*clip_range)
    return -clipped.detach() * advantages * log_probs, clipped != ratio


def masked_mean_difference(old_log_probs: Tensor, log_probs: Tensor, loss_mask: Tensor) -> Tensor:
    """Mean over the trained tokens of one sample of old_log_probs - log_probs: [R_i] each -> 0-dim, in nats.

    An estimate of the KL divergence per token of the sequence, and minus the logarithm of GSPO's ratio. 0 for a sample
    without trained tokens.
    """
    mask = loss_mask.to(log_probs.dtype)
    return ((old_log_probs - log_probs) * mask).sum() / mask.sum().clamp(min=1)


def gspo_log_ratios(
    log_probs: Sequence[Tensor], old_log_probs: Sequence[Tensor], loss_masks: Sequence[Tensor]
) -> list[Tensor]:
    """log s_i of GSPO's sequence ratio, repeated for each token of a sample (arXiv:2507.18071, eq. 7).

    s_i = exp(mean over trained tokens of (log_probs - old_log_probs)). `clipped_policy_loss` with this for the
    log-probs and zeros for the old ones is GSPO's loss; its gradient flows through s_i to each trained token.

    Args:
        log_probs: per sample [R_i], of the whole response.
        old_log_probs: per sample [R_i].
        loss_masks: per sample [R_i].

    Returns:
        per sample [R_i].
    """
    return [
        -masked_mean_difference(old, new, mask).expand_as(new)
        for new, old, mask in zip(log_probs, old_log_probs, loss_masks, strict=True)
    ]


def opsm_mask(advantages: Tensor, sequence_kl: Tensor, *, delta: float) -> Tensor:
    """Off-policy sequence masking: which tokens of a sample to leave out, [R_i] bool (DeepSeek-V3.2, arXiv:2512.02556).

    Bad actions (negative advantage) of a sequence that the current policy would hardly produce any more
    (`sequence_kl` > delta) teach nothing.

    Args:
        advantages: [R_i].
        sequence_kl: 0-dim, from `masked_mean_difference`.
        delta: nats per token.
    """
    return (advantages < 0) & (sequence_kl > delta)
