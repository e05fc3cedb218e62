"""The samples of an evaluation task: made from its prompts, and read off for their rewards."""

import copy
from argparse import Namespace
from typing import Any

from slime.utils.eval_config import EvalDatasetConfig
from slime.utils.types import Sample


def eval_sample(prompt: Sample, config: EvalDatasetConfig, group_index: int, index: int) -> Sample:
    """A sample of its own for one answer to `prompt`, with the task's metadata and functions."""
    sample = copy.deepcopy(prompt)
    sample.group_index = group_index
    sample.index = index
    sample.metadata = config.inject_metadata(sample.metadata)
    sample.custom_rm_path = config.custom_rm_path
    sample.generate_function_path = config.custom_generate_function_path
    return sample


def eval_reward(args: Namespace, task: str, sample: Sample) -> Any:
    """The number that counts: the reward, or its entry `--eval-reward-key`.

    Raises:
        ValueError: there is none.
    """
    key = getattr(args, "eval_reward_key", None) or getattr(args, "reward_key", None)
    reward = sample.reward
    if reward is None:
        raise ValueError(
            f"Sample {sample.index} of the evaluation {task!r} ended as {sample.status.value} without a reward."
        )
    if not key:
        return reward
    if not isinstance(reward, dict) or key not in reward:
        raise ValueError(
            f"Sample {sample.index} of the evaluation {task!r} has the reward {reward!r}, in which there is no {key!r} "
            "(--eval-reward-key, else --reward-key)."
        )
    return reward[key]
