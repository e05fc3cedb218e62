"""One sample: the request that goes out, the reply that comes in, hooks and rewards."""

import pytest

from slime.rollout import sglang_rollout
from slime.rollout.sample_hooks import set_current_rollout_id
from slime.rollout.sampling import rollout_sampling_params
from slime.rollout.sglang_rollout import GenerateState, generate, generate_and_rm, generate_and_rm_group, get_model_url
from slime.utils.types import Sample
from tests.unit.rollout import fakes, plugins

PLUGINS = plugins.__name__


def text(ids):
    return "".join(map(chr, ids))


def count_encodings(monkeypatch):
    """The texts that are tokenized from now on."""
    asked, encode = [], fakes.FakeTokenizer.encode

    def counting(self, text, add_special_tokens=True):
        asked.append(text)
        return encode(self, text, add_special_tokens)

    monkeypatch.setattr(fakes.FakeTokenizer, "encode", counting)
    return asked


async def one(args, sample, **kwargs):
    return await generate_and_rm(args, sample, rollout_sampling_params(args), **kwargs)


async def test_each_request_to_the_embedded_engine_has_an_id_of_its_own(engine, make_args):
    """SGLang, which refuses an id in flight, gets none: see the payload below."""
    args = make_args(rollout_engine="embedded")
    for _ in range(2):
        await generate(args, Sample(prompt="hi"), rollout_sampling_params(args))
    first, second = (request["rid"] for request in engine.requests)
    assert first and second and first != second


async def test_the_payload_is_what_the_engine_documents(engine, make_args):
    args = make_args(rollout_stop=["</answer>"], rollout_stop_token_ids=[7])
    sample = await generate(args, Sample(prompt="hi"), rollout_sampling_params(args))
    assert engine.requests == [
        {
            "sampling_params": {
                "temperature": 1.0,
                "top_p": 1.0,
                "top_k": -1,
                "max_new_tokens": 8,
                "stop": ["</answer>"],
                "stop_token_ids": [7],
                "skip_special_tokens": False,
                "no_stop_trim": True,
                "spaces_between_special_tokens": False,
            },
            "return_logprob": True,
            "input_ids": [104, 105],
        }
    ]
    assert "x-smg-routing-key" not in engine.headers[0]
    assert text(sample.tokens) == "hiok"
    assert (sample.response, sample.response_length) == ("ok", 2)
    assert sample.rollout_log_probs == [-0.5, -0.5]
    assert sample.loss_mask == [1, 1]
    assert sample.weight_versions == ["1"]
    assert sample.status is Sample.Status.COMPLETED


async def test_the_prompt_of_a_group_is_tokenized_once(engine, make_args, monkeypatch):
    asked = count_encodings(monkeypatch)
    args = make_args()
    groups = [[Sample(prompt=prompt, index=i) for i in range(3)] for prompt in ("one", "two")]
    made = [
        sample for group in groups for sample in await generate_and_rm_group(args, group, rollout_sampling_params(args))
    ]
    assert asked == ["one", "two"]
    assert [text(sample.tokens) for sample in made] == ["oneok"] * 3 + ["twook"] * 3
    assert [text(request["input_ids"]) for request in engine.requests] == ["one"] * 3 + ["two"] * 3


async def test_a_prompt_that_a_generate_function_changed_is_tokenized_as_it_is_then(engine, make_args, monkeypatch):
    asked = count_encodings(monkeypatch)
    args = make_args(custom_generate_function_path=f"{PLUGINS}.own_prompt")
    group = [Sample(prompt="one", index=i) for i in range(3)]
    await generate_and_rm_group(args, group, rollout_sampling_params(args))
    assert sorted(text(request["input_ids"]) for request in engine.requests) == ["one0", "one1", "one2"]
    assert asked == ["one0", "one1", "one2"]


async def test_nucleus_sampling_asks_for_the_kept_vocabulary(engine, make_args):
    args = make_args(rollout_top_p=0.9)
    assert GenerateState(args).sampling_params["custom_params"] == {"return_top_p_token_ids": True}


async def test_routing_replay_and_consistent_hashing_are_passed_on(engine, make_args):
    args = make_args(use_rollout_routing_replay=True, router_policy="consistent_hashing")
    await generate(args, Sample(prompt="hi", session_id="s1"), rollout_sampling_params(args))
    assert engine.requests[0]["return_routed_experts"] is True
    assert engine.headers[0]["x-smg-routing-key"] == "s1"


