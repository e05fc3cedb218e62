"""Which reward a sample gets: its own function, the run's function, or a built-in type by name."""

import argparse
import asyncio
import random
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from slime.rollout.rm_hub import grading_worker
from slime.rollout.rm_hub.custom import custom_reward, custom_rewards
from slime.rollout.rm_hub.deepscaler import get_deepscaler_rule_based_reward
from slime.rollout.rm_hub.f1 import f1_score
from slime.rollout.rm_hub.gpqa import compute_gpqa_reward
from slime.rollout.rm_hub.ifbench import compute_ifbench_reward
from slime.rollout.rm_hub.math_dapo_utils import compute_score
from slime.rollout.rm_hub.math_utils import extract_boxed_answer, grade_answer_verl
from slime.rollout.rm_hub.plain_answers import answer_tag_reward, last_number_reward
from slime.rollout.rm_hub.reasoning_gym_tasks import PREFIX as REASONING_GYM
from slime.rollout.rm_hub.reasoning_gym_tasks import compute_reasoning_gym_reward
from slime.rollout.rm_hub.remote import remote_rm
from slime.rollout.sampling import is_deterministic
from slime.utils.misc import sampling_seed
from slime.utils.types import Sample

BOXED_PREFIX = "boxed_"
REMOTE = "remote_rm"
RANDOM = "random"

Grader = Callable[[str, Any, Mapping[str, Any]], Any]
"""(response, label, metadata) -> reward; synchronous, runs in a thread."""

GRADERS: dict[str, Grader] = {
    "answer_tag": lambda response, label, _: answer_tag_reward(response, label),
    "dapo": lambda response, label, _: compute_score(response, label),
    "deepscaler": lambda response, label, _: get_deepscaler_rule_based_reward(response, label),
    "f1": lambda response, label, _: f1_score(response, str(label))[0],
    "gpqa": compute_gpqa_reward,
    "ifbench": compute_ifbench_reward,
    "last_number": lambda response, label, _: last_number_reward(response, label),
    "math": lambda response, label, _: int(grade_answer_verl(response, label)),
    RANDOM: lambda *_: random.randint(0, 1),
}

_WORKERS_IMPORT = {"deepscaler": [("sympy_equal",)], "math": [("sympy_equal",), ("math_verify_equal",)]}
"""What graders ask of other processes (`grading_worker`) where rules do not decide."""

_threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="reward")


class RewardError(RuntimeError):
    """A reward could not be computed; names the sample and the reward."""


async def async_rm(args: argparse.Namespace, sample: Sample, **kwargs: Any) -> Any:
    """The reward of one sample: a number, or a dict from which `--reward-key` chooses.

    The first that is given counts: the sample's `custom_rm_path`, `--custom-rm-path`, `metadata["rm_type"]`,
    `--rm-type`.

    Raises:
        NotImplementedError: the type is unknown; lists those that are known.
        RewardError: computing it failed; names the sample and the reward, with the error as its cause.
    """
    path = sample.custom_rm_path or getattr(args, "custom_rm_path", None)
    name = path or _rm_type(args, sample)
    try:
        if path:
            return await custom_reward(path, args, sample, **kwargs)
        return await _built_in(name, args, sample)
    except (NotImplementedError, RewardError):
        raise
    except Exception as error:
        raise _reward_error(name, [sample], error) from error


async def batched_async_rm(args: argparse.Namespace, samples: Sequence[Sample], **kwargs: Any) -> list[Any]:
    """The rewards of a list of samples, in its order; `--custom-rm-path` gets the whole list at once.

    Raises:
        as `async_rm`.
    """
    path = getattr(args, "custom_rm_path", None)
    if path is None:
        return list(await asyncio.gather(*(async_rm(args, sample, **kwargs) for sample in samples)))
    try:
        return await custom_rewards(path, args, samples, **kwargs)
    except Exception as error:
        raise _reward_error(path, samples, error) from error


def warm_up(args: argparse.Namespace) -> None:
    """Have the run's own reward import what it needs, in the background: SymPy takes seconds, once."""
    if getattr(args, "custom_rm_path", None):
        return
    base, _, task = (getattr(args, "rm_type", None) or "").strip().removeprefix(BOXED_PREFIX).partition(":")
    if base in _WORKERS_IMPORT:
        grading_worker.warm_up(*_WORKERS_IMPORT[base])
    elif base == REASONING_GYM and task:
        grading_worker.warm_up(("reasoning_gym_score", task))


def known_types() -> list[str]:
    """Names that `--rm-type` takes, for messages and docs."""
    return sorted([*GRADERS, REMOTE, REASONING_GYM, f"{REASONING_GYM}:<task>"])


async def _built_in(name: str, args: argparse.Namespace, sample: Sample) -> Any:
    response = sample.response
    if name.startswith(BOXED_PREFIX):
        name = name.removeprefix(BOXED_PREFIX)
        response = extract_boxed_answer(response) or ""
    if name == REMOTE:
        return await remote_rm(args, sample, response=response)
    if name == RANDOM and is_deterministic(args):
        return sampling_seed("reward", args.rollout_seed, sample.group_index, sample.index, response) % 2
    metadata = sample.metadata if isinstance(sample.metadata, Mapping) else {}
    base, _, task = name.partition(":")
    grade: Callable[[], Any]
    if base == REASONING_GYM:
        reward = partial(compute_reasoning_gym_reward, task=task or None, prompt=sample.prompt)
        grade = partial(reward, response, sample.label, metadata)
    elif name in GRADERS:
        grade = partial(GRADERS[name], response, sample.label, metadata)
    else:
        raise NotImplementedError(_unknown(name))
    return await asyncio.get_running_loop().run_in_executor(_threads, grade)


def _rm_type(args: argparse.Namespace, sample: Sample) -> str:
    metadata = sample.metadata if isinstance(sample.metadata, Mapping) else {}
    return str(metadata.get("rm_type") or getattr(args, "rm_type", None) or "").strip()


def _unknown(name: str) -> str:
    seen = f"There is no reward of the type {name!r}" if name else "No reward is named for this sample"
    return (
        f"{seen}. --rm-type (or metadata['rm_type']) is one of: {', '.join(known_types())}; each may have the prefix "
        f"{BOXED_PREFIX!r}. A reward of your own: --custom-rm-path."
    )


def _reward_error(name: str, samples: Sequence[Sample], error: Exception) -> RewardError:
    which = ", ".join(f"{sample.index} (group {sample.group_index})" for sample in samples[:8])
    more = ", ..." if len(samples) > 8 else ""
    word = "sample" if len(samples) == 1 else "samples"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno}, in {frames[-1].name})" if frames else ""
    return RewardError(f"The reward {name!r} of {word} {which}{more} failed: {type(error).__name__}: {error}{where}")
