"""Sampling parameters of a rollout and of an evaluation, as they stand in a request to the engine."""

import uuid
from argparse import Namespace
from typing import Any

from slime.utils.eval_config import EvalDatasetConfig
from slime.utils.misc import sampling_seed
from slime.utils.types import Sample

_SESSIONS = uuid.uuid5(uuid.NAMESPACE_OID, "slime session")


def rollout_sampling_params(args: Namespace) -> dict[str, Any]:
    """For training samples."""
    params: dict[str, Any] = {
        "temperature": args.rollout_temperature,
        "top_p": args.rollout_top_p,
        "top_k": args.rollout_top_k,
        "max_new_tokens": args.rollout_max_response_len,
        "stop": args.rollout_stop,
        "stop_token_ids": args.rollout_stop_token_ids,
        "skip_special_tokens": args.rollout_skip_special_tokens,
        "no_stop_trim": True,
        "spaces_between_special_tokens": False,
    }
    if args.rollout_top_p != 1:
        params["custom_params"] = {"return_top_p_token_ids": True}
    return params


def is_deterministic(args: Namespace) -> bool:
    """Whether requests carry seeds, so that the same samples come out of every run."""
    return bool(
        getattr(args, "sglang_enable_deterministic_inference", False) or getattr(args, "deterministic_mode", False)
    )


def session_id(args: Namespace, sample: Sample, position: int = 0) -> str:
    """A new name for what belongs to one sample, by which a router may choose the engine.

    In the deterministic modes it depends on the run's seed and the sample alone.

    Args:
        position: of the sample in its group; tells samples without an index apart.
    """
    if not is_deterministic(args):
        return str(uuid.uuid4())
    which = (sample.index, sample.group_index, position)
    return str(uuid.uuid5(_SESSIONS, ":".join(map(str, (args.rollout_seed, *which)))))


def eval_sampling_params(args: Namespace, config: EvalDatasetConfig) -> dict[str, Any]:
    """For one evaluation task; what is None is left to the engine."""
    skips = config.skip_special_tokens
    params = {
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "max_new_tokens": config.max_response_len,
        "stop": config.stop,
        "stop_token_ids": config.stop_token_ids,
        "skip_special_tokens": getattr(args, "rollout_skip_special_tokens", False) if skips is None else skips,
        "no_stop_trim": True if config.no_stop_trim is None else config.no_stop_trim,
        "spaces_between_special_tokens": False,
        "repetition_penalty": config.repetition_penalty,
        "min_new_tokens": config.min_new_tokens,
    }
    return {name: value for name, value in params.items() if value is not None}


def sample_seed(args: Namespace, sample: Sample, position: int) -> int:
    """Depends on the run's seed and on which sample this is, not on when or where it is generated."""
    if sample.index is not None:
        return sampling_seed(args.rollout_seed, sample.index)
    return sampling_seed(args.rollout_seed, "group", sample.group_index, position)


def eval_seed(args: Namespace, task: str, prompt_index: int, position: int) -> int:
    """Depends on the run's seed, the task, the prompt and which of its samples this is; repeats at every evaluation."""
    return sampling_seed(args.rollout_seed, "eval", task, prompt_index, position)
