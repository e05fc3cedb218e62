"""Supervised fine-tuning as a rollout: conversations in, tokens and masks out."""

import json

import pytest

from slime.rollout import sft_rollout
from slime.rollout.base_types import call_rollout_fn
from slime.rollout.data_source import load_data_source
from slime.utils.types import Sample
from tests.unit.rollout.fakes import FakeTokenizer


class Tokenizer(FakeTokenizer):
    def get_added_vocab(self):
        return {}


@pytest.fixture
def make_source(make_args, tmp_path, monkeypatch):
    monkeypatch.setattr(sft_rollout, "load_tokenizer", lambda path, **kwargs: Tokenizer())

    def make(*conversations):
        file = tmp_path / "talks.jsonl"
        file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in conversations))
        args = make_args(
            prompt_data=str(file), input_key="messages", label_key=None, n_samples_per_prompt=1, loss_mask_type="qwen"
        )
        return args, load_data_source(args)

    return make


def talk(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def test_the_response_begins_with_the_first_answer(make_source):
    first = talk(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    second = talk(("user", "q"), ("assistant", "abc"))
    args, source = make_source(first, second)
    output = call_rollout_fn(sft_rollout.generate_rollout, args, 0, source, evaluation=False)
    (one,), (two,) = output.samples
    assert "".join(map(chr, one.tokens)) == "<user>q</><assistant>a</><user>r</><assistant>b</>"
    assert one.response_length == len("a</><user>r</><assistant>b</>")
    assert one.loss_mask == [1] * 4 + [0] * len("<user>r</><assistant>") + [1] * 4
    assert two.response_length == len("abc</>")
    assert (two.reward, two.status) == (0, Sample.Status.COMPLETED)


def test_conversations_that_train_nothing_are_an_error(make_source):
    args, source = make_source(talk(("user", "q")))
    with pytest.raises(ValueError, match="sample 0: it has no assistant message"):
        sft_rollout.generate_rollout(args, 0, source)


def test_text_prompts_are_an_error_that_says_what_to_change(make_source):
    args, source = make_source("just text")
    with pytest.raises(ValueError, match="--input-key"):
        sft_rollout.generate_rollout(args, 0, source)
