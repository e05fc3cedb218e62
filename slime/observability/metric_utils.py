"""Small arithmetic for metrics: statistics of a list, pass@k, endless repetition, the step a value is logged at."""

import argparse
import lzma
import math
import statistics
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

REPETITION_WINDOW_CHARS = 10_000
REPETITION_MIN_RATIO = 10.0


def compute_statistics(values: Sequence[float]) -> dict[str, float]:
    """Mean, median, max and min; {} of nothing."""
    if not values:
        return {}
    return {
        "mean": statistics.fmean(values),
        "median": float(statistics.median(values)),
        "max": float(max(values)),
        "min": float(min(values)),
    }


def compute_pass_rate(
    flat_rewards: Sequence[float], group_size: int, num_groups: int | None = None
) -> dict[str, float]:
    """The chance that at least one of k samples of a prompt is correct (arXiv:2107.03374, eq. 1).

    Args:
        flat_rewards: [num_groups x group_size]; a sample is correct when its reward is 1.
        group_size: samples of one prompt, which lie next to each other.
        num_groups: how many prompts; by default as many as there are.

    Returns:
        {"pass@1": ..., "pass@2": ...} for the powers of two up to group_size; {} when group_size is 1.
    """
    if group_size == 1:
        return {}
    if num_groups is None:
        num_groups = len(flat_rewards) // group_size
    if num_groups < 1 or len(flat_rewards) != num_groups * group_size:
        raise ValueError(
            f"pass@k needs whole groups: {len(flat_rewards)} rewards are not {num_groups} groups of {group_size}."
        )
    groups = [flat_rewards[i * group_size : (i + 1) * group_size] for i in range(num_groups)]
    num_correct = [sum(1 for reward in group if reward == 1) for group in groups]
    rates = {}
    for k in (2**i for i in range(int(math.log2(group_size)) + 1)):
        chances = [1.0 - math.comb(group_size - c, k) / math.comb(group_size, k) for c in num_correct]
        rates[f"pass@{k}"] = statistics.fmean(chances)
    return rates


def dict_add_prefix(metrics: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The same values under prefix + key."""
    return {f"{prefix}{key}": value for key, value in metrics.items()}


def compression_ratio(data: str | bytes, *, encoding: str = "utf-8", algorithm: str = "zlib") -> tuple[float, float]:
    """How far text compresses.

    Args:
        algorithm: `zlib` or `lzma`.

    Returns:
        size before over size after (1.0 for nothing), and the share of bytes saved, in percent.
    """
    raw = data.encode(encoding, errors="replace") if isinstance(data, str) else data
    if not raw:
        return 1.0, 0.0
    if algorithm not in ("zlib", "lzma"):
        raise ValueError(f"compression_ratio knows zlib and lzma, not {algorithm!r}.")
    size = len(zlib.compress(raw, 9) if algorithm == "zlib" else lzma.compress(raw))
    return len(raw) / size, 100.0 * (1.0 - size / len(raw))


def has_repetition(text: str) -> bool:
    """Whether a long text ends in a loop: its last 10,000 characters compress more than tenfold."""
    if len(text) <= REPETITION_WINDOW_CHARS:
        return False
    return compression_ratio(text[-REPETITION_WINDOW_CHARS:])[0] > REPETITION_MIN_RATIO


def compute_rollout_step(args: argparse.Namespace, rollout_id: int) -> int:
    """A rollout's x-value in trackers: its number, or with --wandb-always-use-train-step the optimizer steps before."""
    if not getattr(args, "wandb_always_use_train_step", False) or rollout_id < 0:
        return rollout_id
    return int(rollout_id * args.rollout_batch_size * args.n_samples_per_prompt // args.global_batch_size)
