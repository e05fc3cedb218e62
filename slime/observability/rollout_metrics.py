"""What a rollout or an evaluation says about itself: rewards, lengths, repetition, staleness and speed."""

import argparse
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from slime.observability import logging_utils
from slime.observability.metric_utils import (
    compute_pass_rate,
    compute_rollout_step,
    compute_statistics,
    dict_add_prefix,
    has_repetition,
)
from slime.observability.trace_metrics import trace_metrics
from slime.utils.misc import load_function
from slime.utils.types import Sample


def rollout_metrics(
    args: argparse.Namespace, samples: Sequence[Any], metrics: Mapping[str, Any] | None, elapsed_s: float
) -> dict[str, Any]:
    """The metrics of one rollout, ready for `logging_utils.log`.

    Args:
        samples: the rollout's samples, nested or flat.
        metrics: what the rollout function itself reported; kept as it is.
        elapsed_s: wall time of the rollout, in s.
    """
    flat = flatten_samples(samples)
    own = sample_metrics(args, flat)
    if getattr(args, "advantage_estimator", None) != "ppo":
        own |= _zero_std(args, flat)
    result = dict_add_prefix(own, "rollout/") | _speed(args, flat, elapsed_s) | trace_metrics(flat)
    if getattr(args, "log_passrate", False):
        result |= _pass_rate(args, flat)
    if getattr(args, "log_multi_turn", False):
        result |= _multi_turn(flat)
    if getattr(args, "log_correct_samples", False):
        correct = [sample for sample in flat if _numeric_rewards(args, [sample]) == [1.0]]
        result |= dict_add_prefix(sample_metrics(args, correct, with_reward=False), "rollout/correct/")
    return result | dict(metrics or {})


