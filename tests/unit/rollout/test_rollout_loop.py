"""One rollout: how many groups are in flight, which are kept, and what becomes of the rest."""

import logging

import pytest

from slime.rollout.data_source import load_data_source
from slime.rollout.sglang_rollout import GenerateState, generate_rollout, generate_rollout_async
from slime.utils.types import Sample
from tests.unit.rollout import plugins

PLUGINS = plugins.__name__


def prompts_of(groups):
    return [group[0].prompt for group in groups]


def test_groups_come_back_in_the_order_of_their_prompts(engine, make_args, prompts):
    args = make_args(prompt_data=prompts("wait:2", "b"))
    source = load_data_source(args)
    output = generate_rollout(args, 0, source)
    assert prompts_of(output.samples) == ["wait:2", "b"]
    assert [[sample.index for sample in group] for group in output.samples] == [[0, 1], [2, 3]]
    assert [[sample.group_index for sample in group] for group in output.samples] == [[0, 0], [1, 1]]
    assert all(sample.reward == 1.0 for group in output.samples for sample in group)
    assert output.metrics == {}
    assert (len(engine.requests), engine.num_aborts) == (4, 0)


def test_dropped_groups_are_replaced_and_counted_by_reason(engine, make_args, prompts):
    args = make_args(
        prompt_data=prompts(("a", "no"), "b", ("c", "no"), "d"),
        dynamic_sampling_filter_path=f"{PLUGINS}.keep_right_answers",
        rollout_all_samples_process_path=f"{PLUGINS}.note_all_groups",
        rollout_sample_filter_path=f"{PLUGINS}.remove_first",
    )
    output = generate_rollout(args, 0, load_data_source(args))
    assert prompts_of(output.samples) == ["b", "d"]
    assert output.metrics == {"rollout/dynamic_filter/drop_wrong": 2}
    assert [sample.remove_sample for sample in output.samples[0]] == [True, False]
    assert plugins.calls[-1] == ("all", [0, 2, 4, 6], True)


def test_groups_dropped_for_want_of_spread_are_kept_when_nothing_else_can_fill_the_batch(engine, make_args, prompts):
    args = make_args(
        prompt_data=prompts("a", "b", "c", "d"),
        over_sampling_batch_size=4,
        dynamic_sampling_filter_path=f"{PLUGINS}.keep_none_with_fallback",
    )
    output = generate_rollout(args, 0, load_data_source(args))
    assert len(output.samples) == 2
    assert output.metrics == {"rollout/dynamic_filter/drop_never": 2}


def test_oversampling_aborts_the_slow_and_forgets_them(engine, make_args, prompts):
    args = make_args(prompt_data=prompts("slow", "b", "c", "d"), over_sampling_batch_size=3)
    source = load_data_source(args)
    output = generate_rollout(args, 0, source)
    assert prompts_of(output.samples) == ["b", "c"]
    assert engine.num_aborts >= 1
    assert source.get_buffer_length() == 0
    assert len(engine.requests) == 6
    state = GenerateState(args)
    assert (state.pendings, state.aborted, state.remaining_batch_size) == (set(), False, 0)


def test_partial_rollout_continues_aborted_groups_first_and_loses_no_token(engine, make_args, prompts):
    args = make_args(
        prompt_data=prompts("slow say:xyz", "b", "c", "d"), over_sampling_batch_size=3, partial_rollout=True
    )
    source = load_data_source(args)
    generate_rollout(args, 0, source)
    (group,) = source.buffer
    assert [sample.status for sample in group] == [Sample.Status.ABORTED] * 2
    assert [sample.response for sample in group] == ["x", "x"]
    assert [sample.metadata["start_rollout_id"] for sample in group] == [0, 0]
    assert [sample.reward for sample in group] == [None, None]

    engine.weight_version = "2"
    for sample in group:  # what is slow no more
        sample.tokens = [ord(c) for c in "say:yz" + "x"]
    output = generate_rollout(args, 1, source)
    assert [group[0].index for group in output.samples] == [0, 6]
    assert source.get_buffer_length() <= 1  # a third group may have been on its way
    first = output.samples[0][0]
    assert (first.response, first.response_length) == ("xyzx", 4)
    assert first.rollout_log_probs == [-0.5] * 4
    assert first.weight_versions == ["1", "2"]
    assert first.metadata["start_rollout_id"] == 0
    assert first.status is Sample.Status.COMPLETED


def test_samples_still_waiting_for_their_turn_are_aborted_unbegun(engine, make_args, prompts):
    args = make_args(
        prompt_data=prompts("a", "b", "slow", "d"),
        over_sampling_batch_size=4,
        partial_rollout=True,
        sglang_server_concurrency=3,
        n_samples_per_prompt=1,
    )
    source = load_data_source(args)
    output = generate_rollout(args, 0, source)
    assert len(output.samples) == 2
    for group in source.buffer:
        assert group[0].response == "" or group[0].metadata["start_rollout_id"] == 0


def test_a_function_that_asks_again_after_the_abort_is_aborted_again(engine, make_args, prompts):
    args = make_args(
        prompt_data=prompts("slow", "b", "c"),
        over_sampling_batch_size=3,
        custom_generate_function_path=f"{PLUGINS}.two_turns",
    )
    output = generate_rollout(args, 0, load_data_source(args))
    assert prompts_of(output.samples) == ["b", "c"]
    assert engine.num_aborts >= 2


async def test_an_error_ends_the_rollout_at_once_and_leaves_nothing_running(engine, make_args, prompts):
    args = make_args(prompt_data=prompts("slow", "b"), custom_rm_path=f"{PLUGINS}.fails")
    source = load_data_source(args)
    with pytest.raises(Exception, match="the reward function broke"):
        await generate_rollout_async(args, 0, source.get_samples)
    state = GenerateState(args)
    assert (state.pendings, state.aborted, state.remaining_batch_size) == (set(), False, 0)
    assert all(count == 0 for count in state.dp_counts)


async def test_a_source_that_runs_dry_is_an_error(engine, make_args):
    with pytest.raises(RuntimeError, match="gave no group where 2 were asked for; the rollout still needs 2"):
        await generate_rollout_async(make_args(), 0, lambda n: [])


async def test_groups_of_the_wrong_size_are_an_error(engine, make_args):
    with pytest.raises(AssertionError, match="1 members; --n-samples-per-prompt is 2"):
        await generate_rollout_async(make_args(), 0, lambda n: [[Sample(prompt="a", label="ok")]] * n)


def test_a_filter_that_drops_nearly_everything_is_reported(engine, make_args, prompts, caplog):
    args = make_args(
        prompt_data=prompts(*[("a", "no")] * 12, "b"),
        rollout_batch_size=1,
        over_sampling_batch_size=1,
        dynamic_sampling_filter_path=f"{PLUGINS}.keep_right_answers",
    )
    with caplog.at_level(logging.WARNING, logger="slime"):
        output = generate_rollout(args, 3, load_data_source(args))
    assert output.metrics == {"rollout/dynamic_filter/drop_wrong": 12}
    assert "rollout 3: the dynamic filter has dropped 10 groups and kept 0 of the 1" in caplog.text
