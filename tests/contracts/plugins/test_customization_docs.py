"""The examples of docs/customization.md run as they are printed."""

import re
from pathlib import Path

import pytest

from slime.rollout.data_source import load_data_source
from slime.rollout.sampling import rollout_sampling_params
from slime.rollout.sglang_rollout import generate_and_rm
from slime.utils.types import Sample
from tests.unit.rollout import plugins
from tests.unit.rollout.conftest import clean_slate, engine, make_args, prompts

__all__ = ["clean_slate", "engine", "make_args", "prompts"]  # fixtures

DOCS = Path(__file__).parents[3] / "docs" / "customization.md"


def example(containing, name, folder, more=""):
    """Writes the one Python example that contains a text into a file, and returns its path."""
    blocks = [block for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL) if containing in block]
    assert len(blocks) == 1, f"{len(blocks)} examples contain {containing!r}"
    file = folder / name
    file.write_text(blocks[0] + more)
    return str(file)


async def test_the_multi_turn_example_keeps_the_engines_tokens_and_masks_the_tools(engine, make_args, tmp_path):
    tools = """
def find_tool_call(text):
    return text if text == "call" else None

def run_tool(call):
    return " say:done "
"""
    file = example("# multi_turn.py", "multi_turn.py", tmp_path, tools)
    args = make_args(custom_generate_function_path=file, max_turns=5, custom_rm_path=f"{plugins.__name__}.exact")

    def call_first(reply):
        return engine.reply(0, "call" if len(engine.requests) == 1 else "done", {"type": "stop"}, 1)

    engine.change_reply = call_first
    sample = await generate_and_rm(args, Sample(prompt="hi", label="call say:done done"), rollout_sampling_params(args))
    assert sample.response == "call say:done done"
    assert sample.loss_mask == [1] * 4 + [0] * 10 + [1] * 4
    assert sample.rollout_log_probs == [-0.5] * 4 + [0.0] * 10 + [-0.5] * 4
    assert (sample.reward, len(engine.requests)) == (1.0, 2)


async def test_the_list_form_example_gets_tokens(engine, make_args, tmp_path):
    more = "\nasync def answer(prompt):\n    return 'ok'\n"
    file = example("sample.response = await answer", "my_answers.py", tmp_path, more)
    args = make_args(custom_generate_function_path=file)
    sample = await generate_and_rm(args, Sample(prompt="hi", label="ok"), rollout_sampling_params(args))
    assert (sample.tokens, sample.reward) == ([ord(c) for c in "hiok"], 1.0)


@pytest.mark.parametrize("spelling", ["{file}:BestFirst", "{file}"])
def test_the_buffer_example_gives_the_best_groups_first(make_args, prompts, tmp_path, spelling):
    file = example("# my_buffer.py", "my_buffer.py", tmp_path)
    args = make_args(prompt_data=prompts("a", "b", "c"), data_source_path=spelling.format(file=file))
    source = load_data_source(args)
    assert type(source).__name__ == "BestFirst"
    groups = source.get_samples(3)
    for group, reward in zip(groups, (0.0, 1.0, 0.5), strict=True):
        group[0].reward = reward
    source.add_samples(groups)
    assert [group[0].prompt for group in source.get_samples(2)] == ["b", "c"]