async def test_an_aborted_sample_continues_where_it_stopped(engine, make_args):
    args = make_args()
    sample = Sample(prompt="say:second", status=Sample.Status.ABORTED)
    sample.tokens = [ord(c) for c in "say:second"]
    sample.append_response_tokens(tokens=[ord("f")] * 3, log_probs=[-1.0] * 3, text="fff")
    await generate(args, sample, rollout_sampling_params(args))
    assert text(engine.requests[0]["input_ids"]) == "say:secondfff"
    assert engine.requests[0]["sampling_params"]["max_new_tokens"] == 5
    assert sample.response_length == 8
    assert sample.rollout_log_probs == [-1.0] * 3 + [-0.5] * 5


async def test_a_response_of_full_length_is_truncated_without_a_request(engine, make_args):
    args = make_args(rollout_max_response_len=2)
    sample = Sample(prompt="hi", tokens=[1, 2, 3], response_length=2, rollout_log_probs=[0.0, 0.0])
    await generate(args, sample, rollout_sampling_params(args))
    assert sample.status is Sample.Status.TRUNCATED
    assert engine.requests == []


async def test_the_context_bounds_the_response(engine, make_args):
    args = make_args(rollout_max_context_len=5)
    await generate(args, Sample(prompt="hi"), rollout_sampling_params(args))
    assert engine.requests[0]["sampling_params"]["max_new_tokens"] == 3


async def test_a_message_list_without_template_is_an_error_that_says_what_to_add(engine, make_args):
    args = make_args()
    with pytest.raises(ValueError, match="--apply-chat-template"):
        await generate(args, Sample(prompt=[{"role": "user", "content": "hi"}]), rollout_sampling_params(args))


async def test_a_missing_response_length_is_an_error_that_names_the_flag(engine, make_args):
    args = make_args(rollout_max_response_len=None)
    with pytest.raises(ValueError, match="--rollout-max-response-len"):
        await generate(args, Sample(prompt="hi"), rollout_sampling_params(args))


def without_a_log_prob(reply):
    reply["meta_info"]["output_token_logprobs"].pop()
    return reply


def with_other_ids(reply):
    reply["output_ids"][0] = 1
    return reply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_log_prob, r"request request-0 \(sample 3\): the reply has 2 completion tokens and log-probs of 1"),
        (with_other_ids, r"request request-0 \(sample 3\): output_ids"),
        (lambda reply: {"text": "ok"}, "sample 3 with .* not with a generation"),
        (lambda reply: [reply], "sample 3 with .* not with a generation"),
    ],
)
async def test_a_reply_that_does_not_fit_names_the_request_and_changes_nothing(engine, make_args, change, message):
    engine.change_reply = change
    args = make_args()
    sample = Sample(prompt="hi", index=3)
    with pytest.raises(ValueError, match=message):
        await generate(args, sample, rollout_sampling_params(args))
    assert (text(sample.tokens), sample.response_length) == ("hi", 0)


async def test_a_request_that_fails_once_gives_its_tokens_once(engine, make_args):
    args = make_args()
    sample = await one(args, Sample(prompt="fail:503", label="ok"))
    assert len(engine.requests) == 2
    assert engine.requests[0] == engine.requests[1]
    assert (sample.response, sample.response_length, sample.weight_versions) == ("ok", 2, ["1"])
    assert (sample.reward, plugins.calls) == (1.0, [("exact", None)])


async def test_finished_samples_pass_untouched_and_must_have_a_reward(engine, make_args):
    args = make_args()
    done = Sample(prompt="hi", status=Sample.Status.COMPLETED, reward=0.5)
    assert await one(args, done) is done
    with pytest.raises(AssertionError, match="no reward"):
        await one(args, Sample(prompt="hi", status=Sample.Status.TRUNCATED))
    assert engine.requests == []


async def test_tokens_of_an_older_policy_can_be_masked(engine, make_args):
    args = make_args(partial_rollout=True, mask_offpolicy_in_partial_rollout=True)
    sample = Sample(prompt="hi", label="ok", status=Sample.Status.ABORTED, tokens=[104, 105])
    sample.append_response_tokens(tokens=[111, 107], log_probs=[-1.0, -1.0], text="ok")
    await one(args, sample)
    assert sample.loss_mask == [0, 0, 1, 1]
    assert sample.effective_response_length == 2


