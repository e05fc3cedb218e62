"""From the rewards that samples carry to the rewards that train: group normalisation, or a hook of the user."""

import logging
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch

from slime.losses.advantages import group_normalize
from slime.utils.misc import load_function
from slime.utils.types import Sample

logger = logging.getLogger(__name__)

NORMALIZED_ESTIMATORS = ("grpo", "gspo", "cispo", "reinforce_plus_plus_baseline")
"""Estimators whose baseline is the mean of the group."""

STD_NORMALIZED_ESTIMATORS = ("grpo", "gspo", "cispo")
"""Of these, the ones that also divide by the deviation of the group (unless --disable-grpo-std-normalization)."""


def post_process_rewards(args: Namespace, samples: Sequence[Sample]) -> tuple[list[Any], list[float]]:
    """Raw rewards and training rewards, one each per sample.

    Samples must come group by group, `n_samples_per_prompt` each. If their number is not that of a whole rollout (a
    generate function that returns several samples for one), groups cannot be told apart by position and all samples
    are normalised as one group; `--custom-reward-post-process-path` is the place to do better.

    Raises:
        ValueError: a sample without a numeric reward, or a hook that returns lists of another length.
    """
    if args.custom_reward_post_process_path is not None:
        return _custom_rewards(args, samples)
    raw = [_numeric_reward(args, i, sample) for i, sample in enumerate(samples)]
    if not (args.advantage_estimator in NORMALIZED_ESTIMATORS and args.rewards_normalization) or not raw:
        return raw, raw
    rewards = torch.tensor(raw, dtype=torch.float64)
    if len(raw) == args.n_samples_per_prompt * args.rollout_batch_size:
        rewards = rewards.view(-1, args.n_samples_per_prompt)
    else:
        logger.warning(
            "%d samples are not --rollout-batch-size %d x --n-samples-per-prompt %d: their rewards are normalised as "
            "one group. Give --custom-reward-post-process-path to group them otherwise.",
            len(raw),
            args.rollout_batch_size,
            args.n_samples_per_prompt,
        )
        rewards = rewards.view(1, -1)
    divide_by_std = args.advantage_estimator in STD_NORMALIZED_ESTIMATORS and args.grpo_std_normalization
    return raw, [float(r) for r in group_normalize(rewards, divide_by_std=divide_by_std).flatten()]


def _custom_rewards(args: Namespace, samples: Sequence[Sample]) -> tuple[list[Any], list[float]]:
    path = args.custom_reward_post_process_path
    result = load_function(path)(args, samples)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise ValueError(f"{path} must return (raw_rewards, rewards), two lists; it returned {type(result).__name__}.")
    raw, rewards = (list(part) for part in result)
    if len(raw) != len(samples) or len(rewards) != len(samples):
        raise ValueError(
            f"{path} got {len(samples)} samples but returned {len(raw)} raw rewards and {len(rewards)} rewards; "
            "both lists need one entry per sample."
        )
    return raw, rewards


def _numeric_reward(args: Namespace, position: int, sample: Sample) -> float:
    reward = sample.get_reward_value(args)
    try:
        return float(reward)
    except (TypeError, ValueError):
        keys = (
            f" (its keys: {', '.join(map(str, reward))}; choose one with --reward-key)"
            if isinstance(reward, dict)
            else ""
        )
        raise ValueError(
            f"Sample {sample.index} (number {position} of the rollout, status {sample.status.value}) has the reward "
            f"{reward!r}, which is not a number{keys}. Every trained sample needs one from the reward function."
        ) from None
