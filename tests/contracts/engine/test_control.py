"""Abort, the three ways to pause, flush, memory given back: what becomes of requests in flight and of new ones."""

import time

import pytest

from tests.contracts.engine.speaking import LONG, Engine, Reference

MODES = ["abort", "retract", "in_place"]


@pytest.fixture
def prompt(reference: Reference) -> list[int]:
    return reference.encode("A wheel turns")


def long_request(prompt: list[int], rid: str, max_new_tokens: int = LONG) -> dict:
    return {
        "input_ids": prompt,
        "rid": rid,
        "return_logprob": True,
        "sampling_params": {"max_new_tokens": max_new_tokens, "ignore_eos": True},
    }


def assert_aborted_with_what_it_had(reply: dict, at_least: int = 1) -> None:
    count = len(reply["output_ids"])
    assert reply["meta_info"]["finish_reason"]["type"] == "abort"
    assert at_least <= count < LONG
    assert reply["meta_info"]["completion_tokens"] == count == len(reply["meta_info"]["output_token_logprobs"])
    assert reply["text"]


# --- abort -----------------------------------------------------------------------------------------------------------


def test_an_aborted_request_answers_with_what_it_had(engine: Engine, prompt):
    stream = engine.stream(long_request(prompt, "abort-streamed"))
    plain = engine.background(long_request(prompt, "plain-aborted"))
    stream.wait_for_events(3)
    engine.ok("/abort_request", {"rid": "abort-streamed"})
    assert_aborted_with_what_it_had(stream.finish()[-1], at_least=3)
    assert not plain.done()
    engine.ok("/abort_request", {"rid": "plain-aborted"})
    assert plain.result(30)["meta_info"]["finish_reason"]["type"] == "abort"


def test_abort_all_ends_every_request(engine: Engine, prompt):
    streams = [engine.stream(long_request(prompt, f"all-{n}")) for n in range(3)]
    for stream in streams:
        stream.wait_for_events(2)
    engine.ok("/abort_request", {"abort_all": True})
    for stream in streams:
        assert_aborted_with_what_it_had(stream.finish()[-1])
    assert engine.greedy(prompt, 2)["output_ids"]


@pytest.mark.parametrize("whom", [{"rid": "nobody-has-this-id"}, {}], ids=str)
def test_aborting_nobody_is_no_error(engine: Engine, whom):
    reply = engine.post("/abort_request", whom)
    assert reply.status_code == 200 and reply.text == ""


