"""Importance weights that correct for an inference engine whose log-probs differ from the trainer's.

Letters: N response tokens. The ratio of a token is exp(train_log_probs - rollout_log_probs): the probability that the
trainer gives a token under the weights that generated it, over the one that the engine sampled it with.
"""

import torch
from torch import Tensor


def truncated_importance_weights(
    train_log_probs: Tensor, rollout_log_probs: Tensor, *, clip_range: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Truncated importance sampling: the ratio clamped to `clip_range`.

    Source: F. Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (2025); the
    truncation is Ionides' (J. Comput. Graph. Stat. 17, 2008).

    Args:
        train_log_probs: [N] nats.
        rollout_log_probs: [N] nats.
        clip_range: least and greatest weight, e.g. (0, 2).

    Returns:
        weights [N] and raw ratios [N]; neither carries a gradient.
    """
    ratio = torch.exp(train_log_probs - rollout_log_probs).detach()
    return ratio.clamp(*clip_range), ratio


def icepop_weights(
    train_log_probs: Tensor, rollout_log_probs: Tensor, *, clip_range: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """IcePop: the ratio where it is within `clip_range`, else 0, so that a badly mismatched token is left out.

    Source: Ling team, "Small Leak Can Sink a Great Ship" (2025). Args and returns as in `truncated_importance_weights`.
    """
    ratio = torch.exp(train_log_probs - rollout_log_probs).detach()
    is_inside = (ratio >= clip_range[0]) & (ratio <= clip_range[1])
    return torch.where(is_inside, ratio, 0.0), ratio
