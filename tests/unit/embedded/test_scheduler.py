"""Bookkeeping of rows, shared prompts and memory, without a model."""

from slime.backends.embedded.protocol import SamplingParams
from slime.backends.embedded.scheduler import PREFILL_TOKENS, Request, Scheduler, common_prefix


def request(prompt: list[int], rid: str = "r", **fields) -> Request:
    return Request(rid, prompt, SamplingParams(), max_new_tokens=10, seed=0, **fields)


def scheduler(max_running: int = 4, max_tokens: int = 10_000) -> Scheduler:
    return Scheduler(max_running, lambda rows, length: rows * length <= max_tokens)


def test_equal_prompts_are_computed_once():
    queue = scheduler()
    for prompt in ([1, 2, 3], [4, 5], [1, 2, 3]):
        queue.add(request(prompt))
    groups = queue.admit(epoch=0)
    assert [(group.tokens, group.rows) for group in groups] == [([1, 2, 3], [0, 2]), ([4, 5], [1])]
    assert [r.cached_tokens for r in queue.running] == [0, 0, 2]


def test_rows_are_limited_and_first_come_is_first_served():
    queue = scheduler(max_running=2)
    for number in range(4):
        queue.add(request([number, 9], rid=str(number)))
    queue.admit(epoch=0)
    assert [r.rid for r in queue.running] == ["0", "1"] and [r.rid for r in queue.waiting] == ["2", "3"]
    assert queue.admit(epoch=0) == []


def test_the_last_row_moves_into_the_gap():
    queue = scheduler()
    for number in range(3):
        queue.add(request([number], rid=str(number)))
    queue.admit(epoch=0)
    assert queue.leave(0) == 2
    assert [r.rid for r in queue.running] == ["2", "1"]
    assert queue.leave(1) is None
    assert [r.rid for r in queue.running] == ["2"]


def test_one_pass_takes_a_limited_number_of_prompt_tokens_but_any_single_prompt():
    queue = scheduler(max_tokens=10**9)
    queue.add(request([1] * (PREFILL_TOKENS + 5)))
    queue.add(request([2] * 10))
    assert [len(group.tokens) for group in queue.admit(epoch=0)] == [PREFILL_TOKENS + 5]
    assert [len(group.tokens) for group in queue.admit(epoch=0)] == [10]


def test_memory_limits_who_is_admitted_but_never_the_only_one():
    queue = scheduler(max_tokens=30)
    queue.add(request([1] * 40))
    queue.add(request([2] * 4))
    assert len(queue.admit(epoch=0)) == 1
    assert len(queue.running) == 1 and len(queue.waiting) == 1


def test_the_latest_request_gives_way_when_memory_runs_out():
    queue = scheduler(max_tokens=24)
    for number in range(2):
        queue.add(request([number] * 8, rid=str(number)))
    queue.admit(epoch=0)
    for running in queue.running:
        running.output = [5] * 4
    assert queue.overflowing() is None
    queue.running[0].output.append(5)
    assert queue.overflowing() == 1
    late = queue.running[1]
    queue.leave(1)
    queue.retract(late)
    assert late.num_retractions == 1 and queue.waiting[0] is late
    assert late.tokens() == [1] * 8 + [5] * 4


def test_a_common_prefix_is_copied_from_a_running_request():
    queue = scheduler()
    queue.add(request(list(range(40))))
    queue.admit(epoch=0)
    queue.running[0].output = [1]
    queue.add(request([*range(30), 99, 98]))
    (group,) = queue.admit(epoch=0)
    assert (group.prefix_row, group.prefix_length) == (0, 30)
    assert queue.running[1].cached_tokens == 30


def test_prompts_with_a_long_common_beginning_wait_one_pass_to_copy_it():
    queue = scheduler(max_running=8)
    header = list(range(30))
    for number in range(3):
        queue.add(request([*header, 90 + number, 7]))
        queue.add(request([*header, 90 + number, 7]))
    first = queue.admit(epoch=0)
    assert [(group.rows, group.prefix_length) for group in first] == [([0, 1], 0)]
    for running in queue.running:
        running.output = [1]
    second = queue.admit(epoch=0)
    assert [(group.rows, group.prefix_length) for group in second] == [([2, 3], 30), ([4, 5], 30)]
    assert [r.cached_tokens for r in queue.running] == [0, 31, 30, 31, 30, 31]


def test_nobody_waits_for_a_prompt_that_ends_at_once():
    queue = scheduler(max_running=8)
    for number in range(3):
        queue.add(request([*range(30), 90 + number]))
        queue.waiting[-1].max_new_tokens = 1
    assert len(queue.admit(epoch=0)) == 3


def test_keys_of_older_weights_are_not_shared():
    queue = scheduler()
    queue.add(request(list(range(40))))
    queue.admit(epoch=0)
    queue.running[0].output = [1]
    queue.add(request([*range(30), 99]))
    (group,) = queue.admit(epoch=1)
    assert group.prefix_length == 0


def test_prompt_tokens_whose_log_probs_are_asked_are_computed():
    queue = scheduler()
    queue.add(request(list(range(40))))
    queue.admit(epoch=0)
    queue.running[0].output = [1]
    queue.add(request([*range(30), 99], logprob_start=20))
    (group,) = queue.admit(epoch=0)
    assert group.prefix_length == 20


def test_versions_are_recorded_as_spans():
    one = request([1])
    for version in ("a", "a", "b"):
        one.output.append(0)
        one.record_version(version)
    assert one.weight_spans == [{"version": "a", "start": 0, "end": 2}, {"version": "b", "start": 2, "end": 3}]


def test_common_prefix_counts_equal_first_elements():
    assert common_prefix([1, 2, 3], [1, 2, 4], 9) == 2
    assert common_prefix([1, 2, 3], [1, 2, 3], 2) == 2
    assert common_prefix([], [1], 5) == 0
