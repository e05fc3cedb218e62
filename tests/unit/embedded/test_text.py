"""Decoding token by token, stop strings, and what is held back."""

import itertools
from pathlib import Path

import pytest

from slime.backends.embedded.text import (
    Codec,
    StopFinder,
    TextStream,
    load_codec,
    trimmed,
    without_beginning_stop,
)


@pytest.fixture(scope="module")
def codec(tiny_llama: Path) -> Codec:
    loaded = load_codec(str(tiny_llama))
    assert loaded is not None
    return loaded


TEXTS = ["The sum is <answer>8</answer>.", "a é€ b €€ c", "  two  spaces\n\nlines "]


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_of_a_stream_are_the_whole_text(codec: Codec, text: str):
    ids = codec.encode(text)
    stream = TextStream(codec, skip_special=True)
    shown = []
    for count in range(1, len(ids) + 1):
        stream.read(ids, count)
        shown.append(stream.printable)
    assert shown[-1] == text
    assert all(text.startswith(part) and "\ufffd" not in part for part in shown)
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(shown))


def test_several_tokens_may_come_at_once(codec: Codec):
    ids = codec.encode(TEXTS[0])
    stream = TextStream(codec, skip_special=True)
    stream.read(ids, 4)
    stream.read(ids, len(ids))
    assert stream.printable == TEXTS[0]


def test_a_stop_string_is_found_with_its_last_token(codec: Codec):
    ids = codec.encode(TEXTS[0])
    finder = StopFinder(codec, ("nothing", "</answer>"))
    found = [finder(ids[:count]) for count in range(1, len(ids) + 1)]
    first = next(
        count for count in range(1, len(ids) + 1) if "</answer>" in codec.decode(ids[:count], skip_special=False)
    )
    assert found[: first - 1] == [None] * (first - 1) and found[first - 1] == "</answer>"


def test_a_special_token_can_be_a_stop_string(codec: Codec):
    ids = [*codec.encode("The sum"), 1, *codec.encode("is")]
    finder = StopFinder(codec, ("<|im_start|>",))
    assert next(count for count in range(1, len(ids) + 1) if finder(ids[:count])) == len(codec.encode("The sum")) + 1


def test_the_end_of_a_finished_text_is_trimmed():
    assert trimmed("3+5=8;rest", ";", keeps_stop=False) == "3+5=8"
    assert trimmed("3+5=8;rest", ";", keeps_stop=True) == "3+5=8;"
    assert trimmed("3+5=8", 7, keeps_stop=False) == "3+5=8"
    assert trimmed("hidden", "<|im_end|>", keeps_stop=False) == "hidden"


def test_what_may_become_a_stop_string_is_held_back():
    assert without_beginning_stop("result </ans", ("</answer>",)) == "result "
    assert without_beginning_stop("result <", ("</answer>", "x")) == "result "
    assert without_beginning_stop("result", ("</answer>",)) == "result"
    assert without_beginning_stop("result", ()) == "result"


def test_a_folder_without_a_tokenizer_has_no_codec(tmp_path: Path):
    assert load_codec(str(tmp_path)) is None
