"""The pool of the fully asynchronous rollout: bounded, never drained, and every group accounted for."""

import asyncio

import pytest

from slime.observability.ledger import check_ledger
from slime.rollout import fully_async_rollout
from slime.rollout.data_source import load_data_source
from slime.rollout.fully_async_rollout import AsyncRolloutWorker, generate_rollout_fully_async
from slime.rollout.ledger import take_ledger_line
from slime.rollout.rm_hub.dispatch import RewardError
from slime.rollout.staleness import reset_weight_clock, staleness, weight_clock
from slime.utils.types import Sample
from tests.run_processes import wait_until
from tests.unit.rollout import plugins

PLUGINS = plugins.__name__
SLOW = "slow"


class Gates:
    """A generate function whose samples end when the test says so; those not called slow end at once."""

    def __init__(self):
        self.begun, self.opened, self.cancelled = [], set(), []
        self.tells_versions = True

    async def generate(self, args, sample, sampling_params):
        self.begun.append(sample.prompt)
        version = weight_clock().current
        try:
            while SLOW in sample.prompt and sample.prompt not in self.opened:
                await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            self.cancelled.append(sample.prompt)
            raise
        sample.tokens = [1, 2]
        meta = {"finish_reason": {"type": "stop"}} | ({"weight_version": version} if self.tells_versions else {})
        sample.append_response_tokens(tokens=[3], log_probs=[-1.0], meta_info=meta, text="ok")
        return sample


current = []


async def gated(args, sample, sampling_params):
    """What --custom-generate-function-path names; functions are looked up once a process."""
    return await current[-1].generate(args, sample, sampling_params)


@pytest.fixture
def gates(engine):
    current.append(Gates())
    yield current[-1]
    current.pop()


@pytest.fixture
def pool_args(make_args, prompts):
    """Two prompts a rollout, one rollout ahead, weights after every rollout: staleness is at most 2."""

    def make(*items, **changes):
        values = {
            "prompt_data": prompts(*items), "custom_generate_function_path": f"{__name__}.gated", "max_staleness": 2,
            "async_buffer_size": 1, "stale_samples": "discard",
        }  # fmt: skip
        return make_args(**{**values, **changes})

    return make


@pytest.fixture(autouse=True)
def clean_pool(monkeypatch):
    monkeypatch.setattr(fully_async_rollout, "_worker", None)
    reset_weight_clock()
    new_weights(0)
    yield
    if fully_async_rollout._worker is not None:
        fully_async_rollout._worker.stop()
    reset_weight_clock()


def new_weights(trained):
    weight_clock().begin_update()
    weight_clock().end_update(str(trained + 1), trained)


def numbers(count, *, slow=()):
    return [f"{SLOW} {i}" if i in slow else f"{i}" for i in range(count)]


def run_rollouts(args, source, count, *, before=lambda rollout_id: None):
    """Take rollouts, each followed by training and new weights; returns their outputs and ledger lines."""
    outputs, lines = [], []
    for rollout_id in range(count):
        before(rollout_id)
        outputs.append(generate_rollout_fully_async(args, rollout_id, source))
        lines.append(take_ledger_line(source, rollout_id, outputs[-1]))
        new_weights(rollout_id + 1)
    return outputs, lines


def prompts_of(output):
    return [group[0].prompt for group in output.samples]


