"""The plan of a rollout's training: every sample once, caps kept, equal counts on all ranks."""

import itertools
import statistics

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slime.data.batch import split_train_data_by_dp
from slime.data.packing import num_packed_tokens, prompt_keys
from slime.data.schedule import SharedPrompts, build_dp_schedule, shares_prompts
from slime.data.train_data import convert_samples_to_train_data
from slime.utils.flops_utils import calculate_fwd_flops

ONE = {"dp_size": 1}
FIXTURES_ARE_FACTORIES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def micro_batches(schedule) -> list[list[list[int]]]:
    """Per rank, its micro-batches as positions in the rollout."""
    return [
        [[partition[i] for i in indices] for indices in rank_indices]
        for partition, rank_indices in zip(schedule.partitions, schedule.micro_batch_indices, strict=True)
    ]


def test_a_small_rollout_by_hand(make_args) -> None:
    """Cap 10, two steps of two rollouts: [6, 3 | 5] -> bins (6, 3), (5); [9 | 2 of rollout 3] -> (9), (2)."""
    schedule = build_dp_schedule(
        make_args(max_tokens_per_gpu=10),
        {"dp_size": 2},
        [6, 3, 5, 9, 2],
        global_batch_size=2,
        rollout_indices=[4, 4, 7, 1, 3],
    )
    assert micro_batches(schedule) == [[[0, 1], [3]], [[2], [4]]]
    assert schedule.partitions == [[0, 1, 3], [2, 4]]
    assert schedule.micro_batch_indices == [[[0, 1], [2]], [[0], [1]]]
    assert schedule.num_microbatches == [1, 1]
    assert schedule.global_batch_sizes == [2, 2]


def test_samples_of_a_rollout_stay_in_one_step(make_args) -> None:
    """Rollout 0 has samples 0 and 3: its step is the first."""
    schedule = build_dp_schedule(
        make_args(max_tokens_per_gpu=100), ONE, [1] * 4, global_batch_size=1, rollout_indices=[0, 1, 1, 0]
    )
    assert micro_batches(schedule) == [[[0, 3], [1, 2]]]


def test_rollouts_that_fill_no_step_are_left_out_with_a_warning(make_args, caplog) -> None:
    schedule = build_dp_schedule(make_args(), ONE, [1] * 5, global_batch_size=2, rollout_indices=range(5))
    assert schedule.partitions == [[0, 1, 2, 3]]
    assert "1 of 5 rollouts are not trained" in caplog.text


@st.composite
def plans(draw: st.DrawFn):
    num_samples = draw(st.integers(4, 14))
    dp_size = draw(st.integers(1, 3))
    groups = [draw(st.integers(0, 3)) for _ in range(num_samples)]
    responses = [draw(st.integers(0, 12)) for _ in range(num_samples)]
    tokens = [torch.tensor([g + 1] * (g + 1) + [9] * r) for g, r in zip(groups, responses, strict=True)]
    return dp_size, groups, responses, tokens


@settings(max_examples=100, deadline=None, suppress_health_check=FIXTURES_ARE_FACTORIES)
@given(plans(), st.booleans(), st.sampled_from(["first fit", "flops", "balanced"]), st.integers(4, 40))
def test_every_sample_lands_once_within_the_cap_on_ranks_with_equal_counts(
    make_args, plan, shares: bool, how: str, cap: int
) -> None:
    dp_size, groups, responses, tokens = plan
    args = make_args(max_tokens_per_gpu=cap, balance_by_flops=how == "flops", balance_data=how != "first fit")
    keys = prompt_keys(tokens, responses, groups)
    num_samples = len(tokens) // dp_size * dp_size  # any number of bins up to this one can be aligned
    totals = [t.numel() for t in tokens[:num_samples]]
    schedule = build_dp_schedule(
        args,
        {"dp_size": dp_size},
        totals,
        global_batch_size=num_samples,
        rollout_indices=range(num_samples),
        shared_prompts=SharedPrompts(responses[:num_samples], keys[:num_samples]) if shares else None,
    )
    assert sorted(itertools.chain(*schedule.partitions)) == list(range(num_samples))
    assert [len(indices) for indices in schedule.micro_batch_indices] == schedule.num_microbatches * dp_size
    for partition, indices in zip(schedule.partitions, schedule.micro_batch_indices, strict=True):
        assert list(itertools.chain(*indices)) == list(range(len(partition)))
    for micro_batch in itertools.chain(*micro_batches(schedule)):
        assert micro_batch
        size = num_packed_tokens(
            [totals[i] for i in micro_batch],
            [responses[i] for i in micro_batch],
            [keys[i] for i in micro_batch] if shares else None,
        )
        visible = [i for i in micro_batch if responses[i] > 0 or not shares]
        assert size <= cap or len(visible) == 1 or how == "flops"


