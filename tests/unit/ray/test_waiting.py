"""What the end of a run says about an error of another process: enough to find the line."""

import traceback
from pathlib import Path

import pytest

from slime.ray.waiting import error_in_words
from slime.utils.misc import load_function


def words_of(error: BaseException) -> str:
    return error_in_words(error, "".join(traceback.format_exception(error)))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("samples[0].no_such", "IndexError: list index out of range"),
        ("{}['score']", "KeyError: 'score'"),
        ("raise ValueError('no such label')", "no such label"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_an_error_of_a_plug_in_names_its_line(tmp_path: Path, body: str, said: str) -> None:
    file = tmp_path / "my_filter.py"
    file.write_text(f"def keep(args, samples):\n    {body}\n")
    with pytest.raises(Exception) as caught:
        load_function(f"{file}:keep")(None, [])
    assert words_of(caught.value) == f"{said} ({file}, line 2, in keep)"


def test_slimes_own_sentences_stay_as_they_are() -> None:
    with pytest.raises(ValueError, match="names no function") as caught:
        load_function("nothing")
    assert words_of(caught.value) == str(caught.value)


def test_what_was_noted_on_the_way_is_said(tmp_path: Path) -> None:
    error = ValueError("no such label")
    error.add_note("while making sample 3 of prompt 1")
    assert words_of(error) == "no such label; while making sample 3 of prompt 1"
