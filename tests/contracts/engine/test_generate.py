"""What /generate answers: shapes, batches, finish reasons, stop handling, sampling limits and errors."""

import pytest

from tests.contracts.engine.speaking import Engine, Reference

META_KEYS = {
    "id",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "weight_version",
}
TEXT = "Two and two make"


@pytest.fixture
def prompt(reference: Reference) -> list[int]:
    return reference.encode(TEXT)


@pytest.fixture
def ten_greedy(engine: Engine, prompt: list[int]) -> dict:
    """Ten greedy tokens after the prompt, none of which ends the sequence."""
    return engine.greedy(prompt, 10, ignore_eos=True)


def test_a_reply_has_text_tokens_and_what_they_cost(engine, prompt, reference):
    reply = engine.generate(prompt, max_new_tokens=5, ignore_eos=True, top_level={"rid": "contract-1"})
    meta = reply["meta_info"]
    assert meta.keys() >= META_KEYS
    assert len(reply["output_ids"]) == 5 == meta["completion_tokens"]
    assert reply["text"] == reference.tokenizer.decode(reply["output_ids"], skip_special_tokens=True)
    assert meta["id"] == "contract-1"
    assert meta["prompt_tokens"] == len(prompt)
    assert meta["finish_reason"] == {"type": "length", "length": 5}
    assert len(meta["output_token_logprobs"]) == 5
    assert meta["input_token_logprobs"] == []


def test_without_return_logprob_there_are_none(engine, prompt):
    meta = engine.ok("/generate", {"input_ids": prompt, "sampling_params": {"max_new_tokens": 2}})["meta_info"]
    assert "output_token_logprobs" not in meta
    assert "input_token_logprobs" not in meta


def test_text_is_tokenized_by_the_engine(engine, prompt):
    by_text = engine.ok("/generate", {"text": TEXT, "sampling_params": {"max_new_tokens": 6, "temperature": 0}})
    assert by_text["output_ids"] == engine.greedy(prompt, 6)["output_ids"]
    assert by_text["meta_info"]["prompt_tokens"] == len(prompt)


def test_token_ids_win_over_text(engine, prompt):
    request = {
        "text": "something else",
        "input_ids": prompt,
        "sampling_params": {"max_new_tokens": 6, "temperature": 0},
    }
    assert engine.ok("/generate", request)["output_ids"] == engine.greedy(prompt, 6)["output_ids"]


def test_sampling_params_may_be_absent(engine, prompt):
    reply = engine.ok("/generate", {"input_ids": prompt})
    assert 1 <= reply["meta_info"]["completion_tokens"] <= 128


def test_unknown_top_level_fields_are_ignored(engine, prompt):
    assert engine.generate(prompt, max_new_tokens=1, top_level={"bogus": 1})["output_ids"]


def test_an_own_id_is_made_up_for_each_request_without_one(engine, prompt):
    ids = {engine.generate(prompt, max_new_tokens=1)["meta_info"]["id"] for _ in range(2)}
    assert len(ids) == 2 and all(ids)


def test_n_gives_a_list_of_different_samples(engine, prompt):
    replies = engine.generate(prompt, max_new_tokens=12, n=4, ignore_eos=True)
    assert len(replies) == 4
    assert len({tuple(reply["output_ids"]) for reply in replies}) > 1
    assert len({reply["meta_info"]["id"] for reply in replies}) == 4


def test_a_batch_is_answered_in_its_order_with_its_ids(engine, prompt, reference):
    prompts = [prompt, reference.encode("The engine")]
    replies = engine.generate(prompts, temperature=0, max_new_tokens=4, top_level={"rid": ["batch-a", "batch-b"]})
    assert [reply["meta_info"]["id"] for reply in replies] == ["batch-a", "batch-b"]
    assert [reply["meta_info"]["prompt_tokens"] for reply in replies] == [len(p) for p in prompts]
    for one, reply in zip(prompts, replies, strict=True):
        assert reply["output_ids"] == engine.greedy(one, 4)["output_ids"]


def test_a_batch_may_have_sampling_params_each(engine, prompt):
    request = {
        "input_ids": [prompt, prompt],
        "sampling_params": [{"max_new_tokens": 1}, {"max_new_tokens": 3, "ignore_eos": True}],
    }
    assert [reply["meta_info"]["completion_tokens"] for reply in engine.ok("/generate", request)] == [1, 3]


def test_a_batch_of_one_is_a_list_of_one(engine, prompt):
    assert len(engine.generate([prompt], max_new_tokens=1)) == 1


def test_a_batch_of_texts_with_n_gives_n_for_each_in_order(engine):
    request = {"text": ["The", "A wheel turns"], "sampling_params": {"max_new_tokens": 2, "n": 2, "temperature": 0}}
    replies = engine.ok("/generate", request)
    counts = [reply["meta_info"]["prompt_tokens"] for reply in replies]
    assert len(counts) == 4
    assert counts[0] == counts[1] < counts[2] == counts[3]


