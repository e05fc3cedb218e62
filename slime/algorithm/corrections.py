"""Corrections for the difference between trainer and engine, in the form of a `--custom-tis-function-path` plug-in."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from slime.losses.corrections import icepop_weights, truncated_importance_weights
from slime.utils.misc import load_function

Correction = tuple[Tensor, list[Tensor], dict[str, Tensor]]


def vanilla_tis_function(
    args: Namespace,
    *,
    pg_loss: Tensor,
    train_log_probs: Sequence[Tensor],
    rollout_log_probs: Sequence[Tensor],
    loss_masks: list[Tensor],
    **kwargs: Any,
) -> Correction:
    """Truncated importance sampling: the loss of each token times its ratio clamped to [tis_clip_low, tis_clip].

    Args:
        pg_loss: [N] policy loss per token.
        train_log_probs: per sample, nats, by the trainer under the weights of the rollout.
        rollout_log_probs: per sample, nats, by the engine.
        loss_masks: per sample; returned as they are.

    Returns:
        corrected loss [N], loss masks, and per token: `tis` the raw ratio, `tis_clipfrac` where it was clamped,
        `tis_abs` its distance from 1.
    """
    return _weighted(truncated_importance_weights, args, pg_loss, train_log_probs, rollout_log_probs, loss_masks)


def icepop_function(
    args: Namespace,
    *,
    pg_loss: Tensor,
    train_log_probs: Sequence[Tensor],
    rollout_log_probs: Sequence[Tensor],
    loss_masks: list[Tensor],
    **kwargs: Any,
) -> Correction:
    """IcePop: a token whose ratio lies outside [tis_clip_low, tis_clip] is left out, others are weighted with it.

    Arguments and result as in `vanilla_tis_function`.
    """
    return _weighted(icepop_weights, args, pg_loss, train_log_probs, rollout_log_probs, loss_masks)


def correction_function(args: Namespace) -> Callable[..., Correction]:
    """The user's function, or truncated importance sampling."""
    if args.custom_tis_function_path is not None:
        function: Callable[..., Correction] = load_function(args.custom_tis_function_path)
        return function
    return vanilla_tis_function


def _weighted(
    weigh: Callable[..., tuple[Tensor, Tensor]],
    args: Namespace,
    pg_loss: Tensor,
    train_log_probs: Sequence[Tensor],
    rollout_log_probs: Sequence[Tensor],
    loss_masks: list[Tensor],
) -> Correction:
    clip_range = (args.tis_clip_low, args.tis_clip)
    weights, ratio = weigh(torch.cat(list(train_log_probs)), torch.cat(list(rollout_log_probs)), clip_range=clip_range)
    metrics = {"tis": ratio, "tis_clipfrac": (weights != ratio).float(), "tis_abs": (ratio - 1).abs()}
    return pg_loss * weights, loss_masks, metrics
