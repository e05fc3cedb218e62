"""Turns a rollout's samples into train data: a dict of lists with one entry per sample, in the order of the samples.

Keys always there: tokens, response_lengths, rewards, raw_reward, truncated, sample_indices, group_indices, rollout_ids,
loss_masks, rollout_mask_sums, source_names. Others only where the samples have what they hold.
"""

import logging
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from slime.data.rewards import post_process_rewards
from slime.utils.data import get_source
from slime.utils.flops_utils import is_moe_layer
from slime.utils.misc import load_function
from slime.utils.types import RolloutBatch, Sample

logger = logging.getLogger(__name__)

REQUIRED_KEYS = ("tokens", "response_lengths", "rewards", "raw_reward", "truncated", "sample_indices", "loss_masks")
"""What a custom conversion must return."""


def convert_samples_to_train_data(args: Namespace, samples: Sequence[Sample]) -> RolloutBatch:
    """Train data of a rollout, by `--custom-convert-samples-to-train-data-path` if given.

    Raises:
        ValueError: a sample whose lengths contradict each other, or lists that do not fit the samples.
    """
    if not samples:
        raise ValueError("The rollout has no samples, so there is nothing to train on.")
    if args.custom_convert_samples_to_train_data_path is not None:
        data = load_function(args.custom_convert_samples_to_train_data_path)(args, samples)
        return complete_custom_data(args.custom_convert_samples_to_train_data_path, data)
    for i, sample in enumerate(samples):
        _check_lengths(i, sample)
    raw_rewards, rewards = post_process_rewards(args, samples)
    rollout_ids = fill_rollout_ids([sample.rollout_id for sample in samples])
    loss_masks = [_loss_mask(sample) for sample in samples]
    data = {
        "tokens": [sample.tokens for sample in samples],
        "response_lengths": [sample.response_length for sample in samples],
        "rewards": rewards,
        "raw_reward": raw_rewards,
        "truncated": [int(sample.status == Sample.Status.TRUNCATED) for sample in samples],
        "sample_indices": [sample.index for sample in samples],
        "group_indices": [sample.group_index for sample in samples],
        "rollout_ids": rollout_ids,
        "loss_masks": loss_masks,
        "rollout_mask_sums": rollout_mask_sums(loss_masks, rollout_ids),
        "source_names": [get_source(sample) for sample in samples],
    }
    if any("raw_reward" in (sample.metadata or {}) for sample in samples):
        data["raw_reward"] = [(sample.metadata or {}).get("raw_reward", sample.reward) for sample in samples]
    if "round_number" in (samples[0].metadata or {}):
        data["round_number"] = [(sample.metadata or {}).get("round_number") for sample in samples]
    if samples[0].train_metadata is not None:
        data["metadata"] = [sample.train_metadata for sample in samples]
    if any(sample.multimodal_train_inputs is not None for sample in samples):
        data["multimodal_train_inputs"] = [sample.multimodal_train_inputs for sample in samples]
    return data | _engine_records(args, samples)