def test_a_group_whose_prompt_is_shared_fits_one_micro_batch(make_args) -> None:
    """Prompts of 6, responses of 3, cap 12: 6 + 3 x 2 rows; whole sequences of 9 would be one micro-batch each."""
    totals, responses, keys = [9] * 6, [3] * 6, [0, 1, 0, 1, 0, 1]
    plan = dict(global_batch_size=6, rollout_indices=range(6))
    args = make_args(max_tokens_per_gpu=12)
    shared = build_dp_schedule(args, ONE, totals, **plan, shared_prompts=SharedPrompts(responses, keys))
    assert micro_batches(shared) == [[[0, 2, 4], [1, 3, 5]]]
    assert build_dp_schedule(args, ONE, totals, **plan).num_microbatches == [6]


def test_an_empty_response_brings_no_prompt_that_others_could_share(make_args) -> None:
    """Cap 4: the prompt of 1 must be counted with the response of 5, although an empty response of its group came
    before it."""
    schedule = build_dp_schedule(
        make_args(max_tokens_per_gpu=4),
        ONE,
        [1, 2, 6],
        global_batch_size=3,
        rollout_indices=range(3),
        shared_prompts=SharedPrompts([0, 1, 5], [0, 0, 0]),
    )
    assert micro_batches(schedule) == [[[0, 1], [2]]]


def test_aligning_splits_the_heaviest_micro_batch_between_its_groups(make_args) -> None:
    keys = [0, 1, 0, 1]
    schedule = build_dp_schedule(
        make_args(max_tokens_per_gpu=100),
        {"dp_size": 2},
        [9] * 4,
        global_batch_size=4,
        rollout_indices=range(4),
        shared_prompts=SharedPrompts([3] * 4, keys),
    )
    assert micro_batches(schedule) == [[[0, 2]], [[1, 3]]]


def test_interleaved_stages_need_whole_groups_of_micro_batches(make_args) -> None:
    config = {"dp_size": 2, "vpp_size": 2, "microbatch_group_size_per_vp_stage": 2}
    schedule = build_dp_schedule(make_args(), config, [1] * 8, global_batch_size=8, rollout_indices=range(8))
    assert schedule.num_microbatches == [2]
    config["vpp_size"] = 1
    schedule = build_dp_schedule(make_args(), config, [1] * 8, global_batch_size=8, rollout_indices=range(8))
    assert schedule.num_microbatches == [1]


def test_context_parallel_ranks_hold_a_longer_micro_batch_together(make_args) -> None:
    args = make_args(max_tokens_per_gpu=10)
    plan = dict(global_batch_size=4, rollout_indices=range(4))
    assert build_dp_schedule(args, {"dp_size": 1, "cp_size": 2}, [10] * 4, **plan).num_microbatches == [2]


def test_static_micro_batches_are_consecutive_and_dealt_in_turn(make_args) -> None:
    args = make_args(use_dynamic_batch_size=False, micro_batch_size=2)
    schedule = build_dp_schedule(args, {"dp_size": 2}, [5] * 8, global_batch_size=8, rollout_indices=range(8))
    assert micro_batches(schedule) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_balancing_gives_ranks_equal_work_that_dealing_in_turn_does_not(make_args) -> None:
    args = make_args(max_tokens_per_gpu=1, balance_data=False)
    totals = [8, 1, 8, 1]
    plan = dict(global_batch_size=4, rollout_indices=range(4))
    dealt = build_dp_schedule(args, {"dp_size": 2}, totals, **plan)
    assert [sum(totals[i] for i in p) for p in dealt.partitions] == [16, 2]
    args.balance_data = True
    balanced = build_dp_schedule(args, {"dp_size": 2}, totals, **plan)
    assert [sum(totals[i] for i in p) for p in balanced.partitions] == [9, 9]


MODEL = dict(
    num_layers=36, hidden_size=2560, ffn_hidden_size=9728, num_attention_heads=32, num_query_groups=8, kv_channels=128,
    vocab_size=151936,
)  # fmt: skip
"""Of a size where attention over long sequences costs as much as the matrices."""


def imbalance(args, schedule, totals: list[int]) -> float:
    """FLOPs of the rank that has most over the mean, less 1: the share of a step that the others wait."""
    work = [calculate_fwd_flops([totals[i] for i in partition], args) for partition in schedule.partitions]
    return max(work) * len(work) / sum(work) - 1


