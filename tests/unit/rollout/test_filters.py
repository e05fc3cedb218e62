"""Dynamic filters: what they keep, what the loop makes of their word, and the counts."""

from argparse import Namespace

import pytest

from slime.rollout.filter_hub.base_types import (
    DynamicFilterOutput,
    MetricGatherer,
    call_dynamic_filter,
    should_drop_dynamic_filter_output,
)
from slime.rollout.filter_hub.dynamic_sampling_filters import (
    check_reward_nonzero_std,
    check_reward_nonzero_std_with_fallback,
)
from slime.utils.types import Sample

ARGS = Namespace(reward_key=None)


def group(*rewards):
    return [Sample(reward=reward) for reward in rewards]


@pytest.mark.parametrize(
    ("rewards", "keep", "reason"),
    [
        ((0.0, 1.0), True, None),
        ((1.0, 1.0, 1.0), False, "zero_std_1.0"),
        ((0.0, 0.0), False, "zero_std_0.0"),
        ((0.1 + 0.2, 0.3), False, "zero_std_0.3"),
        ((1e8, 1e8 + 1), True, None),
        ((1.0,), False, "zero_std_1.0"),
    ],
)
def test_groups_without_spread_teach_nothing(rewards, keep, reason):
    assert check_reward_nonzero_std(ARGS, group(*rewards)) == DynamicFilterOutput(keep, reason)


def test_the_spread_is_that_of_the_reward_key_and_over_fan_out_lists():
    samples = [[Sample(reward={"score": 1.0, "x": 0})], [Sample(reward={"score": 0.0, "x": 0})]]
    assert check_reward_nonzero_std(Namespace(reward_key="score"), samples).keep
    assert not check_reward_nonzero_std(Namespace(reward_key="x"), samples).keep


@pytest.mark.parametrize(("remaining", "drops"), [(5, True), (4, False), (3, False)])
def test_the_fallback_keeps_a_group_only_when_the_batch_needs_it(remaining, drops):
    output = check_reward_nonzero_std_with_fallback(ARGS, group(1.0, 1.0))
    assert should_drop_dynamic_filter_output(output, remaining_batch_size=remaining, target_data_size=4) is drops
    plain = check_reward_nonzero_std(ARGS, group(1.0, 1.0))
    assert should_drop_dynamic_filter_output(plain, remaining_batch_size=remaining, target_data_size=4)
    kept = check_reward_nonzero_std_with_fallback(ARGS, group(0.0, 1.0))
    assert not should_drop_dynamic_filter_output(kept, remaining_batch_size=remaining, target_data_size=4)


def test_a_filter_may_answer_with_a_truth_value_and_may_be_absent():
    assert call_dynamic_filter(None, ARGS, []) == DynamicFilterOutput(keep=True)
    assert call_dynamic_filter(lambda args, samples, **kw: 0, ARGS, []) == DynamicFilterOutput(keep=False)
    output = DynamicFilterOutput(keep=False, reason="x")
    assert call_dynamic_filter(lambda args, samples: output, ARGS, []) is output


def test_drops_are_counted_by_reason():
    gatherer = MetricGatherer()
    for reason in ("a", "b", "a", None):
        gatherer.on_dynamic_filter_drop(reason)
    assert gatherer.collect() == {
        "rollout/dynamic_filter/drop_a": 2,
        "rollout/dynamic_filter/drop_b": 1,
        "rollout/dynamic_filter/drop_unspecified": 1,
    }