def _engine_records(args: Namespace, samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """What engines recorded per token, where the samples have it."""
    data: dict[str, list[Any]] = {}
    for key in ("rollout_log_probs", "teacher_log_probs"):
        values = _per_token_values(samples, key)
        if values is not None:
            data[key] = values
    if getattr(args, "rollout_top_p", 1.0) != 1.0:
        data["rollout_top_p_token_ids"], data["rollout_top_p_token_offsets"] = _nucleus_records(samples)
    experts = [sample.rollout_routed_experts for sample in samples]
    if getattr(args, "use_rollout_routing_replay", False):
        for i, sample in enumerate(samples):
            _check_routed_experts(args, i, sample)
        data["rollout_routed_experts"] = experts
    elif experts[0] is not None:
        data["rollout_routed_experts"] = experts
    return data


def fill_rollout_ids(rollout_ids: Sequence[int | None]) -> list[int]:
    """Each None becomes the smallest non-negative int that no sample has yet, in order: a rollout of its own."""
    taken = {rollout_id for rollout_id in rollout_ids if rollout_id is not None}
    unused = (i for i in range(2 * len(rollout_ids)) if i not in taken)
    return [next(unused) if rollout_id is None else rollout_id for rollout_id in rollout_ids]


def rollout_mask_sums(loss_masks: Sequence[Sequence[int]], rollout_ids: Sequence[int]) -> list[int]:
    """Per sample, the trained tokens of all samples of its rollout: the denominator of its mean."""
    totals: dict[int, int] = {}
    for mask, rollout_id in zip(loss_masks, rollout_ids, strict=True):
        totals[rollout_id] = totals.get(rollout_id, 0) + sum(mask)
    return [totals[rollout_id] for rollout_id in rollout_ids]


def complete_custom_data(path: str, data: Any) -> RolloutBatch:
    """Check what a custom conversion returned, and add what it may leave out: every sample a rollout of its own, no
    group of prompts. (Without `rollout_mask_sums` each sample's own mask is the denominator.)"""
    if not isinstance(data, Mapping):
        raise ValueError(f"{path} must return a dict of lists; it returned {type(data).__name__}.")
    missing = [key for key in REQUIRED_KEYS if key not in data]
    if missing:
        raise ValueError(
            f"{path} returned no {', '.join(missing)}; it must return at least {', '.join(REQUIRED_KEYS)}."
        )
    num_samples = len(data["tokens"])
    wrong = {key: len(data[key]) for key in REQUIRED_KEYS if key != "raw_reward" and len(data[key]) != num_samples}
    if wrong:
        raise ValueError(f"{path} returned {num_samples} token sequences, but of others another number: {wrong}.")
    completed = dict(data)
    completed.setdefault("rollout_ids", list(range(num_samples)))
    completed.setdefault("group_indices", [None] * num_samples)
    return completed


def _check_lengths(position: int, sample: Sample) -> None:
    length = sample.response_length
    who = f"Sample {sample.index} (number {position} of the rollout)"
    if length < 0 or (length > 0 and length >= len(sample.tokens)):
        raise ValueError(
            f"{who} has response_length {length} but {len(sample.tokens)} tokens. `tokens` must hold the prompt (at "
            "least one token) and then the response; a custom generate function sets both."
        )
    for name in ("loss_mask", "rollout_log_probs", "teacher_log_probs"):
        values = getattr(sample, name)
        if values is not None and len(values) != length:
            raise ValueError(f"{who} has a {name} of length {len(values)} for {length} response tokens.")


def _loss_mask(sample: Sample) -> list[int]:
    if sample.remove_sample:
        return [0] * sample.response_length
    return [1] * sample.response_length if sample.loss_mask is None else list(sample.loss_mask)


def _per_token_values(samples: Sequence[Sample], key: str) -> list[Any] | None:
    """The attribute `key` of all samples, [] for empty responses; None if the first response lacks it.

    Raises:
        ValueError: the first response has it and another does not.
    """
    lacking = [i for i, sample in enumerate(samples) if sample.response_length > 0 and getattr(sample, key) is None]
    having = [i for i, sample in enumerate(samples) if getattr(sample, key) is not None]
    if not having:
        return None
    if lacking and min(lacking) < min(having):
        logger.warning("%d of %d samples have no %s, so none is used.", len(lacking), len(samples), key)
        return None
    if lacking:
        raise ValueError(
            f"{len(lacking)} of {len(samples)} samples have no {key}, the first is number {lacking[0]} (index "
            f"{samples[lacking[0]].index}). Either all responses have it or none: a generate function records it with "
            "Sample.append_response_tokens."
        )
    return [[] if getattr(sample, key) is None else getattr(sample, key) for sample in samples]


def _nucleus_records(samples: Sequence[Sample]) -> tuple[list[Any], list[Any]]:
    """Ids and offsets of the tokens that top-p kept; an empty response has none.

    Raises:
        ValueError: a response without them, or with offsets of a wrong length.
    """
    all_ids: list[Any] = []
    all_offsets: list[Any] = []
    for i, sample in enumerate(samples):
        ids, offsets = sample.rollout_top_p_token_ids, sample.rollout_top_p_token_offsets
        if sample.response_length == 0 and (ids is None or offsets is None):
            ids, offsets = [], [0]
        if ids is None or offsets is None:
            raise ValueError(
                f"Sample {sample.index} (number {i} of the rollout) does not say which tokens top-p kept, without "
                "which its log-probs cannot be compared. Use an engine that returns them, or --rollout-top-p 1."
            )
        if len(offsets) != sample.response_length + 1 or int(offsets[-1]) != len(ids):
            raise ValueError(
                f"Sample {sample.index} (number {i} of the rollout): {len(offsets)} offsets up to {int(offsets[-1])} "
                f"for {sample.response_length} response tokens and {len(ids)} kept ids; expected one offset more than "
                "tokens, the last one equal to the number of ids."
            )
        all_ids.append(ids)
        all_offsets.append(offsets)
    return all_ids, all_offsets


def _check_routed_experts(args: Namespace, position: int, sample: Sample) -> None:
    """The engine's record of routing must be there for each token, layer and choice, and be filled in."""
    who = f"Sample {sample.index} (number {position} of the rollout)"
    if sample.rollout_routed_experts is None:
        raise ValueError(f"{who} has no routed experts, which --use-rollout-routing-replay replays.")
    experts = torch.as_tensor(sample.rollout_routed_experts)
    expected = (args.num_layers, args.moe_router_topk)
    if experts.dim() != 3 or tuple(experts.shape[1:]) != expected or experts.shape[0] == 0:
        raise ValueError(
            f"{who} has routed experts of shape {tuple(experts.shape)}; expected (tokens - 1, *{expected})."
        )
    if args.moe_router_topk > 1:
        empty = [layer for layer in _moe_layers(args) if not bool(experts[:, layer].any())]
        if empty:
            raise ValueError(
                f"{who}: the routing of layers {empty} is all zeros, as if the engine had not recorded it."
            )


def _moe_layers(args: Namespace) -> Iterator[int]:
    return (layer for layer in range(args.num_layers) if is_moe_layer(args, layer))
