"""One rank's part of a rollout, cut into the micro-batches of its schedule.

Letters: T rows of a packed micro-batch, N response tokens in it, R_i response tokens of sample i.
"""

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from slime.backends.megatron.transfers import sent, sent_together
from slime.data.packing import PackedBatch, pack
from slime.data.schedule import shares_prompts

BATCH_KEYS = (
    "tokens", "total_lengths", "response_lengths", "loss_masks", "log_probs", "ref_log_probs", "values", "advantages",
    "returns", "rollout_log_probs", "teacher_log_probs", "opd_reverse_kl", "rollout_mask_sums", "rollout_ids",
    "sample_indices",
)  # fmt: skip
"""What losses may ask of a micro-batch: lists with one entry a sample, None where the rollout does not have it."""


@dataclass(frozen=True)
class MicroBatch:
    """Samples that go through the model together.

    Attributes:
        indices: their positions in this rank's part of the rollout.
        packed: their tokens as one row, on the device.
        data: `BATCH_KEYS` of these samples; tensors on the device.
    """

    indices: list[int]
    packed: PackedBatch
    data: dict[str, Any]


@dataclass(frozen=True)
class TrainStep:
    """One optimizer step.

    Attributes:
        micro_batches: positions in this rank's part of the rollout.
        global_batch_size: rollouts (not samples) of all ranks: the divisor of the loss.
    """

    micro_batches: list[list[int]]
    global_batch_size: int


def local_rollout(shard: Mapping[str, Any]) -> dict[str, Any]:
    """The shard with this rank's own total lengths, as mutable lists that later passes add to."""
    data = dict(shard)
    data["total_lengths"] = [int(tokens.numel()) for tokens in data["tokens"]]
    if len(data.get("raw_reward") or []) > max(data["partition"], default=-1):
        data["local_raw_reward"] = [data["raw_reward"][i] for i in data["partition"]]
    data["response_lengths"] = [int(length) for length in data["response_lengths"]]
    return data


def train_steps(data: Mapping[str, Any]) -> list[TrainStep]:
    """The schedule of a shard: `micro_batch_indices` of all steps one after another, cut by `num_microbatches`."""
    steps, start = [], 0
    sizes = zip(data["num_microbatches"], data["global_batch_sizes"], strict=True)
    for num_microbatches, global_batch_size in sizes:
        micro_batches = [list(indices) for indices in data["micro_batch_indices"][start : start + num_microbatches]]
        steps.append(TrainStep(micro_batches, global_batch_size))
        start += num_microbatches
    return steps


class Packer:
    """Makes micro-batches of a rank's rollout data."""

    def __init__(self, args: Namespace, parallel_config: Mapping[str, int], device: torch.device) -> None:
        self._shares_prompts = shares_prompts(args, parallel_config)
        self._device = device
        tp_size = getattr(args, "tensor_model_parallel_size", 1)
        # A GPU's kernels like round lengths; on a CPU padding is work, and only sequence parallelism needs it.
        self._multiple_of = tp_size * (getattr(args, "data_pad_size_multiplier", 128) if device.type == "cuda" else 1)

    def batches(self, data: Mapping[str, Any], micro_batches: Sequence[Sequence[int]]) -> Iterator[MicroBatch]:
        for indices in micro_batches:
            yield self.batch(data, indices)

    def batch(self, data: Mapping[str, Any], indices: Sequence[int]) -> MicroBatch:
        groups = data.get("group_indices")
        packed = pack(
            [data["tokens"][i] for i in indices],
            [data["response_lengths"][i] for i in indices],
            None if groups is None else [groups[i] for i in indices],
            share_prompts=self._shares_prompts,
            multiple_of=self._multiple_of,
        )
        values = {key: self._select(data.get(key), indices) for key in BATCH_KEYS}
        return MicroBatch(list(indices), self._sent(packed), values)

    def _sent(self, packed: PackedBatch) -> PackedBatch:
        """The packed row on the device, in one copy that nothing waits for."""
        names = ("input_ids", "position_ids", "head_index", "targets")
        tensors = sent_together([getattr(packed, name) for name in names], self._device)
        return replace(packed, **dict(zip(names, tensors, strict=True)))

    def _select(self, values: Any, indices: Sequence[int]) -> Any:
        if values is None:
            return None
        if isinstance(values, Tensor):
            return sent(values[list(indices)], self._device)
        selected = [values[i] for i in indices]
        return [sent(value, self._device) if isinstance(value, Tensor) else value for value in selected]


def in_sample_order(
    per_batch: Sequence[Sequence[Any]], micro_batches: Sequence[Sequence[int]], count: int
) -> list[Any]:
    """Values of each micro-batch's samples, put in the order of the rank's rollout."""
    ordered: list[Any] = [None] * count
    for values, indices in zip(per_batch, micro_batches, strict=True):
        for value, index in zip(values, indices, strict=True):
            ordered[index] = value
    return ordered
