"""/v1/chat/completions as OpenAI's clients read it: chat template, usage, log-probs, stop, streaming."""

import pytest

from tests.contracts.engine.speaking import Engine, Reference

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the sum of 3 and 5?"}]
PATH = "/v1/chat/completions"


def body(**fields: object) -> dict:
    return {"model": "any", "messages": MESSAGES, "temperature": 0, **fields}


@pytest.fixture
def greedy_chat(engine: Engine, reference: Reference) -> dict:
    """The same request through /generate, with the chat template applied here."""
    ids = reference.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    return engine.greedy(ids, 8)


def test_a_chat_is_its_template_generated(engine: Engine, greedy_chat):
    reply = engine.ok(PATH, body(max_tokens=8))
    (choice,) = reply["choices"]
    assert reply["object"] == "chat.completion" and reply["id"] and reply["created"] > 0
    assert reply["model"] == "any"
    assert choice["index"] == 0
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == greedy_chat["text"]
    assert choice["finish_reason"] in ("length", "stop")
    assert choice["logprobs"] is None


def test_usage_counts_both_sides(engine: Engine, greedy_chat):
    usage = engine.ok(PATH, body(max_tokens=8))["usage"]
    assert usage["prompt_tokens"] == greedy_chat["meta_info"]["prompt_tokens"]
    assert usage["completion_tokens"] == greedy_chat["meta_info"]["completion_tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_both_names_of_the_length_limit_work(engine: Engine):
    for limit in ("max_tokens", "max_completion_tokens"):
        assert engine.ok(PATH, body(ignore_eos=True, **{limit: 3}))["usage"]["completion_tokens"] == 3


def test_log_probs_are_those_of_generate(engine: Engine, greedy_chat, reference):
    (choice,) = engine.ok(PATH, body(max_tokens=8, logprobs=True, top_logprobs=2))["choices"]
    entries = choice["logprobs"]["content"]
    expected = greedy_chat["meta_info"]["output_token_logprobs"][: len(entries)]
    assert [entry["logprob"] for entry in entries] == pytest.approx(
        [log_prob for log_prob, _, _ in expected], abs=engine.log_prob_tolerance
    )
    for entry, (_, token, _) in zip(entries, expected, strict=True):
        assert entry["token"] == reference.tokenizer.decode([token])
        assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"]
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["logprob"] >= entry["top_logprobs"][1]["logprob"]


def test_n_choices_are_numbered(engine: Engine):
    reply = engine.ok(PATH, body(max_tokens=6, n=3, temperature=1.0, ignore_eos=True))
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert reply["usage"]["completion_tokens"] == 18


def test_a_stop_string_ends_the_answer_before_it(engine: Engine, greedy_chat):
    text = greedy_chat["text"]
    stop = text[len(text) // 2]
    (choice,) = engine.ok(PATH, body(max_tokens=8, stop=[stop]))["choices"]
    assert choice["message"]["content"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"
    assert choice["matched_stop"] == stop


def test_the_weight_version_comes_along(engine: Engine):
    reply = engine.ok(PATH, body(max_tokens=2))
    assert reply["metadata"]["weight_version"] == engine.weight_version()


def test_a_streamed_chat_is_made_of_deltas(engine: Engine, greedy_chat):
    stream = engine.stream(body(max_tokens=8, logprobs=True, stream_options={"include_usage": True}), PATH)
    events = stream.finish()
    assert stream.content_type.startswith("text/event-stream")
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    choices = [choice for event in events for choice in event["choices"]]
    assert choices[0]["delta"]["role"] == "assistant"
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == greedy_chat["text"]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] in (["length"], ["stop"])
    assert sum(len(choice["logprobs"]["content"]) for choice in choices if choice["logprobs"]) >= 1
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == greedy_chat["meta_info"]["completion_tokens"]


def test_usage_is_streamed_only_when_asked(engine: Engine):
    events = engine.stream(body(max_tokens=2), PATH).finish()
    assert all(not event.get("usage") for event in events)


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": "any"},
        {"model": "any", "messages": []},
        {"model": "any", "messages": [{"role": "nobody", "content": "x"}]},
        {"model": "any", "messages": MESSAGES, "temperature": -1},
    ],
    ids=["no messages", "empty messages", "unknown role", "negative temperature"],
)
def test_a_wrong_chat_is_refused(engine: Engine, wrong):
    reply = engine.post(PATH, wrong)
    assert reply.status_code == 400
    assert reply.json()["message"] and reply.json()["code"] == 400
