"""Plans a rollout's training: which samples form a step, which of them a micro-batch, and which rank computes it.

Letters: S steps, DP data-parallel ranks. Samples are known by their position in the rollout; a rollout (one rollout id)
may have several samples, which always stay in one step. Every rank gets the same number of micro-batches in each step.
"""

import logging
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from slime.data.packing import num_packed_tokens
from slime.utils.flops_utils import calculate_fwd_flops
from slime.utils.seqlen_balancing import expand_bins_by_splitting, first_fit_pack, get_seqlen_balanced_partitions

logger = logging.getLogger(__name__)


class DataParallelSchedule(NamedTuple):
    """What each rank trains.

    Attributes:
        partitions: per rank, the samples (positions in the rollout) in the order of its micro-batches.
        micro_batch_indices: per rank, for all steps one after another, each micro-batch as positions in the partition.
        num_microbatches: per step, micro-batches of every rank.
        global_batch_sizes: per step, rollouts of all ranks together: the divisor of the loss.
    """

    partitions: list[list[int]]
    micro_batch_indices: list[list[list[int]]]
    num_microbatches: list[int]
    global_batch_sizes: list[int]


@dataclass(frozen=True)
class SharedPrompts:
    """What a schedule must know of prompts that are computed once per micro-batch.

    Attributes:
        response_lengths: per sample.
        keys: per sample, from `slime.data.packing.prompt_keys`; equal keys share a prompt.
    """

    response_lengths: Sequence[int]
    keys: Sequence[int]


def shares_prompts(args: Namespace, parallel_config: Mapping[str, int]) -> bool:
    """Whether the trainer packs with shared prompts, so that schedule and packing count the same tokens.

    Off where a row must hold whole sequences: a custom loss (it gets the logits of the plain layout), context
    parallelism, multi-token prediction, routing replay, and experts, whose balancing losses count every token.
    `share_group_prompts` in the arguments (if set) or `share_prompts` in the trainer's parallel_config turn it off too.
    """
    return bool(
        getattr(args, "share_group_prompts", True)
        and parallel_config.get("share_prompts", True)
        and parallel_config.get("cp_size", 1) == 1
        and getattr(args, "loss_type", "policy_loss") != "custom_loss"
        and not getattr(args, "enable_mtp_training", False)
        and not getattr(args, "num_experts", None)
    )


