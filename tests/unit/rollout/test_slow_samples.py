"""One sample in every batch is 50 times longer: in simulated time, so that figures are the same on every machine."""

import json

import pytest

from benchmarks.async_slow_samples import Workload, simulate
from slime.observability.ledger import check_ledger

WORKLOAD = Workload(prompts=32, steps=20, times=50)
LIMIT = 2
"""Rollouts: a buffer of one, weights after every rollout."""


@pytest.mark.parametrize("policy", ["discard", "mask"])
def test_slow_samples_cost_the_pool_less_than_a_seventh(policy, tmp_path):
    plain = simulate(f"fully async, {policy}", WORKLOAD, with_slow=False)
    slow = simulate(f"fully async, {policy}", WORKLOAD, with_slow=True)
    assert plain.trained == slow.trained == 20 * 32
    assert slow.samples_per_s > 0.85 * plain.samples_per_s
    assert max(slow.staleness) <= LIMIT and max(plain.staleness) <= LIMIT

    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in slow.ledger))
    summary = check_ledger(tmp_path)  # every prompt is trained, counted as discarded, or still in the pool
    assert summary.trained == 20 * 32
    assert summary.discarded == slow.discarded
    if policy == "discard":
        assert slow.discarded >= 18, "one of each batch but the last ones, which are still in flight"
    else:
        assert slow.discarded == 0


def test_without_the_pool_every_batch_waits_for_its_slow_sample():
    plain, slow = (simulate("train_async.py", WORKLOAD, with_slow=with_slow) for with_slow in (False, True))
    assert slow.samples_per_s < 0.1 * plain.samples_per_s
    assert slow.slow_trained == 20
    assert max(slow.staleness) <= LIMIT


def test_waiting_trains_slow_samples_and_never_an_older_one():
    slow = simulate("fully async, wait", Workload(prompts=8, steps=10, times=20), with_slow=True)
    assert slow.discarded == 0
    assert slow.slow_trained >= 8
    assert max(slow.staleness) == LIMIT
