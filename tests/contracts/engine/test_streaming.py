"""Streaming: every event repeats all that came before it, and the last one is the whole reply."""

import itertools
import time

import pytest

from tests.contracts.engine.speaking import Engine, Reference


@pytest.fixture
def prompt(reference: Reference) -> list[int]:
    return reference.encode("The engine answers")


def request(prompt: list[int], **sampling: object) -> dict:
    return {
        "input_ids": prompt,
        "return_logprob": True,
        "sampling_params": {"temperature": 0, "ignore_eos": True, **sampling},
    }


def test_events_are_cumulative_and_the_last_equals_the_plain_reply(engine: Engine, prompt):
    stream = engine.stream(request(prompt, max_new_tokens=20))
    events = stream.finish()
    assert stream.status == 200 and stream.content_type.startswith("text/event-stream")
    assert len(events) > 2
    for before, after in itertools.pairwise(events):
        count = len(before["output_ids"])
        assert after["output_ids"][:count] == before["output_ids"]
        assert after["meta_info"]["output_token_logprobs"][:count] == before["meta_info"]["output_token_logprobs"]
        assert after["text"].startswith(before["text"].rstrip("�"))
        assert before["meta_info"]["finish_reason"] is None
        assert before["meta_info"]["completion_tokens"] == count
    whole = engine.ok("/generate", request(prompt, max_new_tokens=20))
    assert events[-1]["text"] == whole["text"]
    assert events[-1]["output_ids"] == whole["output_ids"]
    assert events[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 20}


def test_all_events_carry_the_requests_id_and_weight_version(engine: Engine, prompt):
    events = engine.stream({**request(prompt, max_new_tokens=4), "rid": "streamed-1"}).finish()
    assert {event["meta_info"]["id"] for event in events} == {"streamed-1"}
    assert {event["meta_info"]["weight_version"] for event in events} == {engine.weight_version()}


def test_text_that_may_become_a_stop_string_is_held_back(engine: Engine, prompt, reference: Reference):
    ids = engine.greedy(prompt, 12, ignore_eos=True)["output_ids"]
    stop = reference.tokenizer.decode(ids[5:8])
    assert len(stop) > 2
    events = engine.stream(request(prompt, max_new_tokens=12, stop=stop)).finish()
    final = events[-1]
    assert final["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert stop not in final["text"]
    assert all(final["text"].startswith(event["text"].rstrip("�")) for event in events)


def test_n_samples_are_told_apart_by_index(engine: Engine, prompt):
    events = engine.stream(request(prompt, max_new_tokens=5, n=2, temperature=1.0)).finish()
    last = {event["index"]: event for event in events}
    assert last.keys() == {0, 1}
    assert all(len(event["output_ids"]) == 5 for event in last.values())
    assert last[0]["meta_info"]["id"] != last[1]["meta_info"]["id"]


def test_a_wrong_request_is_refused_before_the_stream_begins(engine: Engine, prompt):
    engine.needs_newer_sglang_than("0.5.16", "breaks off the connection instead")
    reply = engine.post("/generate", {"input_ids": prompt, "stream": True, "sampling_params": {"bogus": 1}})
    assert reply.status_code == 400
    assert "unknown field `bogus`" in reply.json()["error"]


def test_a_client_that_goes_away_ends_its_request(engine: Engine, prompt):
    body = {**request(prompt, max_new_tokens=6000), "stream": True}
    with engine.http.stream("POST", "/generate", json=body) as reply:
        next(reply.iter_lines())
    deadline = time.monotonic() + 20
    while engine.num_requests() > 0:
        assert time.monotonic() < deadline, "the engine goes on generating for nobody"
        time.sleep(0.1)
