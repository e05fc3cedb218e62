"""The loop: seeds, stops, pauses, memory and what is recorded about each token."""

import threading

import pytest
import torch

from slime.backends.embedded.engine import Engine
from slime.backends.embedded.protocol import RequestError
from slime.backends.embedded.scheduler import Request
from tests.unit.embedded.conftest import queue, random_prompt


def test_a_reply_depends_on_its_seed_and_not_on_company(new_engine):
    lonely = new_engine()
    alone = queue(lonely, random_prompt(9), 12, sampling_seed=42)
    lonely.run_until_idle()
    crowded = new_engine()
    others = [queue(crowded, random_prompt(5 + i, seed=i), 5 + i) for i in range(5)]
    crowded.step()
    same = queue(crowded, random_prompt(9), 12, sampling_seed=42)
    other_seed = queue(crowded, random_prompt(9), 12, sampling_seed=43)
    crowded.run_until_idle()
    assert same.output == alone.output
    assert other_seed.output != alone.output
    assert all(request.finish is not None for request in others)


def test_requests_without_a_seed_differ_and_an_engine_seed_repeats_them(new_engine):
    def outputs(seed: int) -> list[list[int]]:
        engine = new_engine(random_seed=seed)
        requests = [queue(engine, random_prompt(9), 12) for _ in range(3)]
        engine.run_until_idle()
        return [request.output for request in requests]

    first = outputs(1)
    assert len({tuple(output) for output in first}) == 3
    assert outputs(1) == first
    assert outputs(2) != first


def test_a_continued_reply_is_the_uninterrupted_one(new_engine):
    """Noise is keyed by position, so prompt + first half as a new prompt makes the second half."""
    engine = new_engine()
    whole = queue(engine, random_prompt(9), 12, sampling_seed=3)
    engine.run_until_idle()
    rest = queue(engine, random_prompt(9) + whole.output[:5], 7, sampling_seed=3)
    engine.run_until_idle()
    assert rest.output == whole.output[5:]


def test_stop_tokens_end_a_reply_and_are_part_of_it(new_engine):
    engine = new_engine()
    free = queue(engine, random_prompt(9), 12, sampling_seed=1)
    engine.run_until_idle()
    stop = free.output[4]
    stopped = queue(engine, random_prompt(9), 12, sampling_seed=1, stop_tokens=frozenset({stop}))
    engine.run_until_idle()
    assert stopped.output == free.output[: free.output.index(stop) + 1]
    assert stopped.finish.shown == {"type": "stop", "matched": stop}
    assert free.finish.shown == {"type": "length", "length": 12}


def test_stop_tokens_do_not_come_before_min_new_tokens(new_engine):
    engine = new_engine()
    everything = frozenset(range(1000)) - {17}
    request = queue(engine, random_prompt(9), 12, min_new_tokens=6, stop_tokens=everything)
    engine.run_until_idle()
    assert request.output[:6] == [17] * 6 and len(request.output) == 7


def test_no_new_tokens_still_scores_the_prompt(new_engine):
    engine = new_engine()
    request = queue(engine, random_prompt(9), 0, logprob_start=0)
    engine.run_until_idle()
    assert request.output == [] and request.finish.shown == {"type": "length", "length": 0}
    assert len(request.input_log_probs.values) == 9


def test_top_log_probs_of_prompt_and_output(new_engine):
    engine = new_engine()
    request = queue(engine, [5, 6, 7], 3, temperature=0.0, logprob_start=0, top_logprobs=2, token_ids_logprob=(8,))
    engine.run_until_idle()
    for value, top, token in zip(
        request.output_log_probs.values, request.output_log_probs.top, request.output, strict=True
    ):
        assert top[0] == (pytest.approx(value, abs=1e-5), token) and len(top) == 2
    assert request.input_log_probs.top[0] is None and len(request.input_log_probs.top) == 3
    assert [chosen[0][1] for chosen in request.input_log_probs.chosen[1:]] == [8, 8]


def test_abort_keeps_what_was_made(new_engine):
    engine = new_engine(max_running_requests=1)
    running, waiting = queue(engine, random_prompt(9), 50, rid="a"), queue(engine, random_prompt(9), 50, rid="b")
    for _ in range(4):
        engine.step()
    assert engine.abort(lambda request: True) == 2
    assert len(running.output) == 4 and running.finish.shown["message"] == "Aborted"
    assert waiting.output == [] and waiting.finish.shown["message"] == "Abort in waiting queue"
    assert not engine.step()


