"""What a rollout says about itself, on samples whose numbers can be checked by hand."""

import math
import random
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from slime.observability import logging_utils, metric_names
from slime.observability.metric_utils import (
    compression_ratio,
    compute_pass_rate,
    compute_rollout_step,
    compute_statistics,
    dict_add_prefix,
    has_repetition,
)
from slime.observability.rollout_metrics import (
    eval_metrics,
    flatten_samples,
    log_eval_rollout_data,
    log_rollout_data,
    rollout_metrics,
)
from slime.utils.types import Sample


def sample(length: int = 4, reward: Any = 1.0, **fields: Any) -> Sample:
    return Sample(response_length=length, reward=reward, status=Sample.Status.COMPLETED, **fields)


def test_rewards_lengths_and_truncation() -> None:
    samples = [
        [sample(10, 1.0, group_index=0), sample(2, 0.0, group_index=0)],
        [sample(6, 0.0, group_index=1, loss_mask=[1, 0, 0, 1, 1, 1]), sample(2, 0.5, group_index=1)],
    ]
    samples[1][1].status = Sample.Status.TRUNCATED
    result = rollout_metrics(Namespace(), samples, {"rollout/dynamic_filter/drop_x": 3}, elapsed_s=2.0)
    assert result["rollout/raw_reward"] == pytest.approx(0.375)
    assert result["rollout/response_len/mean"] == pytest.approx((10 + 2 + 4 + 2) / 4)
    assert result["rollout/response_len/max"] == 10 and result["rollout/response_len/min"] == 2
    assert result["rollout/response_len/median"] == 3
    assert result["rollout/truncated_ratio"] == 0.25 and result["rollout/num_samples"] == 4
    assert result["rollout/dynamic_filter/drop_x"] == 3
    assert result["perf/rollout_time"] == 2.0
    assert metric_names.undeclared(result) == []


def test_groups_without_a_gradient_are_counted_by_their_reward() -> None:
    groups = [(0, [1.0, 1.0]), (1, [0.0, 0.0]), (2, [0.0, 1.0]), (3, [0.0, 0.0])]
    samples = [sample(reward=reward, group_index=index) for index, rewards in groups for reward in rewards]
    result = rollout_metrics(Namespace(advantage_estimator="grpo"), samples, None, 1.0)
    counts = {name: value for name, value in result.items() if "zero_std" in name}
    assert counts == {"rollout/zero_std/count_0.0": 2, "rollout/zero_std/count_1.0": 1}
    with_critic = rollout_metrics(Namespace(advantage_estimator="ppo"), samples, None, 1.0)
    assert not [name for name in with_critic if "zero_std" in name]


def test_samples_of_one_group_need_not_lie_next_to_each_other() -> None:
    samples = [sample(reward=r, group_index=g) for g, r in ((0, 1.0), (1, 0.0), (0, 1.0), (1, 1.0))]
    result = rollout_metrics(Namespace(), samples, None, 1.0)
    assert {n: v for n, v in result.items() if "zero_std" in n} == {"rollout/zero_std/count_1.0": 1}


def test_the_reward_key_chooses_from_a_dict() -> None:
    samples = [sample(reward={"score": 1.0, "acc": 0}), sample(reward={"score": -1.0, "acc": 1})]
    assert rollout_metrics(Namespace(reward_key="score"), samples, None, 1.0)["rollout/raw_reward"] == 0.0
    assert "rollout/raw_reward" not in rollout_metrics(Namespace(reward_key=None), samples, None, 1.0)


def test_a_missing_reward_leaves_no_false_mean() -> None:
    samples = [sample(reward=1.0), sample(reward=None)]
    assert "rollout/raw_reward" not in rollout_metrics(Namespace(), samples, None, 1.0)


def test_categories_of_a_dict_reward_are_shares_of_all_samples() -> None:
    rewards: list[Any] = [{"score": 0, "why": "format"}, {"score": 0, "why": "format"}, {"score": 1, "why": "ok"}, 0.0]
    result = rollout_metrics(Namespace(log_reward_category="why"), [sample(reward=r) for r in rewards], None, 1.0)
    assert result["rollout/error_cat/format"] == 0.5 and result["rollout/error_cat/ok"] == 0.25


def test_staleness_is_measured_against_the_newest_version() -> None:
    samples = [sample(weight_versions=["3"]), sample(weight_versions=["1", "3"]), sample(weight_versions=["2", "2"])]
    result = rollout_metrics(Namespace(), samples, None, 1.0)
    assert result["rollout/weight_version_lag/mean"] == pytest.approx(1.0)
    assert result["rollout/weight_version_lag/max"] == 2
    assert result["rollout/weight_version_mixed_ratio"] == pytest.approx(1 / 3)