def write_ledger(folder, lines):
    import json

    (folder / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_rollout_is_what_is_done_first_and_the_rest_stays_in_flight(gates, pool_args):
    args = pool_args(*numbers(12, slow=(1,)))
    source = load_data_source(args)
    output = generate_rollout_fully_async(args, 0, source)
    assert prompts_of(output) == ["0", "2"]
    assert output.metrics["rollout/pool/in_flight"] >= 1
    assert all(sample.reward == 1.0 for group in output.samples for sample in group)
    gates.opened.add("slow 1")
    new_weights(1)
    wait_until(lambda: fully_async_rollout._worker.queue_size() == 2, timeout_s=20)
    assert "slow 1" in prompts_of(generate_rollout_fully_async(args, 1, source)), "oldest weights first"


def test_the_pool_holds_no_more_than_the_buffer(gates, pool_args):
    for size in (1, 3):
        gates.begun.clear()
        args = pool_args(*numbers(40), async_buffer_size=size)
        worker = AsyncRolloutWorker(args, load_data_source(args))
        worker.start()
        worker.take_rollout(0)
        drawn = worker.data_buffer.sample_group_index
        worker.stop()
        assert drawn == 2 + 2 * size


def test_requests_in_flight_are_no_more_than_the_engines_take(gates, pool_args):
    args = pool_args(*numbers(40, slow=range(40)), async_buffer_size=10, sglang_server_concurrency=6)
    worker = AsyncRolloutWorker(args, load_data_source(args))
    assert (worker.concurrency, worker.capacity) == (3, 20)


def test_no_trained_sample_is_older_than_the_limit_and_the_late_ones_are_counted(gates, pool_args, tmp_path):
    args = pool_args(*numbers(60, slow=(1, 5)))
    source = load_data_source(args)
    outputs, lines = run_rollouts(args, source, 6)
    for rollout_id, output in enumerate(outputs):
        assert all(staleness(s, rollout_id) <= 2 for group in output.samples for s in group)
    assert sum(output.metrics["rollout/staleness/discarded_groups"] for output in outputs) == 2
    assert set(gates.cancelled) == {"slow 1", "slow 5"}
    assert [entry for line in lines for entry in line["discarded"]] == [[0, 1], [0, 5]]
    write_ledger(tmp_path, lines)
    summary = check_ledger(tmp_path)
    assert (summary.trained, summary.discarded, summary.unknown) == (12, 2, 0)


@pytest.mark.parametrize("tells_versions", [True, False], ids=["versions told", "meta_info dropped"])
def test_masking_trains_the_late_group_and_counts_its_old_tokens(gates, pool_args, tells_versions):
    """Without versions a group counts as made by the weights that were there when it was begun."""
    gates.tells_versions = tells_versions
    args = pool_args(*numbers(60, slow=(1,)), stale_samples="mask")
    source = load_data_source(args)
    outputs, _ = run_rollouts(args, source, 6, before=lambda i: gates.opened.add("slow 1") if i == 5 else None)
    assert not gates.cancelled
    while not any(group[0].prompt == "slow 1" for group in outputs[-1].samples):
        outputs.append(generate_rollout_fully_async(args, len(outputs), source))
    late = [(output, group) for output in outputs for group in output.samples if group[0].prompt == "slow 1"]
    assert [[sample.loss_mask for sample in group] for _, group in late] == [[[0], [0]]]
    assert late[0][0].metrics["rollout/staleness/masked_tokens"] == 2


def test_waiting_trains_the_late_group_while_it_is_young_enough(gates, pool_args):
    args = pool_args(*numbers(60, slow=(1,)), stale_samples="wait")
    source = load_data_source(args)
    run_rollouts(args, source, 2)
    worker = fully_async_rollout._worker
    assert worker is not None
    taking = asyncio.run_coroutine_threadsafe(worker.collect(2), fully_async_loop())
    with pytest.raises(TimeoutError):
        taking.result(0.3)
    gates.opened.add("slow 1")
    output = taking.result(20)
    assert "slow 1" in prompts_of(output)
    assert output.metrics["rollout/staleness/discarded_groups"] == 0


def fully_async_loop():
    from slime.utils.async_utils import get_async_loop

    return get_async_loop()


def test_what_a_checkpoint_finds_in_the_pool_comes_back_once(gates, pool_args, tmp_path):
    """Killed after rollout 1 was saved: what was in flight, done, and in rollout 2 is trained after the resume."""
    args = pool_args(*numbers(24, slow=(1, 4)), async_buffer_size=3, max_staleness=4)
    source = load_data_source(args)
    _, lines = run_rollouts(args, source, 2)
    source.save(1)
    generate_rollout_fully_async(args, 2, source)
    source.save(1)  # again, with rollout 2 in the making: a run that leaves on SIGTERM
    fully_async_rollout._worker.stop()

    reset_weight_clock()
    gates.opened |= {"slow 1", "slow 4"}
    resumed = load_data_source(args)
    resumed.load(1)
    assert weight_clock().trained_by("1") == 0
    assert len(resumed.buffer) == len(resumed.outstanding) > 2
    new_weights(2)
    fully_async_rollout._worker = None
    for rollout_id in range(2, 7):
        output = generate_rollout_fully_async(args, rollout_id, resumed)
        lines.append(take_ledger_line(resumed, rollout_id, output))
        new_weights(rollout_id + 1)
    write_ledger(tmp_path, lines)
    summary = check_ledger(tmp_path)
    assert (summary.trained, summary.unknown) == (14, 0)
    assert [0, 1] in [entry for line in lines for entry in line["trained"]]


def test_groups_that_are_done_come_back_without_being_made_again(gates, pool_args):
    args = pool_args(*numbers(24), async_buffer_size=3)
    source = load_data_source(args)
    run_rollouts(args, source, 1)
    worker = fully_async_rollout._worker
    wait_until(lambda: worker.queue_size() == worker.capacity, timeout_s=20)
    state = worker.state_after(0)
    done = [group for group in state["buffer"] if group[0]["__sample__"]["status"] == "completed"]
    assert len(done) == worker.capacity == 6
    assert all(member["__sample__"]["reward"] == 1.0 for group in done for member in group)


def test_a_sample_that_new_weights_cut_goes_on_with_what_it_has(engine, make_args, prompts):
    """--pause-generation-mode abort: the engine ends the request, slime sends it again after the update."""
    from slime.rollout.sglang_rollout import generate_and_rm

    args = make_args(prompt_data=prompts("unused"))
    sample = Sample(index=0, prompt="slow say:xy", label="xxyx")

    async def scenario():
        making = asyncio.ensure_future(generate_and_rm(args, sample, {"max_new_tokens": 8}))
        while not engine.running:
            await asyncio.sleep(0)
        weight_clock().begin_update()
        for request in engine.running.values():
            request.set()
        await asyncio.sleep(0.05)
        assert len(engine.requests) == 1, "nothing is sent while weights are on their way"
        engine.weight_version = "9"
        sample.tokens = [ord(c) for c in "say:xy" + "x"]  # what is slow no more
        weight_clock().end_update("9", 1)
        return await making

    made = asyncio.run(scenario())
    assert (made.response, made.status, made.reward) == ("xxyx", Sample.Status.COMPLETED, 1.0)
    assert made.weight_versions == ["1", "9"]
    assert engine.requests[1]["sampling_params"]["max_new_tokens"] == 7


def test_an_error_of_a_group_ends_the_rollout_that_waits(gates, pool_args):
    args = pool_args(*numbers(8), custom_rm_path=f"{PLUGINS}.fails")
    with pytest.raises(RewardError, match="the reward function broke"):
        generate_rollout_fully_async(args, 0, load_data_source(args))


def test_dropped_groups_are_replaced(gates, pool_args):
    args = pool_args(
        ("a", "no"), "b", ("c", "no"), "d", *numbers(8), dynamic_sampling_filter_path=f"{PLUGINS}.keep_right_answers"
    )
    output = generate_rollout_fully_async(args, 0, load_data_source(args))
    assert prompts_of(output) == ["b", "d"]
    assert output.metrics["rollout/dynamic_filter/drop_wrong"] == 2


def test_it_does_not_evaluate(make_args):
    with pytest.raises(ValueError, match="eval-function-path"):
        generate_rollout_fully_async(make_args(), 0, None, evaluation=True)
