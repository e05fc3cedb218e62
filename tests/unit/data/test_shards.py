"""A shard comes out of the object store as it was put in."""

import pickle
from typing import Any

import torch

from slime.data.shards import Joined, joined, separated


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype is other.dtype and torch.equal(one, other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def test_a_shard_comes_back_as_it_was() -> None:
    shard = {
        "tokens": [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.zeros(0, dtype=torch.long)],
        "rollout_log_probs": [torch.tensor([-0.1, float("-inf")]), torch.tensor([-0.3])],
        "loss_masks": [torch.tensor([1, 0], dtype=torch.int)],
        "rollout_mask_sums": torch.tensor([1.0, 2.0]),
        "rollout_routed_experts": [torch.zeros(2, 3, dtype=torch.int32)],
        "teacher_log_probs": [None, torch.tensor([1.0])],
        "prompt": ["a", "b"],
        "nothing": [],
    }
    found = separated(pickle.loads(pickle.dumps(joined(shard), protocol=5)))
    assert list(found) == list(shard)
    assert all(_same(found[key], value) for key, value in shard.items())


def test_what_is_joined_is_one_array() -> None:
    packed = joined({"tokens": [torch.tensor([1, 2]), torch.tensor([3])]})["tokens"]
    assert isinstance(packed, Joined)
    assert (packed.array.tolist(), packed.lengths) == ([1, 2, 3], [2, 1])


def test_samples_can_be_written_to_though_the_store_cannot() -> None:
    """A hook of the user's may change a loss mask in place; the other samples stay as they are."""
    packed = joined({"loss_masks": [torch.tensor([1, 1]), torch.tensor([1])]})
    packed["loss_masks"].array.flags.writeable = False
    masks = separated(packed)["loss_masks"]
    masks[0].zero_()
    assert [mask.tolist() for mask in masks] == [[0, 0], [1]]
    assert packed["loss_masks"].array.tolist() == [1, 1, 1]
