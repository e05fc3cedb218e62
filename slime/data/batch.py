"""Divides a rollout's train data over the data-parallel ranks: one dict of tensors per rank, with its schedule."""

import contextlib
from argparse import Namespace
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from slime.data.packing import prompt_keys
from slime.data.rewards import post_process_rewards
from slime.data.schedule import SharedPrompts, build_dp_schedule, shares_prompts
from slime.data.train_data import convert_samples_to_train_data
from slime.utils.types import RolloutBatch

__all__ = ["build_dp_schedule", "convert_samples_to_train_data", "post_process_rewards", "split_train_data_by_dp"]

PER_SAMPLE_KEYS = (
    "tokens",
    "multimodal_train_inputs",
    "response_lengths",
    "rewards",
    "truncated",
    "loss_masks",
    "round_number",
    "sample_indices",
    "group_indices",
    "rollout_ids",
    "rollout_mask_sums",
    "rollout_log_probs",
    "rollout_top_p_token_ids",
    "rollout_top_p_token_offsets",
    "rollout_routed_experts",
    "source_names",
    "prompt",
    "teacher_log_probs",
)
"""What each rank gets of its own samples only."""

_DTYPES = {
    "tokens": torch.long,
    "loss_masks": torch.int,
    "rollout_log_probs": torch.float32,
    "teacher_log_probs": torch.float32,
    "rollout_top_p_token_ids": torch.int32,
    "rollout_top_p_token_offsets": torch.int32,
    "rollout_routed_experts": None,
}
_TYPECODES = {torch.long: "q", torch.int: "i", torch.float32: "f"}


def split_train_data_by_dp(
    args: Namespace, train_data: RolloutBatch, parallel_config: Mapping[str, int]
) -> list[RolloutBatch]:
    """One dict per data-parallel rank.

    Keys: those of `PER_SAMPLE_KEYS` that the train data has, of the rank's samples in the order of its micro-batches
    (tokens, masks, log-probs, kept ids and routed experts as one CPU tensor per sample, `rollout_mask_sums` as one
    float32 tensor); `partition`, the rank's samples as positions in the rollout; `raw_reward` and `total_lengths` of
    the whole rollout; and the schedule: `micro_batch_indices` of the rank (positions in the partition, all steps one
    after another), `num_microbatches` and `global_batch_sizes` per step.

    Args:
        parallel_config: dp_size, cp_size, vpp_size, microbatch_group_size_per_vp_stage of the trainer; share_prompts
            False if it cannot compute a shared prompt once.

    Raises:
        ValueError: samples that cannot be divided, see `build_dp_schedule`.
    """
    data = {key: value for key, value in train_data.items() if key in PER_SAMPLE_KEYS and value is not None}
    for key, dtype in _DTYPES.items():
        if key in data:
            data[key] = [_tensor(value, dtype) for value in data[key]]
    if "multimodal_train_inputs" in data:
        data["multimodal_train_inputs"] = [_tensors_of(inputs) for inputs in data["multimodal_train_inputs"]]
    total_lengths = [tokens.numel() for tokens in data["tokens"]]
    for key, values in data.items():
        if len(values) != len(total_lengths):
            raise ValueError(f"Train data has {len(total_lengths)} token sequences but {len(values)} of {key}.")
    shared_prompts = None
    if shares_prompts(args, parallel_config):
        keys = prompt_keys(data["tokens"], data["response_lengths"], data.get("group_indices"))
        shared_prompts = SharedPrompts(data["response_lengths"], keys)
    schedule = build_dp_schedule(
        args,
        parallel_config,
        total_lengths,
        global_batch_size=args.global_batch_size,
        rollout_indices=data.get("rollout_ids", range(len(total_lengths))),
        shared_prompts=shared_prompts,
    )
    shards: list[RolloutBatch] = []
    for partition, micro_batch_indices in zip(schedule.partitions, schedule.micro_batch_indices, strict=True):
        shard: RolloutBatch = {"partition": partition}
        for key, values in data.items():
            shard[key] = _select(key, values, partition)
        shard["raw_reward"] = train_data["raw_reward"]
        shard["total_lengths"] = total_lengths
        shard["micro_batch_indices"] = micro_batch_indices
        shard["num_microbatches"] = schedule.num_microbatches
        shard["global_batch_sizes"] = schedule.global_batch_sizes
        shards.append(shard)
    return shards


def _select(key: str, values: Sequence[Any], partition: list[int]) -> Any:
    mine = [values[i] for i in partition]
    return torch.tensor(mine, dtype=torch.float32) if key == "rollout_mask_sums" else mine


def _tensor(value: Any, dtype: torch.dtype | None) -> Any:
    if value is None:
        return None
    if dtype is not None and isinstance(value, list) and value:
        with contextlib.suppress(TypeError):  # such as floats for a mask
            return torch.frombuffer(array(_TYPECODES[dtype], value), dtype=dtype)  # a quarter of the time of as_tensor
    return torch.as_tensor(value, dtype=dtype)


def _tensors_of(inputs: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A processor's arrays as tensors; what is no array stays."""
    if inputs is None:
        return None
    return {name: torch.as_tensor(value) if hasattr(value, "shape") else value for name, value in inputs.items()}