async def test_hooks_run_in_order_before_the_reward_with_what_their_signature_takes(engine, make_args):
    set_current_rollout_id(9)
    args = make_args(rollout_sample_hook_path=[f"{PLUGINS}.shout", f"{PLUGINS}.whisper"])
    sample = await one(args, Sample(prompt="hi", index=4, label="ok"), evaluation=True)
    assert sample.metadata["hooks"] == ["shout", "whisper"]
    assert plugins.calls == [("shout", 4, 9, True), ("exact", 4)]


async def test_a_hook_that_returns_something_else_is_an_error(engine, make_args):
    args = make_args(rollout_sample_hook_path=[f"{PLUGINS}.returns_a_number"])
    with pytest.raises(TypeError, match=r"returns_a_number.*int"):
        await one(args, Sample(prompt="hi"))


async def test_a_group_is_rewarded_together_or_one_by_one(engine, make_args):
    def group():
        return [Sample(prompt="hi", label="ok", index=i) for i in range(3)]

    args = make_args()
    made = await generate_and_rm_group(args, group(), rollout_sampling_params(args))
    assert [sample.reward for sample in made] == [1.0] * 3
    assert sorted(plugins.calls) == [("exact", 0), ("exact", 1), ("exact", 2)]
    assert len({sample.session_id for sample in made}) == 3
    plugins.calls.clear()
    args.group_rm, args.custom_rm_path = True, f"{PLUGINS}.exact_of_all"
    made = await generate_and_rm_group(args, group(), rollout_sampling_params(args))
    assert [sample.reward for sample in made] == [1.0] * 3
    assert plugins.calls == [("exact_of_all", [0, 1, 2])]


async def test_seeds_are_sent_only_in_deterministic_runs_and_differ_by_sample(engine, make_args):
    args = make_args()
    await generate_and_rm_group(args, [Sample(prompt="hi", index=0)], rollout_sampling_params(args))
    assert "sampling_seed" not in engine.requests[0]["sampling_params"]
    args.deterministic_mode = True
    group = [Sample(prompt="hi", index=i) for i in (5, 6)]
    await generate_and_rm_group(args, group, rollout_sampling_params(args))
    again = [Sample(prompt="hi", index=i) for i in (6, 5)]
    await generate_and_rm_group(args, again, rollout_sampling_params(args))
    five, six, six_again, five_again = (r["sampling_params"]["sampling_seed"] for r in engine.requests[1:])
    assert five == five_again != six == six_again


async def test_an_error_of_one_sample_names_it_and_ends_its_group(engine, make_args):
    args = make_args()
    group = [Sample(prompt="slow", index=0), Sample(prompt="fail:400", index=1, group_index=7)]
    with pytest.raises(Exception, match="400: the engine says no") as error:
        await generate_and_rm_group(args, group, rollout_sampling_params(args))
    assert error.value.__notes__ == ["while making sample 1 of prompt 7"]


async def test_requests_spread_over_the_least_loaded_data_parallel_ranks(engine, make_args):
    state = GenerateState(make_args(sglang_dp_size=3))
    with state.dp_rank_context() as a, state.dp_rank_context() as b, state.dp_rank_context() as c:
        assert {a, b, c} == {0, 1, 2}
        assert state.dp_rank == c
    assert state.dp_counts == [0, 0, 0]


def test_models_have_routers_of_their_own_or_the_default_one(make_args):
    args = make_args(sglang_model_routers={"judge": ("::1", 4000)})
    assert get_model_url(args, "judge") == "http://[::1]:4000/generate"
    assert get_model_url(args, "actor", "/workers") == "http://router.test:3000/workers"


async def test_a_replaced_state_needs_only_three_things(engine, make_args, monkeypatch):
    """Tests of plug-ins put their own GenerateState in place, with args that lack most attributes."""
    import asyncio
    from argparse import Namespace
    from contextlib import nullcontext

    class State:
        def __init__(self, args):
            self.semaphore = asyncio.Semaphore(1)
            self.aborted = False

        def dp_rank_context(self):
            return nullcontext()

    async def mine(args, sample, sampling_params):
        sample.response, sample.reward = "mine", 1.0
        sample.status = Sample.Status.COMPLETED
        return sample

    monkeypatch.setattr(sglang_rollout, "GenerateState", State)
    monkeypatch.setattr(sglang_rollout, "load_function", lambda path: mine)
    args = Namespace(custom_generate_function_path="anything.mine", partial_rollout=False, group_rm=False)
    sample = await sglang_rollout.generate_and_rm(args, Sample(prompt="hi"), {})
    assert (sample.response, sample.reward) == ("mine", 1.0)
