"""Sample: what is appended to a response stays in step with it, and a sample survives a trip through plain data."""

import base64
import copy
from argparse import Namespace

import pytest
import torch

from slime.utils.types import MultimodalTypes, Sample


def int32(*values: int) -> str:
    return base64.b64encode(torch.tensor(values, dtype=torch.int32).numpy().tobytes()).decode()


def test_appended_tokens_carry_mask_and_log_probs_with_them():
    sample = Sample(tokens=[1, 2])
    sample.append_response_tokens(tokens=[3, 4], log_probs=[-0.5, -0.25], text="ab")
    sample.append_response_tokens(tokens=torch.tensor([5]), trainable=False, text="tool")
    sample.append_response_tokens(tokens=[6], log_probs=torch.tensor([-1.0]), text="c")
    assert sample.tokens == [1, 2, 3, 4, 5, 6]
    assert sample.response == "abtoolc"
    assert sample.response_length == 4
    assert sample.loss_mask == [1, 1, 0, 1]
    assert sample.rollout_log_probs == [-0.5, -0.25, 0.0, -1.0]
    assert sample.effective_response_length == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": [1, 2], "log_probs": [-1.0]}, "2 tokens came with 1"),
        ({"tokens": [1]}, "need the log-probs"),
        ({"tokens": [1], "log_probs": [-1.0], "trainable": False}, "have no log-probs"),
    ],
)
def test_tokens_and_log_probs_that_disagree_change_nothing(arguments, message):
    sample = Sample(tokens=[9], metadata={"a": 1})
    before = copy.deepcopy(sample)
    with pytest.raises(ValueError, match=message):
        sample.append_response_tokens(text="x", **arguments)
    assert sample == before


def test_trained_tokens_cannot_follow_a_response_without_log_probs():
    sample = Sample(tokens=[1, 2], response_length=1)
    with pytest.raises(ValueError, match="without rollout_log_probs"):
        sample.append_response_tokens(tokens=[3], log_probs=[-1.0])
    sample.append_response_tokens(tokens=[], log_probs=[])
    assert sample.rollout_log_probs == [0.0]
    sample.append_response_tokens(tokens=[3], log_probs=[-1.0])
    assert sample.rollout_log_probs == [0.0, -1.0]
    assert sample.loss_mask == [1, 1]


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("stop", Sample.Status.COMPLETED),
        ("length", Sample.Status.TRUNCATED),
        ("abort", Sample.Status.ABORTED),
        ("other", Sample.Status.PENDING),
    ],
)
def test_the_finish_reason_decides_the_status(kind, status):
    sample = Sample()
    sample.append_response_tokens(meta_info={"finish_reason": {"type": kind}, "weight_version": "7"})
    assert sample.status is status
    assert sample.weight_versions == ["7"]


def test_spans_tell_every_weight_version_that_made_tokens():
    spans = [
        {"version": "1", "start": 0, "end": 0},
        {"version": "2", "start": 0, "end": 5},
        {"version": "3", "start": 5, "end": 8},
    ]
    sample = Sample()
    sample.append_response_tokens(
        meta_info={"finish_reason": {"type": "stop"}, "weight_version": "3", "weight_versions": spans}
    )
    assert sample.weight_versions == ["2", "3"]


def test_terminal_information_is_left_alone_on_request():
    sample = Sample()
    meta = {"finish_reason": {"type": "stop"}, "weight_version": "7", "cached_tokens": 3, "prompt_tokens": 4}
    sample.append_response_tokens(meta_info=meta, update_terminal_info=False)
    assert sample.status is Sample.Status.PENDING
    assert sample.weight_versions == []
    sample.append_response_tokens(meta_info=meta)
    assert sample.prefix_cache_info.prefix_cache_hit_rate == 0.75


def test_speculation_is_counted_only_when_the_run_speculates():
    meta = {"finish_reason": {"type": "stop"}, "completion_tokens": 6, "spec_verify_ct": 2}
    meta |= {"spec_accept_token_num": 3, "spec_draft_token_num": 4}
    sample = Sample()
    sample.append_response_tokens(Namespace(sglang_speculative_algorithm=None), meta_info=meta)
    assert sample.spec_info == Sample.SpecInfo()
    sample.append_response_tokens(Namespace(sglang_speculative_algorithm="EAGLE"), meta_info=meta)
    assert (sample.spec_info.spec_accept_rate, sample.spec_info.spec_accept_length) == (0.75, 3.0)