def test_speed_is_per_device_and_leaves_out_time_in_tools() -> None:
    samples = [sample(100, non_generation_time=0.0), sample(40, non_generation_time=6.0, loss_mask=[1] * 10 + [0] * 30)]
    result = rollout_metrics(Namespace(rollout_num_gpus=2), samples, None, elapsed_s=10.0)
    assert result["perf/tokens_per_gpu_per_sec"] == 7.0
    assert result["perf/effective_tokens_per_gpu_per_sec"] == 5.5
    assert result["perf/longest_sample_tokens_per_sec"] == 10.0
    assert result["perf/non_generation_time/mean"] == 3.0
    slow = [sample(40, non_generation_time=6.0)]
    result = rollout_metrics(Namespace(rollout_num_gpus=2), slow, None, elapsed_s=10.0)
    assert result["perf/longest_sample_tokens_per_sec_without_non_generation"] == 10.0
    assert result["perf/longest_sample_non_generation_time"] == 6.0
    assert metric_names.undeclared(result) == []


def test_engine_counters_are_weighted_by_tokens_not_by_samples() -> None:
    samples = [sample(), sample()]
    samples[0].prefix_cache_info = Sample.PrefixCacheInfo(cached_tokens=90, total_prompt_tokens=100)
    samples[1].prefix_cache_info = Sample.PrefixCacheInfo(cached_tokens=0, total_prompt_tokens=20)
    samples[0].spec_info = Sample.SpecInfo(6, 8, 4, 12)
    result = rollout_metrics(Namespace(sglang_speculative_algorithm="EAGLE"), samples, None, 1.0)
    assert result["rollout/prefix_cache_hit_rate"] == 0.75
    assert result["rollout/avg_cached_tokens_per_sample"] == 45
    assert result["rollout/spec_accept_rate"] == 0.75 and result["rollout/spec_accept_length"] == 3


def test_the_nucleus_is_counted_per_token() -> None:
    samples = [sample(2, rollout_top_p_token_ids=[1, 2, 3], rollout_top_p_token_offsets=[0, 1, 3]), sample(3)]
    assert rollout_metrics(Namespace(), samples, None, 1.0)["rollout/top_p_kept_vocab_per_token"] == 1.5


def test_pass_rates_are_over_whole_groups() -> None:
    samples = [sample(reward=r, group_index=g) for g, r in ((0, 1.0), (0, 0.0), (1, 0.0), (1, 0.0), (2, 1.0))]
    result = rollout_metrics(Namespace(log_passrate=True, n_samples_per_prompt=2), samples, None, 1.0)
    assert {n: v for n, v in result.items() if n.startswith("passrate/")} == {
        "passrate/pass@1": 0.25,
        "passrate/pass@2": 0.5,
    }


def test_conversations_are_measured_with_and_without_what_tools_said() -> None:
    samples = [sample(4, loss_mask=[1, 0, 0, 1], metadata={"round_number": 3}), sample(2)]
    result = rollout_metrics(Namespace(log_multi_turn=True), samples, None, 1.0)
    assert result["multi_turn/raw_response_length/response_length_max"] == 4
    assert result["multi_turn/wo_obs_response_length/response_length_mean"] == 2
    assert result["multi_turn/multi_turn_metric/round_number_min"] == 3
    assert metric_names.undeclared(result) == []


def test_the_correct_samples_can_be_measured_on_their_own() -> None:
    samples = [sample(10, 1.0), sample(2, 0.0), sample(6, 1.0)]
    result = rollout_metrics(Namespace(log_correct_samples=True), samples, None, 1.0)
    assert result["rollout/correct/num_samples"] == 2 and result["rollout/correct/response_len/mean"] == 8
    assert metric_names.undeclared(result) == []


def test_an_empty_rollout_has_a_time_and_nothing_else() -> None:
    assert rollout_metrics(Namespace(), [], None, 1.0) == {"perf/rollout_time": 1.0}


def test_an_evaluation_gives_each_task_its_mean_pass_at_k_and_truncation() -> None:
    data = {
        "gsm8k": {
            "rewards": [1, 0, 0, 0],
            "truncated": [False, True, False, False],
            "samples": [sample(3, 1.0, response=text) for text in "aabc"],
        },
        "aime": {"rewards": [0.5]},
    }
    args = Namespace(n_samples_per_eval_prompt=1, eval_datasets=[Namespace(name="gsm8k", n_samples_per_eval_prompt=2)])
    result = eval_metrics(args, data, {"eval/extra-pass@1": 0.0})
    assert result["eval/gsm8k"] == 0.25 and result["eval/aime"] == 0.5
    assert result["eval/gsm8k-truncated_ratio"] == 0.25
    assert result["eval/gsm8k-pass@1"] == 0.25 and result["eval/gsm8k-pass@2"] == 0.5
    assert result["eval/gsm8k/distinct_responses"] == 3 and result["eval/gsm8k/response_len/mean"] == 3
    assert result["eval/extra-pass@1"] == 0.0
    assert not [name for name in result if name.startswith("eval/aime-")]
    assert metric_names.undeclared(result) == []


