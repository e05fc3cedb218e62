"""The /generate body: defaults, refusals and how batches unfold."""

import pytest

from slime.backends.embedded.protocol import (
    ALL_TOKENS,
    SAMPLING_FIELDS,
    RequestError,
    parse_generate,
    parse_sampling_params,
    resolve_length,
)

VOCAB = 100


def parse(**body):
    return parse_generate(body, VOCAB)


def test_defaults_are_sglangs():
    params = parse_sampling_params({}, VOCAB)
    assert (params.max_new_tokens, params.temperature, params.top_p, params.top_k) == (128, 1.0, 1.0, ALL_TOKENS)
    assert params.skip_special_tokens and not params.ignore_eos and not params.no_stop_trim
    assert parse_sampling_params({"temperature": None, "top_k": -1}, VOCAB) == params
    assert parse_sampling_params({"temperature": 1e-7}, VOCAB).temperature == 0.0
    assert parse_sampling_params({"max_new_tokens": None}, VOCAB).max_new_tokens is None


def test_an_unknown_field_is_refused_with_the_known_ones():
    with pytest.raises(RequestError) as error:
        parse_sampling_params({"max_new_tokens": 3, "bogus": 2}, VOCAB)
    assert error.value.status == 400
    text = error.value.body["error"]
    assert text.startswith("unknown field `bogus`, expected one of `max_new_tokens`, ")
    assert all(f"`{name}`" in text for name in SAMPLING_FIELDS)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"temperature": -1}, "temperature must be a non-negative finite number, got -1.0."),
        ({"temperature": float("nan")}, "non-negative finite"),
        ({"top_p": 0}, "top_p must be in (0, 1], got 0.0."),
        ({"top_p": 1.5}, "top_p must be in (0, 1]"),
        ({"top_k": 0}, "top_k must be -1 (disable) or at least 1, got 0."),
        ({"min_p": 2}, "min_p must be in [0, 1]"),
        ({"frequency_penalty": 3}, "frequency_penalty must be in [-2, 2]"),
        ({"repetition_penalty": 0}, "repetition_penalty must be in (0, 2]"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0"),
        ({"min_new_tokens": 5, "max_new_tokens": 3}, "min_new_tokens must be in [0, max_new_tokens(3)], got 5."),
        ({"logit_bias": {"100": 1.0}}, "logit_bias must has keys in [0, 99]"),
        ({"sampling_seed": 2**63}, "sampling_seed must be in"),
        ({"stop": ["x"] * 33}, "at most 32 stop strings"),
        ({"max_new_tokens": "3"}, 'invalid type: string "3", expected i64'),
        ({"temperature": True}, "invalid type: boolean `true`, expected f64"),
        ({"ignore_eos": 1}, "invalid type: integer `1`, expected a boolean"),
        ({"regex": "a+"}, "cannot honour sampling_params.regex"),
        ({"beam_width": 2}, "cannot honour sampling_params.beam_width"),
        ([], "invalid type: sequence, expected struct SamplingParams"),
    ],
)
def test_wrong_sampling_is_refused(params, words):
    with pytest.raises(RequestError) as error:
        parse_sampling_params(params, VOCAB)
    assert words in str(error.value) and error.value.status == 400


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "Either text, input_ids or input_embeds should be provided."),
        ({"input_ids": []}, "input_ids cannot be empty."),
        ({"input_ids": [[1], []]}, "input_ids cannot be empty."),
        ({"input_ids": [1, 100]}, "out-of-vocabulary token id 100"),
        ({"input_ids": ["a"]}, "expected i64"),
        ({"input_ids": "abc"}, "expected a sequence"),
        ({"input_ids": [1], "image_data": "x"}, "cannot honour `image_data`"),
        ({"input_ids": [1], "return_hidden_states": True}, "cannot honour `return_hidden_states`"),
        ({"input_ids": [[1], [2]], "rid": ["a"]}, "rids length mismatch"),
        ({"input_ids": [[1], [2]], "rid": ["a", "a"]}, "Duplicate request ids"),
        ({"input_ids": [[1], [2]], "sampling_params": [{}]}, "1 entries for 2 prompts"),
        ({"input_ids": [[1], [2]], "sampling_params": [{"n": 1}, {"n": 2}]}, "should be the same for all samples"),
        ({"input_ids": [1], "token_ids_logprob": [100]}, "out-of-vocabulary"),
    ],
)
def test_wrong_bodies_are_refused(body, words):
    with pytest.raises(RequestError) as error:
        parse(**body)
    assert words in str(error.value)


def test_one_prompt_gives_one_reply_and_a_list_gives_a_list():
    assert not parse(input_ids=[1, 2]).is_list
    assert parse(input_ids=[[1, 2]]).is_list
    assert parse(input_ids=[1], sampling_params={"n": 2}).is_list


def test_samples_of_a_prompt_are_neighbours_with_ids_of_their_own():
    call = parse(input_ids=[[1], [2]], sampling_params={"n": 3}, rid="job")
    assert [item.input_ids for item in call.items] == [[1]] * 3 + [[2]] * 3
    assert len({item.rid for item in call.items}) == 6


def test_options_may_differ_within_a_batch():
    call = parse(
        input_ids=[[1], [2]],
        rid="job",
        return_logprob=[True, False],
        sampling_params=[{"max_new_tokens": 1}, {"max_new_tokens": 2}],
        token_ids_logprob=[[4], [5, 6]],
    )
    assert [item.rid for item in call.items] == ["job_0", "job_1"]
    assert [item.return_logprob for item in call.items] == [True, False]
    assert [item.sampling.max_new_tokens for item in call.items] == [1, 2]
    assert [item.token_ids_logprob for item in call.items] == [(4,), (5, 6)]


def test_prompt_and_reply_must_fit_the_context():
    assert resolve_length(10, 6, 16) == 6
    assert resolve_length(10, None, 16) == 5
    with pytest.raises(RequestError, match=r"The input \(16 tokens\) is longer than the model's context length \(16"):
        resolve_length(16, 1, 16)
    with pytest.raises(RequestError, match="You requested a total of 17 tokens: 10 tokens from the input"):
        resolve_length(10, 7, 16)