@pytest.mark.parametrize("how", [dict(balance_data=True), dict(balance_by_flops=True, balance_data=True)])
def test_ranks_wait_less_for_each_other_than_in_plain_order(make_args, how: dict[str, bool]) -> None:
    """Long-tailed responses on 8 ranks, many steps: with the work balanced, ranks wait for each other at most a quarter
    of what they wait in plain order."""
    plain, balanced = [], []
    for seed in range(20):
        lengths = torch.distributions.LogNormal(7.0, 0.9)
        torch.manual_seed(seed)
        totals = lengths.sample((256,)).clamp(64, 16384).int().tolist()
        plan = dict(global_batch_size=256, rollout_indices=range(256))
        for found, flags in ((plain, {}), (balanced, how)):
            args = make_args(max_tokens_per_gpu=16384, **MODEL, **flags)
            found.append(imbalance(args, build_dp_schedule(args, {"dp_size": 8}, totals, **plan), totals))
    print(f"{how}: ranks wait {statistics.mean(balanced):.4f} of a step, {statistics.mean(plain):.4f} in plain order")
    assert statistics.mean(balanced) < statistics.mean(plain) / 4


def test_work_is_balanced_not_tokens(make_args) -> None:
    """One sequence of 12,000 tokens is more work than twelve of 1,000, and the ranks' tokens differ accordingly."""
    totals = [12_000, 12_000, *[1_000] * 24]
    args = make_args(max_tokens_per_gpu=1, balance_data=True, **MODEL)
    plan = dict(global_batch_size=26, rollout_indices=range(26))
    schedule = build_dp_schedule(args, {"dp_size": 2}, totals, **plan)
    assert imbalance(args, schedule, totals) < 0.01
    assert all(max(totals[i] for i in partition) == 12_000 for partition in schedule.partitions)


def test_a_sample_beyond_the_cap_is_alone_and_announced(make_args, caplog) -> None:
    schedule = build_dp_schedule(
        make_args(max_tokens_per_gpu=10), ONE, [3, 25, 3], global_batch_size=3, rollout_indices=range(3)
    )
    assert micro_batches(schedule) == [[[0, 2], [1]]]
    assert "1 of 3 samples have more than --max-tokens-per-gpu 10 x CP 1 tokens (the longest 25)" in caplog.text


