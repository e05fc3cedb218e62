"""The critic's loss. Letters: N response tokens; values and returns are in units of reward."""

import torch
from torch import Tensor


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip_distance: float
) -> tuple[Tensor, Tensor]:
    """Squared error of the value with PPO's clip, per token (arXiv:2005.12729, section 3; without the factor 1/2).

    Args:
        values: [N] from the critic being trained; carries the gradient.
        old_values: [N] from the critic at the time of the rollout.
        returns: [N] targets.
        clip_distance: how far a value may move from its old one before its gradient ends.

    Returns:
        loss [N], and is_clipped [N] bool: where the clipped error was the larger one.
    """
    clipped_values = old_values + (values - old_values).clamp(-clip_distance, clip_distance)
    error = (values - returns) ** 2
    clipped_error = (clipped_values - returns) ** 2
    return torch.maximum(error, clipped_error), clipped_error > error
