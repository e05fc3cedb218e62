"""The deterministic modes: whatever order the engine answers in, the rollout keeps the same groups."""

import asyncio
import random

import httpx
import pytest

from slime.rollout import sglang_rollout
from slime.rollout.data_source import load_data_source
from slime.rollout.ledger import take_ledger_line
from slime.rollout.sglang_rollout import GenerateState, generate_rollout
from slime.utils import http_utils, server_control
from slime.utils.misc import SingletonMeta
from tests.unit.rollout import fakes, plugins

PLUGINS = plugins.__name__
NUM_SEEDS = 12


class ShufflingEngine(fakes.FakeEngine):
    """Answers each request after a random number of turns of the loop; the same request always with the same text."""

    def __init__(self, seed):
        super().__init__()
        self.random = random.Random(seed)

    async def _generate(self, payload):
        number = len(self.requests)
        self.requests.append(payload)
        self.running[number] = aborted = asyncio.Event()
        for _ in range(self.random.randrange(40)):
            if aborted.is_set():
                break
            await asyncio.sleep(0)
        finish = {"type": "abort"} if aborted.is_set() else {"type": "stop"}
        del self.running[number]
        seed = payload["sampling_params"]["sampling_seed"]
        word = "ok" if seed % 3 else "no"
        return httpx.Response(200, json=self.reply(number, word, finish, len(payload["input_ids"])))


def rollouts(args, seed, monkeypatch, count=3):
    """Everything that may be told of `count` rollouts with an engine of this seed."""
    monkeypatch.setattr(SingletonMeta, "_instances", {})
    engine = ShufflingEngine(seed)
    monkeypatch.setattr(http_utils, "_http_client", engine.client())
    source = load_data_source(args)
    told = []
    for rollout_id in range(count):
        output = generate_rollout(args, rollout_id, source)
        samples = [sample for group in output.samples for sample in group]
        told.append(
            (
                [(s.index, s.group_index, s.prompt, s.response, s.reward, s.session_id) for s in samples],
                output.metrics,
                take_ledger_line(source, rollout_id, output),
                source.state(),
            )
        )
    order = [payload["sampling_params"]["sampling_seed"] for payload in engine.requests]
    return told, order


@pytest.fixture
def deterministic_args(make_args, prompts, monkeypatch):
    monkeypatch.setattr(sglang_rollout, "load_tokenizer", lambda path, **kwargs: fakes.FakeTokenizer())
    monkeypatch.setattr(sglang_rollout, "_ABORT_POLL_S", 0.01)
    monkeypatch.setattr(server_control, "_FIRST_POLL_S", 0.001)
    return make_args(
        prompt_data=prompts(*(f"prompt {i}" for i in range(23))),
        deterministic_mode=True,
        rollout_shuffle=True,
        rollout_batch_size=4,
        over_sampling_batch_size=6,
        dynamic_sampling_filter_path=f"{PLUGINS}.keep_right_answers",
        custom_rm_path=None,
        rm_type="random",
    )


def test_groups_order_indices_position_and_counts_are_the_same_in_every_run(deterministic_args, monkeypatch):
    """Over-sampling, a filter, a random reward and thrown-away groups included."""
    first, _ = rollouts(deterministic_args, 0, monkeypatch)
    for seed in range(1, NUM_SEEDS):
        told, _ = rollouts(deterministic_args, seed, monkeypatch)
        assert told == first, f"seed {seed}"
    discarded = [line["discarded"] for _, _, line, _ in first]
    dropped = [line["dropped"] for _, _, line, _ in first]
    assert any(discarded) and any(dropped), "the test is about nothing without them"
    assert [metrics.get("rollout/discarded_groups", 0) for _, metrics, _, _ in first] == [len(d) for d in discarded]


def test_without_the_mode_the_same_engine_gives_other_groups(deterministic_args, monkeypatch):
    """Else the test above would not test anything."""
    monkeypatch.setattr(sglang_rollout, "next_finished", as_they_finish(sglang_rollout.next_finished))
    kept = {
        str([line["trained"] for _, _, line, _ in rollouts(deterministic_args, seed, monkeypatch)[0]])
        for seed in range(6)
    }
    assert len(kept) > 1


def as_they_finish(next_finished):
    return lambda pendings, in_order: next_finished(pendings, in_order=False)


def test_every_drawn_row_is_trained_dropped_or_discarded_once(deterministic_args, monkeypatch):
    told, _ = rollouts(deterministic_args, 3, monkeypatch, count=6)
    rows = [tuple(e) for _, _, line, _ in told for fate in ("trained", "dropped", "discarded") for e in line[fate]]
    epoch, offset = told[-1][2]["position"]
    assert len(rows) == len(set(rows)) == epoch * 23 + offset
    assert epoch >= 1, "the epochs' end is part of it"
    assert all(line["outstanding"] == [] for _, _, line, _ in told)


def test_a_failure_of_a_group_that_nobody_needs_does_not_end_the_run(deterministic_args, engine, prompts):
    """It would else depend on timing whether the run ends."""
    args = deterministic_args
    args.prompt_data, args.rollout_shuffle = prompts("a", "b", "c", "d", ("e", "bad"), "f"), False
    args.rm_type, args.custom_rm_path = None, f"{PLUGINS}.fails_for_bad_labels"
    args.dynamic_sampling_filter_path = None
    output = generate_rollout(args, 0, load_data_source(args))
    assert [group[0].index for group in output.samples] == [0, 2, 4, 6]
    assert len(output.fates.discarded) == 2


def test_the_least_loaded_rank_is_chosen_without_chance(deterministic_args, engine):
    state = GenerateState(deterministic_args)
    state.dp_counts = [1, 0, 0]
    ranks = []
    for _ in range(5):
        with state.dp_rank_context() as rank:
            ranks.append(rank)
    assert ranks == [1] * 5