# --- pause -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_new_request_waits_until_the_engine_goes_on(engine: Engine, prompt, mode):
    answer = engine.ok("/pause_generation", {"mode": mode})
    assert answer == {"message": "Generation paused successfully.", "status": "ok"}
    waiting = engine.background({"input_ids": prompt, "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}})
    time.sleep(0.7)
    assert not waiting.done()
    answer = engine.ok("/continue_generation", {})
    assert answer == {"message": "Generation continued successfully.", "status": "ok"}
    assert len(waiting.result(30)["output_ids"]) == 3


def test_pausing_by_abort_returns_after_all_requests_have_answered(engine: Engine, prompt):
    stream = engine.stream(long_request(prompt, "paused-abort"))
    stream.wait_for_events(2)
    engine.ok("/pause_generation", {"mode": "abort"})
    assert_aborted_with_what_it_had(stream.finish()[-1])
    assert engine.num_requests() == 0


def test_abort_is_the_default_mode(engine: Engine, prompt):
    stream = engine.stream(long_request(prompt, "paused-default"))
    stream.wait_for_events(2)
    engine.ok("/pause_generation", {})
    assert_aborted_with_what_it_had(stream.finish()[-1])


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_requests_in_flight_stand_still_and_then_go_on_to_their_end(engine: Engine, prompt, mode):
    length = 400
    stream = engine.stream(long_request(prompt, f"paused-{mode}", length))
    stream.wait_for_events(3)
    engine.ok("/pause_generation", {"mode": mode})
    time.sleep(0.3)
    seen = len(stream.events)
    time.sleep(0.5)
    assert len(stream.events) == seen and stream.is_running
    engine.ok("/continue_generation", {})
    final = stream.finish()[-1]
    assert final["meta_info"]["finish_reason"] == {"type": "length", "length": length}
    assert len(final["output_ids"]) == length == len(final["meta_info"]["output_token_logprobs"])
    assert final["output_ids"][: len(stream.events[seen - 1]["output_ids"])] == stream.events[seen - 1]["output_ids"]


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_pause_leaves_no_trace_in_tokens_and_log_probs(engine: Engine, prompt, mode):
    """Greedy, so that the interrupted response has one right answer."""
    length = 300
    undisturbed = engine.greedy(prompt, length, ignore_eos=True)
    request = long_request(prompt, f"traceless-{mode}", length)
    request["sampling_params"]["temperature"] = 0
    stream = engine.stream(request)
    stream.wait_for_events(3)
    engine.ok("/pause_generation", {"mode": mode})
    engine.ok("/continue_generation", {})
    final = stream.finish()[-1]
    assert final["output_ids"] == undisturbed["output_ids"]
    pairs = zip(
        final["meta_info"]["output_token_logprobs"], undisturbed["meta_info"]["output_token_logprobs"], strict=True
    )
    assert max(abs(a[0] - b[0]) for a, b in pairs) < engine.log_prob_tolerance


def test_a_retracted_request_can_be_aborted_while_the_engine_is_paused(engine: Engine, prompt):
    engine.needs_newer_sglang_than("0.5.16", "answers it with its last token alone")
    stream = engine.stream(long_request(prompt, "retracted-then-aborted"))
    stream.wait_for_events(3)
    engine.ok("/pause_generation", {"mode": "retract"})
    engine.ok("/abort_request", {"rid": "retracted-then-aborted"})
    assert_aborted_with_what_it_had(stream.finish()[-1], at_least=3)


def test_a_request_paused_in_place_can_be_aborted(engine: Engine, prompt):
    stream = engine.stream(long_request(prompt, "in-place-then-aborted"))
    stream.wait_for_events(3)
    engine.ok("/pause_generation", {"mode": "in_place"})
    engine.ok("/abort_request", {"rid": "in-place-then-aborted"})
    engine.ok("/continue_generation", {})
    assert_aborted_with_what_it_had(stream.finish()[-1], at_least=3)


def test_pausing_twice_and_going_on_unpaused_are_no_errors(engine: Engine, prompt):
    engine.ok("/continue_generation", {})
    for mode in MODES:
        engine.ok("/pause_generation", {"mode": mode})
    engine.ok("/continue_generation", {})
    assert engine.greedy(prompt, 2)["output_ids"]


def test_an_unknown_mode_is_refused_with_the_known_ones(engine: Engine, prompt):
    reply = engine.post("/pause_generation", {"mode": "gently"})
    assert reply.status_code == 400
    assert all(mode in reply.text for mode in MODES)
    assert engine.greedy(prompt, 2)["output_ids"]


# --- cache and memory ------------------------------------------------------------------------------------------------


def test_flushing_forgets_what_was_cached(engine: Engine, reference: Reference):
    prompt = reference.encode("A wheel turns; the wheel that turns the wheel turns too. " * 3)
    engine.greedy(prompt, 1)
    reply = engine.post("/flush_cache", {})
    assert reply.status_code == 200 and "flushed" in reply.text
    assert engine.greedy(prompt, 1)["meta_info"]["cached_tokens"] == 0


def test_a_busy_engine_refuses_to_flush(engine: Engine, prompt):
    stream = engine.stream(long_request(prompt, "busy"))
    stream.wait_for_events(2)
    assert engine.post("/flush_cache", {}).status_code == 400
    engine.ok("/abort_request", {"abort_all": True})
    stream.finish()


@pytest.mark.parametrize(("mode", "status"), [("retract", 200), ("in_place", 400)])
def test_a_paused_engine_flushes_what_it_computes_anew_but_not_what_stands_still(engine: Engine, prompt, mode, status):
    if mode == "retract":
        engine.needs_newer_sglang_than("0.5.16", "flushes only without any request")
    stream = engine.stream(long_request(prompt, f"flushed-{mode}", 300))
    stream.wait_for_events(2)
    engine.ok("/pause_generation", {"mode": mode})
    assert engine.post("/flush_cache", {}).status_code == status
    engine.ok("/continue_generation", {})
    assert len(stream.finish()[-1]["output_ids"]) == 300


@pytest.mark.parametrize("tags", [None, ["kv_cache"]], ids=str)
def test_an_engine_generates_again_after_giving_back_memory(engine: Engine, prompt, tags):
    body = {} if tags is None else {"tags": tags}
    before = engine.greedy(prompt, 6)["output_ids"]
    engine.ok("/release_memory_occupation", body)
    engine.ok("/resume_memory_occupation", body)
    if tags is None:
        engine.ok("/update_weights_from_disk", {"model_path": engine.model_path})
    assert engine.greedy(prompt, 6)["output_ids"] == before