def test_zero_new_tokens_score_the_prompt_only(engine, prompt):
    reply = engine.generate(prompt, max_new_tokens=0, temperature=0, top_level={"logprob_start_len": 0})
    assert reply["text"] == "" and reply["output_ids"] == []
    assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert reply["meta_info"]["output_token_logprobs"] == []
    assert [token for _, token, _ in reply["meta_info"]["input_token_logprobs"]] == prompt


# --- how a response ends ---------------------------------------------------------------------------------------------


def test_the_end_of_sequence_token_is_in_the_tokens_but_not_in_the_text(engine, reference):
    prompt = reference.prompt_before_eos()
    if prompt is None:
        pytest.skip("no short prompt of this model is followed by the end of sequence")
    reply = engine.greedy(prompt, 5)
    assert reply["output_ids"] == [reference.eos_id]
    assert reply["text"] == ""
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": reference.eos_id}
    assert len(reply["meta_info"]["output_token_logprobs"]) == 1
    ignoring = engine.greedy(prompt, 5, ignore_eos=True)
    assert ignoring["output_ids"][0] == reference.eos_id
    assert ignoring["meta_info"]["finish_reason"] == {"type": "length", "length": 5}


def test_a_special_token_shows_in_the_text_when_asked(engine, reference):
    prompt = reference.prompt_before_eos()
    if prompt is None:
        pytest.skip("no short prompt of this model is followed by the end of sequence")
    shown = engine.greedy(prompt, 5, ignore_eos=True, skip_special_tokens=False)
    assert shown["text"].startswith(reference.tokenizer.decode([reference.eos_id]))


def test_spaces_between_special_tokens_changes_no_text(engine, prompt, reference):
    """The router drops this field, so nothing may hang on it."""
    ends = {"ignore_eos": True, "skip_special_tokens": False, "logit_bias": {str(reference.eos_id): 100.0}}
    replies = [engine.greedy(prompt, 3, spaces_between_special_tokens=value, **ends) for value in (False, True)]
    assert [reply["output_ids"] for reply in replies] == [[reference.eos_id] * 3] * 2
    assert [reply["text"] for reply in replies] == [reference.tokenizer.decode([reference.eos_id] * 3)] * 2


def stop_inside(ten_greedy: dict, reference: Reference) -> tuple[str, int]:
    """A string in the middle of ten greedy tokens' text, and how many tokens it takes until it is complete."""
    ids = ten_greedy["output_ids"]
    before = reference.tokenizer.decode(ids[:4])
    stop = reference.tokenizer.decode(ids[:6])[len(before) - 1 :]
    complete_after = next(n for n in range(1, 11) if stop in reference.tokenizer.decode(ids[:n]))
    assert len(stop) > 1 and "�" not in stop
    return stop, complete_after


def test_a_stop_string_is_cut_from_the_text_but_its_tokens_stay(engine, prompt, ten_greedy, reference):
    stop, num_tokens = stop_inside(ten_greedy, reference)
    reply = engine.greedy(prompt, 10, stop=stop, ignore_eos=True)
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert reply["output_ids"] == ten_greedy["output_ids"][:num_tokens]
    assert reply["meta_info"]["completion_tokens"] == num_tokens == len(reply["meta_info"]["output_token_logprobs"])
    assert reply["text"] == ten_greedy["text"][: ten_greedy["text"].index(stop)]


def test_no_stop_trim_keeps_the_stop_string(engine, prompt, ten_greedy, reference):
    stop, _ = stop_inside(ten_greedy, reference)
    reply = engine.greedy(prompt, 10, stop=["never there", stop], no_stop_trim=True, ignore_eos=True)
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert reply["text"] == reference.tokenizer.decode(reply["output_ids"])
    assert stop in reply["text"]


def test_a_stop_string_that_never_comes_changes_nothing(engine, prompt, ten_greedy):
    reply = engine.greedy(prompt, 10, stop=["never there"], ignore_eos=True)
    assert (reply["text"], reply["output_ids"]) == (ten_greedy["text"], ten_greedy["output_ids"])
    assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": 10}


def first_new_token(ten_greedy: dict, after: int) -> int:
    ids = ten_greedy["output_ids"]
    return next(n for n in range(after, 10) if ids[n] not in ids[:n])


def test_a_stop_token_stays_in_the_tokens_and_leaves_the_text(engine, prompt, ten_greedy, reference):
    position = first_new_token(ten_greedy, 2)
    stop_id = ten_greedy["output_ids"][position]
    reply = engine.greedy(prompt, 10, stop_token_ids=[stop_id])
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop_id}
    assert reply["output_ids"] == ten_greedy["output_ids"][: position + 1]
    assert reply["text"] == reference.tokenizer.decode(reply["output_ids"][:-1])
    untrimmed = engine.greedy(prompt, 10, stop_token_ids=[stop_id], no_stop_trim=True)
    assert untrimmed["text"] == reference.tokenizer.decode(reply["output_ids"])


