"""What the trainer gets of each sample, which keys exist when, and which contradictions are refused."""

import pytest
import torch

from slime.data.train_data import convert_samples_to_train_data, fill_rollout_ids, rollout_mask_sums
from slime.utils.types import Sample


def four(make_sample, **fields):
    return [
        make_sample([1, 2], [3], 1.0, index=0, group_index=0, **fields),
        make_sample([1, 2], [4, 5], 0.0, index=1, group_index=0, status=Sample.Status.TRUNCATED),
        make_sample([6], [7, 8, 9], 2.0, index=2, group_index=1, loss_mask=[1, 0, 1]),
        make_sample([6], [7], 4.0, index=3, group_index=1, remove_sample=True),
    ]


def test_a_plain_rollout(make_args, make_sample) -> None:
    data = convert_samples_to_train_data(make_args(grpo_std_normalization=False), four(make_sample))
    assert data == {
        "tokens": [[1, 2, 3], [1, 2, 4, 5], [6, 7, 8, 9], [6, 7]],
        "response_lengths": [1, 2, 3, 1],
        "rewards": [0.5, -0.5, -1.0, 1.0],
        "raw_reward": [1.0, 0.0, 2.0, 4.0],
        "truncated": [0, 1, 0, 0],
        "sample_indices": [0, 1, 2, 3],
        "group_indices": [0, 0, 1, 1],
        "rollout_ids": [0, 1, 2, 3],
        "loss_masks": [[1], [1, 1], [1, 0, 1], [0]],
        "rollout_mask_sums": [1, 2, 2, 0],
        "source_names": ["unknown"] * 4,
    }


def test_samples_of_one_rollout_share_its_denominator(make_args, make_sample) -> None:
    samples = four(make_sample)
    samples[1].rollout_id = samples[2].rollout_id = 1
    data = convert_samples_to_train_data(make_args(), samples)
    assert data["rollout_ids"] == [0, 1, 1, 2]
    assert data["rollout_mask_sums"] == [1, 4, 4, 0]


def test_missing_rollout_ids_are_the_smallest_unused() -> None:
    assert fill_rollout_ids([None, 0, None, 5, None]) == [1, 0, 2, 5, 3]
    assert fill_rollout_ids([]) == []
    assert rollout_mask_sums([[1, 1], [1, 0], []], [7, 7, 8]) == [3, 3, 0]


def test_conditional_keys_follow_the_samples(make_args, make_sample) -> None:
    samples = four(make_sample, rollout_log_probs=[-0.5], train_metadata={"a": 1})
    samples[0].metadata = {"round_number": 2, "raw_reward": 9.0, "source_name": "sums"}
    samples[2].multimodal_train_inputs = {"pixel_values": torch.zeros(1)}
    for sample in samples[1:]:
        sample.rollout_log_probs = [0.0] * sample.response_length
    data = convert_samples_to_train_data(make_args(), samples)
    assert data["rollout_log_probs"] == [[-0.5], [0.0, 0.0], [0.0, 0.0, 0.0], [0.0]]
    assert data["metadata"] == [{"a": 1}, None, None, None]
    assert data["round_number"] == [2, None, None, None]
    assert data["raw_reward"] == [9.0, 0.0, 2.0, 4.0]
    assert data["source_names"][0] == "sums"
    assert data["multimodal_train_inputs"][2] is samples[2].multimodal_train_inputs
    assert "teacher_log_probs" not in data


def test_empty_responses_need_no_log_probs(make_args, make_sample) -> None:
    samples = [
        make_sample([1], [], 0.0, status=Sample.Status.ABORTED),
        make_sample([1], [2], 1.0, rollout_log_probs=[-1.0]),
    ]
    data = convert_samples_to_train_data(make_args(), samples)
    assert data["rollout_log_probs"] == [[], [-1.0]]
    assert data["loss_masks"] == [[], [1]]


def test_log_probs_of_some_responses_only_are_an_error_or_unused(make_args, make_sample, caplog) -> None:
    samples = [make_sample([1], [2], index=7, rollout_log_probs=[-1.0]), make_sample([1], [2], index=8)]
    with pytest.raises(
        ValueError, match=r"1 of 2 samples have no rollout_log_probs, the first is number 1 \(index 8\)"
    ):
        convert_samples_to_train_data(make_args(), samples)
    assert "rollout_log_probs" not in convert_samples_to_train_data(make_args(), samples[::-1])
    assert "1 of 2 samples have no rollout_log_probs, so none is used" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_mask": [1]}, "loss_mask of length 1 for 2 response tokens"),
        ({"rollout_log_probs": [0.0] * 3}, "rollout_log_probs of length 3 for 2 response tokens"),
        ({"response_length": 3}, "response_length 3 but 3 tokens"),
    ],
)
def test_contradicting_lengths_name_the_sample(make_args, make_sample, fields, message: str) -> None:
    sample = make_sample([1], [2, 3], index=5)
    for name, value in fields.items():
        setattr(sample, name, value)
    with pytest.raises(ValueError, match=rf"Sample 5 \(number 0 of the rollout\) has .*{message}"):
        convert_samples_to_train_data(make_args(), [sample])


