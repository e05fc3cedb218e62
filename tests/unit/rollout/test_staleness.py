"""How old a sample is, token by token, and what becomes of one that is too old."""

import asyncio
from argparse import Namespace

import pytest

from slime.rollout.engine_requests import take_reply
from slime.rollout.staleness import (
    StalenessCheck,
    WeightClock,
    assume_version,
    made_from,
    mask_tokens_before,
    reset_weight_clock,
    staleness,
    weight_clock,
)
from slime.utils.response_meta import SPANS
from slime.utils.types import Sample


@pytest.fixture(autouse=True)
def clock():
    """Version 1 holds no rollout, version 2 one, version 3 three: weights went out every second rollout."""
    reset_weight_clock()
    for version, trained in (("1", 0), ("2", 1), ("3", 3)):
        weight_clock().begin_update()
        weight_clock().end_update(version, trained)
    yield weight_clock()
    reset_weight_clock()


def sample_of(*calls):
    """A sample that each call (version or spans, number of tokens) has lengthened."""
    sample = Sample(tokens=[0])
    for versions, count in calls:
        meta = {"weight_version": versions} if isinstance(versions, str) else {"weight_versions": versions}
        meta["finish_reason"] = {"type": "stop"}
        sample.append_response_tokens(tokens=[7] * count, log_probs=[-1.0] * count, meta_info=meta)
    return sample


def spans(*counts):
    """[(version, tokens)] as an engine tells them."""
    told, start = [], 0
    for version, count in counts:
        told.append({"version": version, "start": start, "end": start + count})
        start += count
    return told


def test_a_sample_is_as_old_as_the_oldest_weights_that_made_a_token_of_it():
    assert staleness(sample_of(("3", 2)), rollout_id=3) == 0
    assert staleness(sample_of(("2", 2), ("3", 1)), rollout_id=3) == 2
    assert staleness(sample_of((spans(("1", 1), ("3", 5)), 6)), rollout_id=4) == 4
    assert staleness(sample_of(("default", 2)), rollout_id=3) is None, "a version that nobody announced"


def test_tokens_that_are_not_trained_do_not_make_a_sample_old():
    sample = sample_of((spans(("1", 2), ("3", 2)), 4))
    sample.loss_mask = [0, 0, 1, 1]
    assert staleness(sample, rollout_id=4) == 1
    sample.remove_sample = True
    assert staleness(sample, rollout_id=4) is None


def test_which_version_made_which_token_is_kept_where_they_differ():
    assert SPANS not in sample_of(("2", 2), ("2", 1)).metadata
    sample = sample_of(("1", 2), (spans(("2", 1), ("3", 4)), 5))
    assert sample.weight_versions == ["1", "2", "3"]
    assert sample.metadata[SPANS] == [["1", 2], ["2", 1], ["3", 4]]
    sample.append_response_tokens(tokens=[9, 9], trainable=False)  # a tool speaks
    sample.append_response_tokens(
        tokens=[7], log_probs=[-1.0], meta_info={"weight_version": "3", "finish_reason": {"type": "stop"}}
    )
    assert [count for _, count in sample.metadata[SPANS]] == [2, 1, 6, 1]


def test_a_call_that_ended_before_its_first_token_makes_nothing_old():
    assert staleness(sample_of(("1", 0), ("3", 3)), rollout_id=3) == 0
    assert staleness(sample_of(("1", 3), ("3", 0)), rollout_id=3) == 3


def test_an_engine_that_tells_only_its_last_version_may_have_begun_with_the_one_before():
    sample = Sample(tokens=[0])
    meta = {"finish_reason": {"type": "stop"}, "weight_version": "3", "output_token_logprobs": [[-1.0, 7], [-1.0, 7]]}
    take_reply(Namespace(), sample, {"meta_info": meta, "text": ""}, version_before="2")
    assert sample.weight_versions == ["2"]
    assert staleness(sample, rollout_id=3) == 2


def test_what_was_made_without_a_version_is_as_old_as_its_beginning():
    made = [Sample(tokens=[0, 7], response_length=1), sample_of(("3", 1)), Sample(tokens=[0])]
    assume_version([made], "2")
    assert [sample.weight_versions for sample in made] == [["2"], ["3"], []]
    assert [staleness(sample, rollout_id=4) for sample in made] == [3, 1, None]
    assume_version(made, "3")
    assert staleness(made[0], rollout_id=4) == 3, "where it goes on later it does not become younger"
    assume_version(made[2:], None)


def test_masking_takes_exactly_the_old_tokens_out_of_the_loss():
    sample = sample_of((spans(("1", 2), ("2", 1), ("3", 2)), 5))
    assert mask_tokens_before([[sample]], oldest_trained=1) == 2
    assert sample.loss_mask == [0, 0, 1, 1, 1]
    assert made_from([sample]) == 1


@pytest.mark.parametrize(
    ("policy", "admitted", "counts"),
    [("discard", False, (1, 0)), ("wait", False, (1, 0)), ("mask", True, (0, 2))],
)
def test_a_group_that_is_too_old_is_counted_whatever_becomes_of_it(policy, admitted, counts):
    check = StalenessCheck(Namespace(max_staleness=2, stale_samples=policy), rollout_id=3)
    assert check.admits([sample_of(("2", 4))])
    assert check.admits([sample_of(("3", 4)), sample_of((spans(("1", 2), ("3", 2)), 4))]) is admitted
    assert tuple(check.metrics().values()) == counts


def test_where_phases_take_turns_nothing_is_too_old():
    check = StalenessCheck(Namespace(), rollout_id=100)
    assert check.admits([sample_of(("1", 4))])
    assert check.metrics() == {}


def test_requests_wait_while_weights_are_on_their_way():
    clock = WeightClock()
    clock.begin_update()

    async def scenario():
        waiting = asyncio.ensure_future(clock.settled())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        clock.end_update("5", 4)
        return await waiting

    assert asyncio.run(scenario()) == 1
    assert (clock.current, clock.trained) == ("5", 4)


def test_versions_from_before_a_resume_are_known_again(clock):
    later = WeightClock()
    later.end_update("4", 4)
    later.restore({**clock.state(), "4": 99})
    assert [later.trained_by(version) for version in "1234"] == [0, 1, 3, 4]