def test_logging_collects_until_the_driver_takes_it() -> None:
    logging_utils.take_pending()
    log_rollout_data(5, Namespace(), [sample()], {"rollout/retokenized": 1}, 2.0)
    log_eval_rollout_data(5, Namespace(), {"gsm8k": {"rewards": [1.0]}})
    taken = logging_utils.take_pending()
    assert taken["rollout/step"] == 5 and taken["eval/step"] == 5
    assert taken["rollout/retokenized"] == 1 and taken["eval/gsm8k"] == 1.0
    assert logging_utils.take_pending() == {}


def test_metrics_without_their_step_are_refused() -> None:
    with pytest.raises(ValueError, match="lack their step 'train/step'"):
        logging_utils.log(Namespace(), {"train/loss": 1.0}, "train/step")


def test_a_log_hook_that_returns_true_takes_over(tmp_path: Path) -> None:
    (tmp_path / "hook.py").write_text(
        "def quiet(rollout_id, args, samples, rollout_extra_metrics, rollout_time):\n"
        "    args.seen = (rollout_id, len(samples), rollout_extra_metrics, rollout_time)\n"
        "    return args.takes_over\n"
        "def quiet_eval(rollout_id, args, data, extra_metrics):\n"
        "    return True\n"
    )
    logging_utils.take_pending()
    args = Namespace(custom_rollout_log_function_path=f"{tmp_path}/hook.py:quiet", takes_over=True)
    log_rollout_data(1, args, [sample()], {"a": 1}, 2.0)
    assert args.seen == (1, 1, {"a": 1}, 2.0) and logging_utils.take_pending() == {}
    args.takes_over = False
    log_rollout_data(1, args, [sample()], None, 2.0)
    assert logging_utils.take_pending()["rollout/num_samples"] == 1
    args = Namespace(custom_eval_rollout_log_function_path=f"{tmp_path}/hook.py:quiet_eval")
    assert log_eval_rollout_data(1, args, {"gsm8k": {"rewards": [1.0]}}) == {}
    assert logging_utils.take_pending() == {}


def test_a_replayed_rollout_is_not_logged_as_new() -> None:
    logging_utils.take_pending()
    log_rollout_data(1, Namespace(load_debug_rollout_data="x.pt"), [sample()], None, 2.0)
    assert logging_utils.take_pending() == {}


def test_flattening_keeps_the_order() -> None:
    a, b, c, d = (sample(reward=i) for i in range(4))
    assert flatten_samples([[a, [b]], (c,), d]) == [a, b, c, d]


def test_statistics() -> None:
    assert compute_statistics([3, 1, 8]) == {"mean": 4.0, "median": 3.0, "max": 8.0, "min": 1.0}
    assert compute_statistics([]) == {}
    assert dict_add_prefix({"a": 1}, "x/") == {"x/a": 1}


def test_pass_at_k_is_the_chance_of_drawing_a_correct_sample() -> None:
    """Of 4 samples 1 is correct: one draw finds it with 1/4, two with 1/2, all four surely."""
    assert compute_pass_rate([0, 1, 0, 0], 4) == {"pass@1": 0.25, "pass@2": 0.5, "pass@4": 1.0}
    assert compute_pass_rate([1, 1, 0.5, 0], 2) == {"pass@1": 0.5, "pass@2": 0.5}
    assert compute_pass_rate([1, 0], 1) == {}


def test_pass_at_k_agrees_with_counting_every_draw() -> None:
    from itertools import combinations

    rewards = [1, 0, 0, 1, 0, 0]
    for k in (1, 2, 4):
        draws = list(combinations(rewards, k))
        expected = sum(1 in draw for draw in draws) / len(draws)
        assert compute_pass_rate(rewards, 6)[f"pass@{k}"] == pytest.approx(expected)


def test_pass_at_k_of_broken_groups_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 rewards are not 1 groups of 2"):
        compute_pass_rate([1, 0, 1], 2)


def test_only_long_loops_count_as_repetition() -> None:
    assert not has_repetition("again " * 1000)
    assert has_repetition("again " * 3000)
    assert not has_repetition("".join(random.Random(0).choices("abcdefghij ", k=12_000)))
    assert has_repetition("".join(str(i) for i in range(5000)) + "x" * 10_000)


def test_compression_ratio_is_before_over_after() -> None:
    ratio, saved_percent = compression_ratio("a" * 1000)
    assert ratio > 10 and math.isclose(saved_percent, 100 * (1 - 1 / ratio))
    assert compression_ratio("") == (1.0, 0.0)
    assert compression_ratio(b"a" * 1000, algorithm="lzma")[0] > 5
    with pytest.raises(ValueError, match="lz4"):
        compression_ratio("a", algorithm="lz4")


def test_the_step_of_a_rollout_can_be_counted_in_optimizer_steps() -> None:
    args = Namespace(rollout_batch_size=8, n_samples_per_prompt=4, global_batch_size=16)
    assert compute_rollout_step(args, 3) == 3
    args.wandb_always_use_train_step = True
    assert compute_rollout_step(args, 3) == 6
    assert compute_rollout_step(args, -1) == -1