@pytest.mark.parametrize(
    ("changes", "config", "num_samples", "global_batch_size", "message"),
    [
        ({}, ONE, 3, 4, r"3 rollouts \(3 samples\) do not fill one step of --global-batch-size 4"),
        ({}, {"dp_size": 4}, 3, 3, r"Step 0 has 3 samples for 4 data-parallel ranks"),
        (
            {"max_tokens_per_gpu": 1},
            {"dp_size": 2},
            3,
            3,
            r"3 samples fills 3 micro-batches of --max-tokens-per-gpu 1;.*2 data-parallel ranks, and 4 would be more",
        ),
        (
            {"use_dynamic_batch_size": False, "micro_batch_size": 2},
            {"dp_size": 2},
            6,
            6,
            r"6 samples makes 3 micro-batches of --micro-batch-size 2, which must be a multiple of the 2",
        ),
    ],
)
def test_steps_that_cannot_be_divided_say_the_numbers(
    make_args, changes, config, num_samples: int, global_batch_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_dp_schedule(
            make_args(**changes),
            config,
            [5] * num_samples,
            global_batch_size=global_batch_size,
            rollout_indices=range(num_samples),
        )


def test_prompts_are_shared_only_where_a_row_may_hold_parts_of_sequences(make_args) -> None:
    assert shares_prompts(make_args(), ONE)
    assert not shares_prompts(make_args(), {"dp_size": 1, "cp_size": 2})
    assert not shares_prompts(make_args(), {"dp_size": 1, "share_prompts": False})
    for changes in (
        {"loss_type": "custom_loss"},
        {"share_group_prompts": False},
        {"num_experts": 8},
        {"enable_mtp_training": True},
    ):
        assert not shares_prompts(make_args(**changes), ONE)


# --- the shards ---


@pytest.fixture
def shards(make_args, make_sample):
    samples = [
        make_sample([1, 2], [3], 1.0, index=10, group_index=0, rollout_log_probs=[-0.5]),
        make_sample([1, 2], [4, 5], 0.0, index=11, group_index=0, rollout_log_probs=[-0.1, -0.2]),
        make_sample([6], [7, 8], 2.0, index=12, group_index=1, rollout_log_probs=[-1.0, 0.0], loss_mask=[1, 0]),
        make_sample([6], [7], 4.0, index=13, group_index=1, rollout_log_probs=[-2.0]),
    ]
    args = make_args(max_tokens_per_gpu=4)
    return split_train_data_by_dp(args, convert_samples_to_train_data(args, samples), {"dp_size": 2})


def test_each_rank_gets_its_samples_as_tensors(shards) -> None:
    """Cap 4 with shared prompts: samples 0 and 1 need 2 + 0 + 1 rows, and 2 and 3 need 1 + 1 + 0 more, 5 in all."""
    first, second = shards
    assert first["partition"] == [0, 1]
    assert second["partition"] == [2, 3]
    assert [t.tolist() for t in second["tokens"]] == [[6, 7, 8], [6, 7]]
    assert all(t.dtype == torch.long for t in second["tokens"])
    assert [m.tolist() for m in second["loss_masks"]] == [[1, 0], [1]]
    assert all(m.dtype == torch.int for m in second["loss_masks"])
    assert all(p.dtype == torch.float32 for p in second["rollout_log_probs"])
    assert second["rollout_mask_sums"].tolist() == [1.0, 1.0]
    assert second["rollout_mask_sums"].dtype == torch.float32
    assert second["sample_indices"] == [12, 13]
    assert second["group_indices"] == [1, 1]
    assert second["response_lengths"] == [2, 1]


def test_every_rank_gets_the_schedule_and_what_concerns_the_whole_rollout(shards) -> None:
    for shard in shards:
        assert shard["raw_reward"] == [1.0, 0.0, 2.0, 4.0]
        assert shard["total_lengths"] == [3, 4, 3, 2]
        assert shard["micro_batch_indices"] == [[0, 1]]
        assert shard["num_microbatches"] == [1]
        assert shard["global_batch_sizes"] == [4]
        assert "metadata" not in shard


def test_the_documented_custom_dict_is_split_too(make_args) -> None:
    """No rollout ids, no mask sums, no groups; numpy arrays of a processor become tensors, the rest stays."""
    numpy = pytest.importorskip("numpy")
    data = {
        "tokens": [[1, 2], [1, 3]],
        "response_lengths": [1, 1],
        "rewards": [1.0, 0.0],
        "raw_reward": [1.0, 0.0],
        "truncated": [0, 0],
        "sample_indices": [0, 1],
        "loss_masks": [[1], [1]],
        "multimodal_train_inputs": [{"pixel_values": numpy.ones(2), "kind": "image"}, None],
    }
    (shard,) = split_train_data_by_dp(make_args(global_batch_size=2), data, ONE)
    assert shard["partition"] == [0, 1]
    assert "rollout_mask_sums" not in shard
    assert shard["multimodal_train_inputs"][0]["pixel_values"].tolist() == [1.0, 1.0]
    assert shard["multimodal_train_inputs"][0]["kind"] == "image"
    assert shard["multimodal_train_inputs"][1] is None


def test_a_hooks_own_kinds_of_numbers_are_taken(make_args) -> None:
    """Floats for a mask, tensors for tokens, no token that was generated."""
    data = {
        "tokens": [torch.tensor([1, 2]), [torch.tensor(1)]],
        "response_lengths": [1, 0],
        "rewards": [1.0, 0.0],
        "raw_reward": [1.0, 0.0],
        "loss_masks": [[1.0], []],
        "rollout_log_probs": [[-1], []],
    }
    (shard,) = split_train_data_by_dp(make_args(global_batch_size=2), data, ONE)
    assert [tokens.tolist() for tokens in shard["tokens"]] == [[1, 2], [1]]
    assert [mask.tolist() for mask in shard["loss_masks"]] == [[1], []]
    assert [probs.tolist() for probs in shard["rollout_log_probs"]] == [[-1.0], []]
    assert {tensor.dtype for tensor in (*shard["tokens"], *shard["loss_masks"])} == {torch.long, torch.int}
    assert {probs.dtype for probs in shard["rollout_log_probs"]} == {torch.float32}


def test_what_is_no_number_is_refused(make_args) -> None:
    data = {"tokens": [[1, 2]], "response_lengths": [1], "rewards": [1.0], "raw_reward": [1.0]}
    with pytest.raises((TypeError, RuntimeError)):
        split_train_data_by_dp(make_args(global_batch_size=1), data | {"rollout_log_probs": [[None]]}, ONE)


def test_a_list_of_another_length_is_refused(make_args) -> None:
    data = {"tokens": [[1, 2]], "response_lengths": [1], "rewards": [1.0, 2.0], "raw_reward": [1.0]}
    with pytest.raises(ValueError, match="1 token sequences but 2 of rewards"):
        split_train_data_by_dp(make_args(global_batch_size=1), data, ONE)