def test_no_samples_are_an_error(make_args) -> None:
    with pytest.raises(ValueError, match="no samples"):
        convert_samples_to_train_data(make_args(), [])


def test_top_p_needs_the_kept_tokens_of_every_response(make_args, make_sample) -> None:
    kept = dict(rollout_top_p_token_ids=[2, 3, 2], rollout_top_p_token_offsets=[0, 2, 3])
    samples = [make_sample([1], [2, 2], **kept), make_sample([1], [])]
    data = convert_samples_to_train_data(make_args(rollout_top_p=0.9), samples)
    assert data["rollout_top_p_token_ids"] == [[2, 3, 2], []]
    assert data["rollout_top_p_token_offsets"] == [[0, 2, 3], [0]]
    assert "rollout_top_p_token_ids" not in convert_samples_to_train_data(make_args(), samples)
    samples[0].rollout_top_p_token_offsets = [0, 3]
    with pytest.raises(ValueError, match=r"2 offsets up to 3 for 2 response tokens and 3 kept ids"):
        convert_samples_to_train_data(make_args(rollout_top_p=0.9), samples)
    samples[0].rollout_top_p_token_ids = None
    with pytest.raises(ValueError, match="does not say which tokens top-p kept"):
        convert_samples_to_train_data(make_args(rollout_top_p=0.9), samples)


def test_routing_to_replay_must_be_recorded_for_every_expert_layer(make_args, make_sample) -> None:
    args = make_args(use_rollout_routing_replay=True, moe_router_topk=2, num_experts=4, moe_layer_freq=[0, 1])
    experts = torch.zeros(2, 2, 2, dtype=torch.int32)
    experts[:, 1] = 3
    sample = make_sample([1], [2, 3], rollout_routed_experts=experts)
    assert convert_samples_to_train_data(args, [sample])["rollout_routed_experts"] == [experts]
    experts[:, 1] = 0
    with pytest.raises(ValueError, match=r"layers \[1\] is all zeros"):
        convert_samples_to_train_data(args, [sample])
    sample.rollout_routed_experts = experts[:, :1]
    with pytest.raises(ValueError, match=r"shape \(2, 1, 2\); expected \(tokens - 1, \*\(2, 2\)\)"):
        convert_samples_to_train_data(args, [sample])
    sample.rollout_routed_experts = None
    with pytest.raises(ValueError, match="no routed experts"):
        convert_samples_to_train_data(args, [sample])


DOCUMENTED = {
    "tokens": [[1, 2], [1, 3]],
    "response_lengths": [1, 1],
    "rewards": [1.0, 0.0],
    "raw_reward": [1.0, 0.0],
    "truncated": [0, 0],
    "sample_indices": [0, 1],
    "loss_masks": [[1], [1]],
}


def test_a_custom_conversion_may_leave_out_rollouts_and_groups(make_args, make_sample, monkeypatch) -> None:
    """The documented dict has neither: every sample is then a rollout of its own."""
    monkeypatch.setattr("slime.data.train_data.load_function", lambda path: lambda args, samples: dict(DOCUMENTED))
    args = make_args(custom_convert_samples_to_train_data_path="mine.convert")
    data = convert_samples_to_train_data(args, [make_sample([1], [2])])
    assert data == DOCUMENTED | {"rollout_ids": [0, 1], "group_indices": [None, None]}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([], "must return a dict of lists; it returned list"),
        ({k: v for k, v in DOCUMENTED.items() if k != "truncated"}, "returned no truncated"),
        (DOCUMENTED | {"rewards": [1.0]}, r"2 token sequences, but of others another number: \{'rewards': 1\}"),
    ],
)
def test_a_wrong_custom_conversion_is_named(make_args, make_sample, monkeypatch, returned, message: str) -> None:
    monkeypatch.setattr("slime.data.train_data.load_function", lambda path: lambda args, samples: returned)
    with pytest.raises(ValueError, match=f"mine.convert.*{message}"):
        convert_samples_to_train_data(
            make_args(custom_convert_samples_to_train_data_path="mine.convert"), [make_sample([1], [2])]
        )
