"""Loss masks of conversations under templates of each kind, with a tokenizer of one token a byte."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from slime.utils.mask_utils import MultiTurnLossMaskGenerator, get_response_lengths

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}" + PLAIN
TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | length }} tools<|im_end|>\n{% endif %}" + PLAIN
THINKING = (
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "<r>{{ m.content }}</r>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPANS = PLAIN.replace("{{ m.content }}", "{% if m.role == 'assistant' %}<think>\n{% endif %}{{ m.content }}")
DISTILLED = "{{ messages[0].content }}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"


def tokenizer(template, *more_specials):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=bytes_only)
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *more_specials]})
    fast.chat_template = template
    return fast


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


TALK = [user("q1"), assistant("a1"), user("q2"), assistant("a2")]


def masked(template, kind, messages, tools=None, specials=()):
    """(whole text, trained texts)"""
    made = MultiTurnLossMaskGenerator(tokenizer(template, *specials), kind)
    ids, mask = made.get_loss_mask(messages, tools=tools)
    assert len(ids) == len(mask)
    return made.tokenizer.decode(ids), made.get_text_from_loss_mask(ids, mask)


@pytest.mark.parametrize("kind", ["qwen", "qwen3", "qwen3_5"])
def test_what_assistants_say_is_trained_and_the_text_is_the_templates(kind):
    text, trained = masked(PLAIN, kind, TALK)
    assert text == tokenizer(PLAIN).apply_chat_template(TALK, tokenize=False)
    assert trained == ["a1<|im_end|>\n", "a2<|im_end|>\n"]


@pytest.mark.parametrize("kind", ["qwen", "qwen3"])
def test_a_systems_default_is_said_once(kind):
    text, trained = masked(DEFAULT_SYSTEM, kind, TALK)
    assert text == tokenizer(DEFAULT_SYSTEM).apply_chat_template(TALK, tokenize=False)
    assert text.count("Be good.") == 1
    assert trained == ["a1<|im_end|>\n", "a2<|im_end|>\n"]
    text, _ = masked(DEFAULT_SYSTEM, kind, [{"role": "system", "content": "Mine."}, *TALK])
    assert "Be good." not in text
    assert text.startswith("<|im_start|>system\nMine.")


@pytest.mark.parametrize("kind", ["qwen", "qwen3", "qwen3_5"])
def test_a_step_can_be_left_out(kind):
    talk = [user("q1"), assistant("a1", step_loss_mask=0), user("q2"), assistant("a2", step_loss_mask=1)]
    assert masked(PLAIN, kind, talk)[1] == ["a2<|im_end|>\n"]


@pytest.mark.parametrize("kind", ["qwen", "qwen3", "qwen3_5"])
def test_tools_are_told_once(kind):
    text, _ = masked(TOOLS, kind, TALK, tools=[{"name": "a"}, {"name": "b"}])
    assert text.count("2 tools") == 1


def test_consecutive_tool_results_are_rendered_together():
    tool = {"role": "tool", "content": "r"}
    text, trained = masked(THINKING, "qwen3", [user("q"), assistant("call"), tool, tool, assistant("a")])
    assert text.count("<|im_start|>user<r>r</r><r>r</r><|im_end|>") == 1
    # behind a user message each answer is the last one, so the template lets it think
    assert trained == ["<think>\n\n</think>\n\ncall<|im_end|>\n", "<think>\n\n</think>\n\na<|im_end|>\n"]


def test_an_opened_thought_belongs_to_the_prompt():
    text, trained = masked(SPANS, "qwen3_5", TALK)
    assert text.count("<think>\n") == 2
    assert trained == ["a1<|im_end|>\n", "a2<|im_end|>\n"]


def test_spans_need_every_answer_in_the_text():
    with pytest.raises(ValueError, match="renders 0 assistant turns of 2"):
        masked(PLAIN.replace("im_start", "im_begin"), "qwen3_5", TALK)


def test_a_distilled_tokenizer_takes_the_first_message_as_prompt_and_the_last_as_response():
    for kind in ("qwen", "distill_qwen"):
        text, trained = masked(DISTILLED, kind, [user("q"), assistant("a")], specials=["<｜Assistant｜>"])
        assert text == "q<｜Assistant｜>a"
        assert trained == ["a"]
    _, trained = masked(DISTILLED, "qwen", [user("q"), assistant("a", step_loss_mask=0)], specials=["<｜Assistant｜>"])
    assert trained == []


def test_images_push_the_mask_to_the_right():
    made = MultiTurnLossMaskGenerator(tokenizer(PLAIN), "qwen")
    talk = [user([{"type": "text", "text": "q"}, {"type": "image", "image": "x"}]), assistant("a")]
    ids, mask = made.get_loss_mask([user("q"), assistant("a")])
    longer = [0, 0, 0, *ids]
    assert made.get_loss_mask_with_multimodal_alignment(talk, longer) == (longer, [0, 0, 0, *mask])
    with pytest.raises(ValueError, match="output 2"):
        made.get_loss_mask_with_multimodal_alignment(talk, [1, 2])


def test_a_response_begins_with_the_first_trained_token():
    assert get_response_lengths([[0, 0, 1, 0, 1], [1], [0, 0], []]) == [3, 1, 0, 0]


def test_an_unknown_kind_lists_the_known_ones():
    with pytest.raises(ValueError, match="qwen, qwen3, qwen3_5, distill_qwen"):
        MultiTurnLossMaskGenerator(tokenizer(PLAIN), "gpt")
