"""Users' generate functions in every form, and what becomes of samples that are only text."""

import logging

import pytest

from slime.rollout import custom_generate
from slime.rollout.base_types import flatten_samples, validate_rollout_id_annotated
from slime.rollout.data_source import load_data_source
from slime.rollout.sampling import rollout_sampling_params
from slime.rollout.sglang_rollout import generate_and_rm, generate_rollout
from slime.utils.types import Sample
from tests.unit.rollout import plugins

PLUGINS = plugins.__name__


def text(ids):
    return "".join(map(chr, ids))


async def one(args, sample, **kwargs):
    return await generate_and_rm(args, sample, rollout_sampling_params(args), **kwargs)


@pytest.mark.parametrize("evaluation", [False, True])
async def test_the_list_form_gets_one_sample_at_a_time_and_its_text_gets_tokens(engine, make_args, evaluation):
    args = make_args(custom_generate_function_path=f"{PLUGINS}.custom_generate")
    sample = await one(args, Sample(prompt="hi", label="ok", index=0), evaluation=evaluation)
    assert plugins.calls == [("list form", 1, evaluation), ("exact", 0)]
    assert text(sample.tokens) == "hiok"
    assert (sample.response_length, sample.loss_mask, sample.rollout_log_probs) == (2, [1, 1], None)
    assert sample.status is Sample.Status.COMPLETED
    assert sample.reward == 1.0
    assert sample.metadata["retokenized"] is True


async def test_the_list_form_may_change_its_samples_in_place(engine, make_args):
    args = make_args(custom_generate_function_path=f"{PLUGINS}.list_form_in_place")
    sample = await one(args, Sample(prompt="hi", label="ok"))
    assert text(sample.tokens) == "hiok"


@pytest.mark.parametrize("spelling", ["{file}", "{file}:custom_generate", PLUGINS + ".custom_generate"])
async def test_files_and_dotted_paths_name_the_same_function(engine, make_args, tmp_path, monkeypatch, spelling):
    file = tmp_path / "mine.py"
    file.write_text(
        "import asyncio\n\ndef helper(): pass\n\n"
        "async def custom_generate(args, samples):\n    samples[0].response = 'ok'\n    return samples\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    args = make_args(custom_generate_function_path=spelling.format(file=file))
    assert (await one(args, Sample(prompt="hi", label="ok"))).response == "ok"


async def test_messages_that_the_function_appended_are_masked_unless_an_assistant_said_them(engine, make_args):
    args = make_args(custom_generate_function_path=f"{PLUGINS}.conversation")
    messages = [{"role": "user", "content": "q"}]
    sample = await one(args, Sample(prompt=messages, label="ok"))
    trained = "".join(
        chr(token)
        for token, kept in zip(sample.tokens[-sample.response_length :], sample.loss_mask, strict=True)
        if kept
    )
    assert text(sample.tokens) == "<user>q</><assistant>call</><tool>result</><assistant>ok</>"
    assert trained == "call</>ok</>"
    assert sample.prompt == [{"role": "user", "content": "q"}]
    assert len(sample.loss_mask) == sample.response_length


async def test_a_template_that_rewrites_the_past_leaves_the_last_answer(engine, make_args, monkeypatch):
    from tests.unit.rollout.fakes import FakeTokenizer

    def forgetful(self, messages, tools=None, tokenize=True, add_generation_prompt=False):
        return f"<{len(messages)}>" + messages[-1]["content"] + ("<assistant>" if add_generation_prompt else "")

    monkeypatch.setattr(FakeTokenizer, "apply_chat_template", forgetful)
    args = make_args(custom_generate_function_path=f"{PLUGINS}.conversation")
    sample = await one(args, Sample(prompt=[{"role": "user", "content": "q"}], label="ok"))
    assert text(sample.tokens) == "<1>q<assistant>ok"
    assert sample.loss_mask == [1, 1]


async def test_the_per_sample_form_keeps_the_engines_tokens(engine, make_args):
    args = make_args(custom_generate_function_path=f"{PLUGINS}.per_sample")
    params = rollout_sampling_params(args)
    sample = await generate_and_rm(args, Sample(prompt="hi", label="ok"), params, evaluation=True)
    assert plugins.calls[0] == ("per sample", True)
    assert sample.rollout_log_probs == [-0.5, -0.5]
    assert "retokenized" not in sample.metadata
    assert engine.requests[0]["sampling_params"]["temperature"] == 0.25


async def test_a_samples_own_function_wins(engine, make_args):
    args = make_args(custom_generate_function_path=f"{PLUGINS}.returns_nothing")
    sample = await one(args, Sample(prompt="hi", label="ok", generate_function_path=f"{PLUGINS}.per_sample"))
    assert sample.response == "ok"


async def test_a_reward_that_the_function_sets_is_kept(engine, make_args):
    args = make_args(custom_generate_function_path=f"{PLUGINS}.own_reward")
    assert (await one(args, Sample(prompt="hi", label="ok"))).reward == 5.0
    assert plugins.calls == []


async def test_something_else_than_samples_is_an_error_that_names_the_function(engine, make_args):
    args = make_args(custom_generate_function_path=f"{PLUGINS}.returns_nothing")
    with pytest.raises(TypeError, match="returns_nothing returned None"):
        await one(args, Sample(prompt="hi"))


def test_fan_out_lists_are_rewarded_as_lists_and_stay_together(engine, make_args, prompts):
    args = make_args(
        prompt_data=prompts("a", "b"),
        custom_generate_function_path=f"{PLUGINS}.fan_out",
        custom_rm_path=f"{PLUGINS}.exact_of_all",
        dynamic_sampling_filter_path="slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std",
    )
    output = generate_rollout(args, 0, load_data_source(args))
    assert [[len(member) for member in group] for group in output.samples] == [[2, 2], [2, 2]]
    assert [sample.reward for sample in flatten_samples(output.samples)] == [1.0, 0.0] * 4
    validate_rollout_id_annotated(output.samples)
    output.samples[1][0][1].rollout_id = None
    with pytest.raises(AssertionError, match="rollout_id"):
        validate_rollout_id_annotated(output.samples)


def test_retokenized_samples_are_counted_and_warned_of_once(engine, make_args, prompts, caplog, monkeypatch):
    monkeypatch.setattr(custom_generate, "_has_warned", False)
    args = make_args(prompt_data=prompts("a", "b"), custom_generate_function_path=f"{PLUGINS}.custom_generate")
    with caplog.at_level(logging.WARNING, logger="slime"):
        output = generate_rollout(args, 0, load_data_source(args))
    assert output.metrics == {"rollout/retokenized": 4}
    assert len([record for record in caplog.records if "tokenised again" in record.message]) == 1