def test_the_first_token_may_be_the_stop_token(engine, prompt, ten_greedy):
    stop_id = ten_greedy["output_ids"][0]
    reply = engine.greedy(prompt, 10, stop_token_ids=[stop_id])
    assert (reply["text"], reply["output_ids"]) == ("", [stop_id])


def test_ignore_eos_ignores_stop_tokens_too(engine, prompt, ten_greedy):
    reply = engine.greedy(prompt, 10, stop_token_ids=[ten_greedy["output_ids"][2]], ignore_eos=True)
    assert reply["output_ids"] == ten_greedy["output_ids"]


def test_min_new_tokens_forbids_stop_tokens_until_then(engine, prompt, ten_greedy):
    stop_id = ten_greedy["output_ids"][0]
    reply = engine.greedy(prompt, 8, stop_token_ids=[stop_id], min_new_tokens=6)
    assert stop_id not in reply["output_ids"][:6]
    assert len(reply["output_ids"]) >= 6


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=str)
def test_a_limit_that_leaves_one_token_is_greedy(engine, prompt, ten_greedy, limit):
    reply = engine.generate(prompt, temperature=1.3, max_new_tokens=10, ignore_eos=True, **limit)
    assert reply["output_ids"] == ten_greedy["output_ids"]


def test_greedy_decoding_follows_the_likeliest_token(prompt, ten_greedy, reference):
    ids = ten_greedy["output_ids"]
    assert reference.logits([*prompt, *ids], len(prompt) - 1)[:-1].argmax(-1).tolist() == ids


def test_a_seed_gives_the_same_sample_again(engine, prompt):
    if not engine.keeps_seeds:
        pytest.skip("this SGLang was started without --enable-deterministic-inference")
    sample = {"max_new_tokens": 12, "ignore_eos": True}
    first, again, other = (engine.generate(prompt, **sample, sampling_seed=seed)["output_ids"] for seed in (7, 7, 8))
    assert first == again != other


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "complaint"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 2, "min_new_tokens": 3}, "min_new_tokens"),
        ({"max_new_tokens": "2"}, ""),
    ],
    ids=str,
)
def test_a_sampling_value_out_of_range_is_refused(engine, prompt, sampling, complaint):
    reply = engine.post("/generate", {"input_ids": prompt, "sampling_params": sampling})
    if not complaint:  # a wrong type
        assert reply.status_code in engine.refusals
        return
    assert reply.status_code == 400
    assert complaint in str(reply.json()["error"])


def test_an_unknown_sampling_field_is_refused_with_the_known_ones(engine, prompt):
    reply = engine.post("/generate", {"input_ids": prompt, "sampling_params": {"max_new_tokns": 2}})
    assert reply.status_code in engine.refusals
    engine.needs_newer_sglang_than("0.5.16", "says no more than Internal Server Error")
    assert "unknown field `max_new_tokns`" in reply.json()["error"]
    assert "`max_new_tokens`" in reply.json()["error"]


@pytest.mark.parametrize("request_body", [{}, {"input_ids": []}, {"sampling_params": {"max_new_tokens": 3}}], ids=str)
def test_missing_input_is_refused(engine, request_body):
    reply = engine.post("/generate", request_body)
    assert reply.status_code == 400
    assert "input_ids" in reply.json()["error"]["message"]


def test_a_prompt_as_long_as_the_context_is_refused_with_both_numbers(engine, prompt):
    too_long = [prompt[0]] * engine.context_length
    reply = engine.post("/generate", {"input_ids": too_long, "sampling_params": {"max_new_tokens": 2}})
    assert reply.status_code == 400
    assert f"{engine.context_length} tokens" in reply.json()["error"]["message"]
    assert "context length" in reply.json()["error"]["message"]


def test_a_response_that_cannot_fit_the_context_is_refused(engine, prompt):
    request = {"input_ids": [prompt[0]] * (engine.context_length - 4), "sampling_params": {"max_new_tokens": 20}}
    reply = engine.post("/generate", request)
    assert reply.status_code == 400
    assert "maximum context length" in reply.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"{oops", b"", b"[1, 2]"])
def test_a_body_that_is_no_request_is_refused(engine, body):
    assert engine.http.post("/generate", content=body).status_code == 400


def test_an_unknown_path_and_a_wrong_method_are_refused(engine):
    assert engine.http.get("/nowhere").status_code == 404
    assert engine.http.get("/generate").status_code == 405


def test_the_engine_serves_on_after_a_refused_request(engine, prompt, ten_greedy):
    engine.post("/generate", {"sampling_params": {}})
    assert engine.greedy(prompt, 10, ignore_eos=True)["output_ids"] == ten_greedy["output_ids"]