def test_aborting_some_leaves_the_others_unharmed(new_engine):
    engine = new_engine()
    lonely = new_engine()
    reference = queue(lonely, random_prompt(30, seed=5), 20, sampling_seed=7)
    lonely.run_until_idle()
    requests = [queue(engine, random_prompt(10 + i, seed=i), 20, rid=f"x{i}") for i in range(5)]
    kept = queue(engine, random_prompt(30, seed=5), 20, sampling_seed=7, rid="kept")
    for _ in range(6):
        engine.step()
    engine.abort(lambda request: request.rid in ("x0", "x3"))
    engine.run_until_idle()
    assert kept.output == reference.output
    assert [request.finish.kind for request in requests] == ["abort", "length", "length", "abort", "length"]


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_pause_changes_no_reply(new_engine, mode: str):
    calm = new_engine()
    expected = [queue(calm, random_prompt(10 + i, seed=i), 15, sampling_seed=i) for i in range(3)]
    calm.run_until_idle()
    engine = new_engine()
    requests = [queue(engine, random_prompt(10 + i, seed=i), 15, sampling_seed=i) for i in range(3)]
    for _ in range(5):
        engine.step()
    engine.pause(mode)
    assert engine.is_paused and not engine._can_step()
    assert engine.flush_cache() == (mode == "retract")
    engine.resume()
    engine.run_until_idle()
    assert [request.output for request in requests] == [request.output for request in expected]
    assert [request.num_retractions for request in requests] == [1 if mode == "retract" else 0] * 3
    for request, other in zip(requests, expected, strict=True):
        assert request.output_log_probs.values == pytest.approx(other.output_log_probs.values, abs=1e-4)


def test_too_little_memory_costs_time_and_no_token(new_engine):
    engine = new_engine(max_total_tokens=260, context_length=100)
    requests = [queue(engine, random_prompt(30, seed=i), 60, sampling_seed=i) for i in range(4)]
    engine.run_until_idle()
    assert sum(request.num_retractions for request in requests) > 0
    assert all(len(request.output) == 60 for request in requests)
    roomy = new_engine()
    same = [queue(roomy, random_prompt(30, seed=i), 60, sampling_seed=i) for i in range(4)]
    roomy.run_until_idle()
    assert [request.output for request in same] == [request.output for request in requests]


def test_cache_memory_grows_with_need(new_engine):
    engine = new_engine(context_length=256)
    assert engine.cache.size_bytes == 0
    queue(engine, random_prompt(10), 3)
    engine.run_until_idle()
    small = engine.cache.size_bytes
    assert 0 < small < 8 * 256 * engine.cache.bytes_per_position
    for i in range(8):
        queue(engine, random_prompt(150, seed=i), 3)
    engine.run_until_idle()
    assert small < engine.cache.size_bytes <= 8 * 256 * engine.cache.bytes_per_position


def test_every_token_carries_the_version_that_made_it(new_engine):
    engine = new_engine()
    request = queue(engine, random_prompt(9), 8)
    for _ in range(3):
        engine.step()
    engine.weights_changed("v2")
    engine.run_until_idle()
    assert request.weight_spans == [
        {"version": "default", "start": 0, "end": 3},
        {"version": "v2", "start": 3, "end": 8},
    ]


def test_memory_is_released_only_when_nothing_runs(new_engine):
    engine = new_engine()
    queue(engine, random_prompt(9), 8)
    engine.step()
    with pytest.raises(RequestError, match="1 requests run and 0 wait"):
        engine.release_memory(["kv_cache"])
    engine.run_until_idle()
    engine.release_memory(["kv_cache"])
    assert engine.cache.size_bytes == 0
    assert "memory of kv_cache is released" in engine.why_unavailable()
    engine.resume_memory(["kv_cache"])
    assert engine.why_unavailable() is None
    with pytest.raises(RequestError, match="Unknown memory tag 'tea'"):
        engine.release_memory(["tea"])


def test_the_thread_answers_requests_and_commands(new_engine):
    engine: Engine = new_engine()
    done = threading.Event()
    counts = []

    def changed(request: Request) -> None:
        counts.append(len(request.output))
        if request.finish is not None:
            done.set()

    donor = new_engine()
    request = queue(donor, random_prompt(9), 6, on_change=changed, wants_every_token=True)
    engine.start()
    try:
        engine.submit([request])
        assert done.wait(30)
        assert counts == [1, 2, 3, 4, 5, 6]
        assert engine.call(lambda: len(engine.scheduler)).result(10) == 0
        with pytest.raises(ZeroDivisionError):
            engine.call(lambda: 1 // 0).result(10)
    finally:
        engine.stop()


def test_the_most_sequences_run_at_once(new_engine):
    engine = new_engine(max_running_requests=3)
    for i in range(7):
        queue(engine, random_prompt(5, seed=i), 4)
    most = 0
    while engine.step():
        most = max(most, len(engine.scheduler.running))
    assert most <= 3
    assert torch.is_inference_mode_enabled() is False


def test_logits_that_are_not_finite_end_the_request_and_not_the_engine(new_engine, served):
    engine = new_engine()
    name = "model.norm.weight"
    kept = served.weights.read(name).clone()
    served.weights.write([(name, kept * float("nan"))])
    try:
        broken = queue(engine, random_prompt(9), 8)
        engine.run_until_idle()
    finally:
        served.weights.write([(name, kept)])
    assert broken.finish.kind == "abort" and broken.finish.shown["status_code"] == 500
    assert "not finite" in broken.finish.shown["message"]
    sound = queue(engine, random_prompt(9), 8)
    engine.run_until_idle()
    assert len(sound.output) == 8