def test_top_p_vocabularies_of_several_replies_are_joined():
    sample = Sample(tokens=[1])
    first = {"top_p_token_ids": int32(10, 11, 12), "top_p_token_offsets": int32(0, 2, 3)}
    sample.append_response_tokens(tokens=[2, 3], log_probs=[-1, -1], meta_info=first)
    sample.append_response_tokens(tokens=[4], trainable=False)
    second = {"top_p_kept_token_ids": [20], "top_p_kept_token_offsets": [0, 1]}
    sample.append_response_tokens(tokens=[5], log_probs=[-1], meta_info=second)
    assert sample.rollout_top_p_token_ids.tolist() == [10, 11, 12, 20]
    assert sample.rollout_top_p_token_offsets.tolist() == [0, 2, 3, 3, 4]


@pytest.mark.parametrize(
    "meta",
    [
        {"top_p_token_ids": [1]},
        {"top_p_token_ids": [1], "top_p_token_offsets": [0, 1]},
        {"top_p_token_ids": [1], "top_p_token_offsets": [1, 1, 1]},
        {"top_p_token_ids": [1], "top_p_token_offsets": [0, 1, 2]},
    ],
)
def test_top_p_arrays_that_do_not_fit_are_refused(meta):
    sample = Sample(tokens=[1])
    with pytest.raises(ValueError, match="top-p"):
        sample.append_response_tokens(tokens=[2, 3], log_probs=[-1, -1], meta_info=meta)
    assert sample.tokens == [1]


def test_routed_experts_continue_where_they_say_they_start():
    args = Namespace(num_layers=2, moe_router_topk=1)
    sample = Sample(tokens=[1, 2])
    sample.append_response_tokens(args, tokens=[3], log_probs=[-1], meta_info={"routed_experts": int32(0, 1, 2, 3)})
    assert sample.rollout_routed_experts.tolist() == [[[0], [1]], [[2], [3]]]
    more = {"routed_experts": int32(8, 9, 6, 7), "routed_experts_start_len": 1}
    sample.append_response_tokens(args, tokens=[4], log_probs=[-1], meta_info=more)
    assert sample.rollout_routed_experts.tolist() == [[[0], [1]], [[8], [9]], [[6], [7]]]


@pytest.mark.parametrize(
    ("args", "start", "message"),
    [(None, 0, "need args"), (True, -1, "negative"), (True, 1, "none before it"), (True, 0, "2 x 2 layers")],
)
def test_routed_experts_that_do_not_fit_are_refused(args, start, message):
    args = args and Namespace(num_layers=2, moe_router_topk=1)
    sample = Sample(tokens=[1, 2])
    meta = {"routed_experts": int32(0, 1), "routed_experts_start_len": start}
    with pytest.raises(ValueError, match=message):
        sample.append_response_tokens(args, tokens=[3], log_probs=[-1], meta_info=meta)


def test_a_sample_comes_back_from_plain_data_with_foreign_attributes():
    sample = Sample(index=3, prompt="p", reward={"score": 1.0}, status=Sample.Status.TRUNCATED)
    sample.spec_info.spec_verify_ct = 2
    sample.prefix_cache_info.cached_tokens = 5
    sample.source = "gsm8k"
    data = sample.to_dict()
    assert (data["status"], data["spec_info"]["spec_verify_ct"]) == ("truncated", 2)
    untouched = copy.deepcopy(data)
    back = Sample.from_dict(data)
    assert data == untouched
    assert back == sample
    assert back.source == "gsm8k"
    assert Sample.from_dict({"index": 1}) == Sample(index=1)


def test_the_reward_key_picks_the_reward_that_trains():
    sample = Sample(reward={"score": 0.5})
    assert sample.get_reward_value(Namespace(reward_key="score")) == 0.5
    assert sample.get_reward_value(Namespace(reward_key=None)) == {"score": 0.5}
    with pytest.raises(ValueError, match="--reward-key 'acc'"):
        sample.get_reward_value(Namespace(reward_key="acc"))


def test_placeholders_are_known_by_name():
    assert [kind.placeholder for kind in MultimodalTypes.all()] == ["<image>", "<video>", "<audio>"]
    assert MultimodalTypes.get("video").placeholder == "<video>"
    assert MultimodalTypes.get("smell") is None