def eval_metrics(
    args: argparse.Namespace, data: Mapping[str, Mapping[str, Any]], extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The metrics of one evaluation.

    Args:
        data: per task {"rewards": [...], "truncated": [...], "samples": [...]}; only rewards are needed.
        extra: further metrics of the evaluation function; kept as they are.
    """
    result: dict[str, Any] = {}
    for task, answers in data.items():
        rewards = answers["rewards"]
        samples: list[Sample] = flatten_samples(answers.get("samples") or [])
        if rewards:
            result[f"eval/{task}"] = statistics.fmean(float(reward) for reward in rewards)
        if samples:
            result |= dict_add_prefix(sample_metrics(args, samples, with_reward=False), f"eval/{task}/")
            result[f"eval/{task}/distinct_responses"] = len({sample.response for sample in samples})
        if truncated := answers.get("truncated"):
            result[f"eval/{task}-truncated_ratio"] = statistics.fmean(float(cut) for cut in truncated)
        group_size = _eval_group_size(args, task)
        if group_size > 1 and rewards and len(rewards) % group_size == 0:
            result |= dict_add_prefix(compute_pass_rate(rewards, group_size), f"eval/{task}-")
    return result | dict(extra or {})


def sample_metrics(args: argparse.Namespace, samples: Sequence[Sample], *, with_reward: bool = True) -> dict[str, Any]:
    """Metrics of any list of samples, without a prefix; {} of none."""
    if not samples:
        return {}
    result: dict[str, Any] = {"num_samples": len(samples)}
    rewards = _numeric_rewards(args, samples)
    if with_reward and rewards:
        result["raw_reward"] = statistics.fmean(rewards)
    lengths = [sample.effective_response_length for sample in samples]
    result |= dict_add_prefix(compute_statistics(lengths), "response_len/")
    result["truncated_ratio"] = _share(sample.status == Sample.Status.TRUNCATED for sample in samples)
    result["aborted_ratio"] = _share(sample.status == Sample.Status.ABORTED for sample in samples)
    result["repetition_frac"] = _share(has_repetition(sample.response) for sample in samples)
    return result | _engine(args, samples) | _weight_versions(samples) | _categories(args, samples)


def flatten_samples(samples: Iterable[Any]) -> list[Sample]:
    """Nested lists of samples as one list, in order."""
    flat: list[Sample] = []
    for item in samples:
        flat.extend(flatten_samples(item) if isinstance(item, list | tuple) else [item])
    return flat


def log_rollout_data(
    rollout_id: int,
    args: argparse.Namespace,
    samples: Sequence[Any],
    rollout_extra_metrics: Mapping[str, Any] | None,
    rollout_time: float,
) -> None:
    """Logs a rollout, unless it is a replayed one or --custom-rollout-log-function-path returns True: it took over."""
    path = getattr(args, "custom_rollout_log_function_path", None)
    if path is not None and load_function(path)(rollout_id, args, samples, rollout_extra_metrics, rollout_time):
        return
    if getattr(args, "load_debug_rollout_data", None):
        return
    metrics = rollout_metrics(args, samples, rollout_extra_metrics, rollout_time)
    logging_utils.log(args, metrics | {"rollout/step": compute_rollout_step(args, rollout_id)}, "rollout/step")


def log_eval_rollout_data(
    rollout_id: int,
    args: argparse.Namespace,
    data: Mapping[str, Mapping[str, Any]],
    extra_metrics: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Logs an evaluation, unless --custom-eval-rollout-log-function-path takes over; returns its metrics."""
    path = getattr(args, "custom_eval_rollout_log_function_path", None)
    if path is not None and load_function(path)(rollout_id, args, data, extra_metrics):
        return {}
    metrics = eval_metrics(args, data, extra_metrics)
    logging_utils.log(args, metrics | {"eval/step": compute_rollout_step(args, rollout_id)}, "eval/step")
    return metrics


def _share(flags: Iterable[bool]) -> float:
    return statistics.fmean(map(float, flags))


def _numeric_rewards(args: argparse.Namespace, samples: Sequence[Sample]) -> list[float]:
    """Each sample's reward, or [] when a reward is missing or not a number (a teacher's reply, for example)."""
    rewards = []
    for sample in samples:
        reward: Any = sample.reward
        if isinstance(reward, dict):
            reward = reward.get(getattr(args, "reward_key", None))
        if isinstance(reward, bool | int | float) and math.isfinite(reward):
            rewards.append(float(reward))
    return rewards if len(rewards) == len(samples) else []


def _zero_std(args: argparse.Namespace, samples: Sequence[Sample]) -> dict[str, Any]:
    """How many groups earned one and the same reward, by that reward."""
    equal = [rewards for rewards in _group_rewards(args, samples) if max(rewards) == min(rewards)]
    counts = Counter(round(rewards[0], 1) for rewards in equal)
    return {f"zero_std/count_{reward}": count for reward, count in sorted(counts.items())}


def _pass_rate(args: argparse.Namespace, samples: Sequence[Sample]) -> dict[str, Any]:
    """pass@k over the whole groups (--log-passrate)."""
    size = getattr(args, "n_samples_per_prompt", 1)
    whole = [rewards for rewards in _group_rewards(args, samples) if len(rewards) == size]
    if not whole:
        return {}
    return dict_add_prefix(compute_pass_rate([reward for group in whole for reward in group], size), "passrate/")


def _multi_turn(samples: Sequence[Sample]) -> dict[str, Any]:
    """Lengths with and without what tools and environments said, and the number of turns (--log-multi-turn)."""
    columns = {
        "raw_response_length/response_length": [sample.response_length for sample in samples],
        "wo_obs_response_length/response_length": [sample.effective_response_length for sample in samples],
        "multi_turn_metric/round_number": [s.metadata["round_number"] for s in samples if "round_number" in s.metadata],
    }
    statistics_of = {name: compute_statistics(values) for name, values in columns.items()}
    return {
        f"multi_turn/{name}_{key}": values[key]
        for name, values in statistics_of.items()
        for key in ("mean", "max", "min")
        if values
    }


def _group_rewards(args: argparse.Namespace, samples: Sequence[Sample]) -> list[list[float]]:
    """The rewards of each group, by group index; a group with a missing reward is left out."""
    grouped = [sample for sample in samples if sample.group_index is not None]
    grouped.sort(key=lambda sample: sample.group_index or 0)
    groups = (list(members) for _, members in groupby(grouped, key=lambda sample: sample.group_index))
    return [rewards for members in groups if (rewards := _numeric_rewards(args, members))]


def _engine(args: argparse.Namespace, samples: Sequence[Sample]) -> dict[str, Any]:
    """What the engine reported: prefix cache, speculative decoding, nucleus size."""
    result: dict[str, Any] = {}
    prompt_tokens = sum(sample.prefix_cache_info.total_prompt_tokens for sample in samples)
    cached_tokens = sum(sample.prefix_cache_info.cached_tokens for sample in samples)
    if prompt_tokens:
        result["prefix_cache_hit_rate"] = cached_tokens / prompt_tokens
        result["avg_cached_tokens_per_sample"] = cached_tokens / len(samples)
    if getattr(args, "sglang_speculative_algorithm", None):
        drafted = sum(sample.spec_info.spec_draft_token_num for sample in samples)
        verified = sum(sample.spec_info.spec_verify_ct for sample in samples)
        accepted = sum(sample.spec_info.spec_accept_token_num for sample in samples)
        completed = sum(sample.spec_info.completion_token_num for sample in samples)
        result["spec_accept_rate"] = accepted / drafted if drafted else 0.0
        result["spec_accept_length"] = completed / verified if verified else 0.0
    nuclei = [s for s in samples if s.rollout_top_p_token_offsets is not None and s.response_length > 0]
    if nuclei:
        kept = sum(int(sample.rollout_top_p_token_offsets[-1]) for sample in nuclei)
        result["top_p_kept_vocab_per_token"] = kept / sum(sample.response_length for sample in nuclei)
    return result


def _weight_versions(samples: Sequence[Sample]) -> dict[str, Any]:
    """How stale the samples are, measured in weight versions against the newest in the list."""
    versions = [[int(v) for v in s.weight_versions if str(v).isdigit()] for s in samples]
    newest = max((version for each in versions for version in each), default=None)
    if newest is None:
        return {}
    lags = [newest - min(each) for each in versions if each]
    return {
        "weight_version_lag/mean": statistics.fmean(lags),
        "weight_version_lag/max": max(lags),
        "weight_version_mixed_ratio": _share(len(set(each)) > 1 for each in versions),
    }


def staleness_metrics(ages: Sequence[int | None]) -> dict[str, Any]:
    """Of ages in rollouts, one a sample: mean and largest; {} where none is known."""
    known = [age for age in ages if age is not None]
    if not known:
        return {}
    return {"rollout/staleness/mean": statistics.fmean(known), "rollout/staleness/max": max(known)}


def _categories(args: argparse.Namespace, samples: Sequence[Sample]) -> dict[str, Any]:
    """Share of samples by the category that a dict reward carries under --log-reward-category."""
    key = getattr(args, "log_reward_category", None)
    if key is None:
        return {}
    counts = Counter(str(s.reward[key]) for s in samples if isinstance(s.reward, dict) and key in s.reward)
    return {f"error_cat/{category}": count / len(samples) for category, count in sorted(counts.items())}


def _speed(args: argparse.Namespace, samples: Sequence[Sample], elapsed_s: float) -> dict[str, Any]:
    """Tokens per second of the rollout, whole and without the time that samples spent outside the engine."""
    result: dict[str, Any] = {"perf/rollout_time": elapsed_s}
    if not samples or elapsed_s <= 0:
        return result
    outside = [sample.non_generation_time for sample in samples]
    is_mixed = max(outside) > 0
    if is_mixed:
        result |= dict_add_prefix(compute_statistics(outside), "perf/non_generation_time/")
    num_devices = getattr(args, "rollout_num_gpus", None) or 1
    for word, lengths in (
        ("", [sample.response_length for sample in samples]),
        ("effective_", [sample.effective_response_length for sample in samples]),
    ):
        result[f"perf/{word}tokens_per_gpu_per_sec"] = sum(lengths) / elapsed_s / num_devices
        longest = max(range(len(samples)), key=lengths.__getitem__)
        result[f"perf/longest_{word}sample_tokens_per_sec"] = lengths[longest] / elapsed_s
        if is_mixed:
            result[f"perf/longest_{word}sample_non_generation_time"] = outside[longest]
            inside_s = elapsed_s - outside[longest]
            if inside_s > 0:
                name = f"perf/longest_{word}sample_tokens_per_sec_without_non_generation"
                result[name] = lengths[longest] / inside_s
    return result


def _eval_group_size(args: argparse.Namespace, task: str) -> int:
    """Answers per prompt of a task: its own setting, else --n-samples-per-eval-prompt, else 1."""
    for dataset in getattr(args, "eval_datasets", None) or []:
        if dataset.name == task and (own := getattr(dataset, "n_samples_per_eval_prompt", None)):
            return int(own)
    return int(getattr(args, "n_samples_per_eval_prompt", None) or 1)
