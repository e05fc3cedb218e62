"""Dynamic filters that come with slime (DAPO's dynamic sampling, arXiv:2503.14476, section 3.2)."""

import math
from argparse import Namespace
from dataclasses import replace
from typing import Any

from slime.rollout.base_types import flatten_samples
from slime.rollout.filter_hub.base_types import DynamicFilterOutput
from slime.utils.types import Sample

_SMALLEST_STD = 1e-6  # below it the group's advantages are rounding noise


def check_reward_nonzero_std(args: Namespace, samples: list[Sample], **kwargs: Any) -> DynamicFilterOutput:
    """Keep groups whose rewards differ: where all are equal, group-relative advantages are zero."""
    rewards = [float(sample.get_reward_value(args)) for sample in flatten_samples(samples)]
    mean = math.fsum(rewards) / len(rewards)
    squares = math.fsum((reward - mean) ** 2 for reward in rewards)
    std = math.sqrt(squares / (len(rewards) - 1)) if len(rewards) > 1 else 0.0
    keep = std > _SMALLEST_STD
    return DynamicFilterOutput(keep=keep, reason=None if keep else f"zero_std_{round(rewards[0], 1)}")


def check_reward_nonzero_std_with_fallback(
    args: Namespace, samples: list[Sample], **kwargs: Any
) -> DynamicFilterOutput:
    """The same, but a group is kept when the batch could not be filled without it."""
    return replace(check_reward_nonzero_std(args, samples, **kwargs), keep_when_insufficient=True)