def build_dp_schedule(
    args: Namespace,
    train_parallel_config: Mapping[str, int],
    total_lengths: Sequence[int],
    *,
    global_batch_size: int,
    rollout_indices: Sequence[int],
    shared_prompts: SharedPrompts | None = None,
) -> DataParallelSchedule:
    """Steps, micro-batches and ranks for the samples of one rollout.

    Rollouts form steps of `global_batch_size` in order of first appearance (the rest is left out, with a warning). In a
    step, samples form micro-batches: with `use_dynamic_batch_size` of at most `max_tokens_per_gpu` x CP tokens (first
    fit, or Karmarkar-Karp over FLOPs with `balance_by_flops`), else of `micro_batch_size` samples. They are dealt to
    the ranks in turn, or by equal FLOPs with `balance_data`.

    Args:
        args: of these, the flags named above and, for FLOPs, the model's shape.
        train_parallel_config: dp_size, and cp_size, vpp_size, microbatch_group_size_per_vp_stage where above 1.
        total_lengths: prompt and response tokens of each sample.
        global_batch_size: rollouts in a step.
        rollout_indices: rollout id of each sample.
        shared_prompts: given if prompts of a group are computed once.

    Raises:
        ValueError: too few rollouts for a step, or samples that cannot be divided over ranks and micro-batches.
    """
    dp_size = train_parallel_config["dp_size"]
    costs = _Costs(args, total_lengths, shared_prompts)
    partitions: list[list[int]] = [[] for _ in range(dp_size)]
    micro_batch_indices: list[list[list[int]]] = [[] for _ in range(dp_size)]
    num_microbatches: list[int] = []
    steps = _steps(rollout_indices, global_batch_size)
    for step, samples in enumerate(steps):
        if len(samples) < dp_size:
            raise ValueError(
                f"Step {step} has {len(samples)} samples for {dp_size} data-parallel ranks, so some would have none. "
                f"Raise --global-batch-size (now {global_batch_size} rollouts) or use fewer trainer devices."
            )
        micro_batches = _align(
            args, train_parallel_config, _pack_step(args, train_parallel_config, samples, costs), costs
        )
        for rank, mine in enumerate(_deal(args, micro_batches, dp_size, costs)):
            for micro_batch in mine:
                first = len(partitions[rank])
                micro_batch_indices[rank].append(list(range(first, first + len(micro_batch))))
                partitions[rank] += micro_batch
        num_microbatches.append(len(micro_batches) // dp_size)
    return DataParallelSchedule(partitions, micro_batch_indices, num_microbatches, [global_batch_size] * len(steps))


class _Costs:
    """Tokens and FLOPs of a set of samples in one row."""

    def __init__(self, args: Namespace, total_lengths: Sequence[int], shared: SharedPrompts | None) -> None:
        self._args = args
        self.total_lengths = total_lengths
        self.shared = shared

    def tokens(self, samples: Sequence[int]) -> int:
        totals = [self.total_lengths[i] for i in samples]
        if self.shared is None:
            return num_packed_tokens(totals)
        responses = [self.shared.response_lengths[i] for i in samples]
        return num_packed_tokens(totals, responses, [self.shared.keys[i] for i in samples])

    def flops(self, samples: Sequence[int]) -> float:
        """Forward FLOPs. A response after a shared prompt costs what its sequence costs beyond the prompt."""
        if self.shared is None:
            return calculate_fwd_flops([self.total_lengths[i] for i in samples], self._args)
        counted: set[int] = set()
        flops = 0.0
        for i in samples:
            if (response := self.shared.response_lengths[i]) == 0:
                continue
            flops += calculate_fwd_flops([self.total_lengths[i] - 1], self._args)
            if self.shared.keys[i] in counted:
                flops -= calculate_fwd_flops([self.total_lengths[i] - response], self._args)
            counted.add(self.shared.keys[i])
        return flops


def _steps(rollout_indices: Sequence[int], global_batch_size: int) -> list[list[int]]:
    """Samples of each step; those of one rollout together, rollouts in order of first appearance."""
    samples_of: dict[int, list[int]] = {}
    for i, rollout_id in enumerate(rollout_indices):
        samples_of.setdefault(rollout_id, []).append(i)
    rollouts = list(samples_of.values())
    num_steps = len(rollouts) // global_batch_size
    if num_steps < 1:
        raise ValueError(
            f"{len(rollouts)} rollouts ({len(rollout_indices)} samples) do not fill one step of --global-batch-size "
            f"{global_batch_size}. Make it {len(rollouts)} or less, or generate more."
        )
    left_out = len(rollouts) - num_steps * global_batch_size
    if left_out:
        logger.warning(
            "%d of %d rollouts are not trained: they do not fill a step of --global-batch-size %d.",
            left_out,
            len(rollouts),
            global_batch_size,
        )
    starts = range(0, num_steps * global_batch_size, global_batch_size)
    return [[i for rollout in rollouts[start : start + global_batch_size] for i in rollout] for start in starts]


def _pack_step(
    args: Namespace, parallel_config: Mapping[str, int], samples: list[int], costs: _Costs
) -> list[list[int]]:
    """Micro-batches of a step, before their number is aligned."""
    if not args.use_dynamic_batch_size:
        size = args.micro_batch_size
        return [samples[start : start + size] for start in range(0, len(samples), size)]
    max_tokens = args.max_tokens_per_gpu * parallel_config.get("cp_size", 1)
    lengths = [costs.tokens([i]) for i in samples]
    num_too_long = sum(length > max_tokens for length in lengths)
    if num_too_long:
        logger.warning(
            "%d of %d samples have more than --max-tokens-per-gpu %d x CP %d tokens (the longest %d) and form "
            "micro-batches of their own; memory must suffice for them.",
            num_too_long,
            len(samples),
            args.max_tokens_per_gpu,
            parallel_config.get("cp_size", 1),
            max(lengths),
        )
    if getattr(args, "balance_by_flops", False):
        num_bins = max(-(-costs.tokens(samples) // max_tokens), 1)
        if num_bins >= len(samples):
            return [[i] for i in samples]
        weights = [costs.flops([i]) for i in samples]
        packed = get_seqlen_balanced_partitions(weights, num_bins, equal_size=False)
    elif costs.shared is None:
        packed = first_fit_pack(lengths, max_tokens)
    else:
        keys = [costs.shared.keys[i] for i in samples]
        prompts = [
            length - max(costs.shared.response_lengths[i] - 1, 0) for i, length in zip(samples, lengths, strict=True)
        ]
        packed = first_fit_pack(lengths, max_tokens, shared_keys=keys, shared_lengths=prompts)
    return [[samples[i] for i in micro_batch] for micro_batch in packed]


def _align(
    args: Namespace, parallel_config: Mapping[str, int], micro_batches: list[list[int]], costs: _Costs
) -> list[list[int]]:
    """As many micro-batches as divide over the ranks (and the groups of interleaved pipeline stages)."""
    dp_size = parallel_config["dp_size"]
    vpp_size = parallel_config.get("vpp_size", 1) or 1
    group = parallel_config.get("microbatch_group_size_per_vp_stage", 1) if vpp_size > 1 else 1
    multiple = dp_size * group
    num_wanted = -(-len(micro_batches) // multiple) * multiple
    num_samples = sum(len(micro_batch) for micro_batch in micro_batches)
    numbers = (
        f"a multiple of {multiple} (DP {dp_size} x {group} per virtual pipeline stage)"
        if group > 1
        else (f"a multiple of the {dp_size} data-parallel ranks")
    )
    if not args.use_dynamic_batch_size:
        if num_wanted != len(micro_batches):
            raise ValueError(
                f"A step of {num_samples} samples makes {len(micro_batches)} micro-batches of --micro-batch-size "
                f"{args.micro_batch_size}, which must be {numbers}. Change --global-batch-size or --micro-batch-size, "
                "or give --use-dynamic-batch-size --max-tokens-per-gpu N."
            )
        return micro_batches
    if num_wanted > num_samples:
        raise ValueError(
            f"A step of {num_samples} samples fills {len(micro_batches)} micro-batches of --max-tokens-per-gpu "
            f"{args.max_tokens_per_gpu}; their number must be {numbers}, and {num_wanted} would be more than there are "
            f"samples. Raise --max-tokens-per-gpu, or choose a --global-batch-size with {numbers} samples."
        )
    return expand_bins_by_splitting(
        micro_batches,
        costs.total_lengths,
        num_wanted,
        weigh=costs.tokens,
        shared_keys=None if costs.shared is None else costs.shared.keys,
    )


def _deal(args: Namespace, micro_batches: list[list[int]], dp_size: int, costs: _Costs) -> list[list[list[int]]]:
    """Micro-batches of each rank: by equal FLOPs, or rank r the r-th of each round."""
    if getattr(args, "balance_data", False):
        weights = [costs.flops(micro_batch) for micro_batch in micro_batches]
        dealt = get_seqlen_balanced_partitions(weights, dp_size, equal_size=True)
        return [[micro_batches[i] for i in mine] for mine in dealt]
    return [micro_batches[rank::dp_size] for rank in range(dp_size)]
