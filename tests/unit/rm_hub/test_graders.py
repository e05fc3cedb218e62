"""The graders that are not mathematics, each as a table of cases."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from slime.rollout.rm_hub import ifbench
from slime.rollout.rm_hub.f1 import f1_score, normalize_answer
from slime.rollout.rm_hub.gpqa import compute_gpqa_reward
from slime.rollout.rm_hub.math_dapo_utils import (
    compute_score,
    is_correct_minerva,
    is_correct_strict_box,
    last_boxed_only_string,
    normalize_final_answer,
    remove_boxed,
    verify,
)
from slime.rollout.rm_hub.plain_answers import (
    answer_tag_reward,
    as_number,
    extract_answer_tag,
    last_number_reward,
)


@pytest.mark.parametrize(
    ("response", "label", "is_right", "pred"),
    [
        ("Answer: 42", "42", True, "42"),
        ("answer : 7\nAnswer: 42", "42", True, "42"),
        ("Answer: $42$", "42", True, "42"),
        ("Answer: x = 42", "42", True, "42"),
        ("Answer: 1,234", "1234", True, "1234"),
        ("Answer: 42 dollars<|im_end|>", "42.0", True, "42"),
        (r"Answer: \boxed{42}", "42", True, "42"),
        (r"Answer: 42^\circ", "42", True, "42"),
        ("Answer: 43", "42", False, "43"),
        ("42", "42", False, "[INVALID]"),
        ("Answer: 42" + "x" * 300, "42", False, "[INVALID]"),
    ],
)
def test_dapo_reads_the_text_after_the_last_answer(response: str, label: str, is_right: bool, pred: str) -> None:
    assert compute_score(response, label) == {"score": 1.0 if is_right else -1.0, "acc": is_right, "pred": pred}


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        (r"\frac12", r"\frac{1}{2}"),
        (r"\sqrt2", r"\sqrt{2}"),
        (r"\text{blue}", "blue"),
        (r"\textbf{5}", "5"),
        (r"\overline{AB}", "AB"),
        ("a = b = 3", "3"),
        ("the $x$ is", "x"),
        ("12 square units", "12"),
        ("1,000,000", "1000000"),
        ("1,2", "12"),
    ],
)
def test_minervas_normal_form(raw: str, normal: str) -> None:
    assert normalize_final_answer(raw) == normal


def test_a_dapo_label_must_be_an_integer() -> None:
    with pytest.raises(ValueError, match=r"must be an integer, got 'x\+1'"):
        compute_score("Answer: 1", "x+1")
    assert is_correct_minerva(r"Answer: x+1", r"so \boxed{x+1}", gt_need_extract=True) == (True, "x+1")


def test_the_strict_form_compares_the_last_box_exactly() -> None:
    assert compute_score(r"\boxed{42}", "42", strict_box_verify=True) == {"score": 1.0, "acc": True, "pred": "42"}
    assert compute_score(r"\boxed{42.0}", "42", strict_box_verify=True)["score"] == -1.0
    assert verify(r"\boxed{42}" + " " * 101, "42", strict_box_verify=True) == (False, None)
    assert is_correct_strict_box("x" * 50 + r"\boxed{1}", "1", [0, 0, 0, 60]) == (1, "1")
    with pytest.raises(ValueError, match="four positions"):
        is_correct_strict_box("", "1", [1])


def test_a_malformed_box_is_an_assertion() -> None:
    assert last_boxed_only_string(r"\boxed{1} \boxed{{2}}") == r"\boxed{{2}}"
    assert last_boxed_only_string(r"\boxed{1") is None and last_boxed_only_string("1") is None
    with pytest.raises(AssertionError, match="box error: 1"):
        remove_boxed("1")


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        ("The cat sat", "a cat sat!", (1.0, 1.0, 1.0)),
        ("cat", "cat dog", (2 / 3, 1.0, 0.5)),
        ("cat cat", "cat", (2 / 3, 0.5, 1.0)),
        ("bird", "cat", (0.0, 0.0, 0.0)),
        ("yes it is", "yes", (0.0, 0.0, 0.0)),
        ("Yes.", "yes", (1.0, 1.0, 1.0)),
        ("noanswer", "cat", (0.0, 0.0, 0.0)),
        ("", "cat", (0.0, 0.0, 0.0)),
        (None, "cat", (0.0, 0.0, 0.0)),
    ],
)
def test_f1_counts_shared_words(prediction: str | None, truth: str, expected: tuple[float, float, float]) -> None:
    assert f1_score(prediction, truth) == pytest.approx(expected)


def test_f1_ignores_case_punctuation_and_articles() -> None:
    assert normalize_answer(" The  U.S.,  an  Apple ") == "us apple"


CHOICES = ["Paris", "London", "Rome", "New York"]


@pytest.mark.parametrize(
    ("response", "label", "metadata", "reward"),
    [
        ("The answer is B", "B", {}, 1.0),
        ("The answer is (B).", "B", {}, 1.0),
        ("**Answer:** **B**", "B", {}, 1.0),
        (r"The final answer is $\boxed{\text{B}}$", "B", {}, 1.0),
        (r"\boxed{B}", "B", {}, 1.0),
        ("Option C is tempting, but B is the correct one", "B", {}, 1.0),
        ("I choose option B", "B", {}, 1.0),
        ("answer: A. No wait, the answer is B", "B", {}, 1.0),
        ("answer is B<think>answer is A</think>The answer is B", "B", {}, 1.0),
        ("<think>The answer is B</think>The answer is A", "B", {}, 0.0),
        ("Between A and B, B", "B", {}, 1.0),
        ("I think it is B", "B", {}, 1.0),
        ("A good question. B", "A", {}, 0.0),
        ("no letter here", "B", {}, 0.0),
        ("The answer is Beta", "B", {}, 0.0),
        ("The answer is B", 1, {"choices": CHOICES}, 1.0),
        ("The answer is B", "London", {"choices": CHOICES}, 1.0),
        ("It must be london, surely", "London", {"choices": CHOICES}, 1.0),
        ("It must be New  York!", "D", {"choices": CHOICES}, 1.0),
        ("It must be Londonderry", "London", {"choices": CHOICES}, 0.0),
        ("The answer is E", "B", {"choices": CHOICES}, 0.0),
        ("The answer is Z", "Z", {"valid_letters": ["Y", "Z"]}, 1.0),
        ("The answer is C", "B", {"correct_letter": "c"}, 1.0),
        ("The answer is C", "B", {"choices": CHOICES, "correct_answer": "Rome"}, 1.0),
        ("The answer is x", None, {"answer_text": "forty two"}, 0.0),
        ("It is forty-two", None, {"answer_text": "Forty two"}, 1.0),
        ("(B)", "(B)", {"choices": {"a": "x", "b": "y"}}, 1.0),
        ("", "B", {}, 0.0),
    ],
)
def test_gpqa_reads_a_letter_or_the_text_of_the_choice(
    response: str, label: Any, metadata: dict[str, Any], reward: float
) -> None:
    assert compute_gpqa_reward(response, label, metadata) == reward


def test_a_response_made_to_be_slow_is_read_in_no_time() -> None:
    """Each of these would take hours with a pattern that tries every split of a run of blanks."""
    started = time.monotonic()
    for text in ("answer" + " " * 200_000, "answer is " * 20_000, "B" + " " * 200_000, "answer" + "*(" * 100_000):
        compute_gpqa_reward(text, "B")
        answer_tag_reward(text, "B")
        last_number_reward(text + "1,111" * 20_000, "5")
        f1_score(text, "B")
        compute_score(text, "5")
    assert time.monotonic() - started < 20


def test_gpqa_needs_no_metadata() -> None:
    assert compute_gpqa_reward("The answer is B", "B") == 1.0


@pytest.mark.parametrize(
    ("response", "label", "reward"),
    [
        ("<answer>8</answer>", "8", 1.0),
        ("<answer>8.0</answer>", "8", 1.0),
        ("<answer> 1,024 </answer>", 1024, 1.0),
        ("<ANSWER>Paris</ANSWER>", "paris", 1.0),
        ("<answer>7</answer> wait <answer>8</answer>", "8", 1.0),
        ("<answer>8</answer> wait <answer>7</answer>", "8", 0.0),
        ("<answer>7 <answer>8</answer>", "8", 1.0),
        ("<answer>8", "8", 0.0),
        ("8", "8", 0.0),
        ("<answer></answer>", "", 0.0),
        ("<answer>8 or 9</answer>", "8", 0.0),
        ("<answer>0.1</answer>", "0.10000000000000000001", 0.0),
        ("<answer>inf</answer>", "1e999", 0.0),
        ("<answer>" * 20_000, "8", 0.0),
    ],
)
def test_answer_tag_compares_numbers_as_numbers_and_text_as_text(response: str, label: Any, reward: float) -> None:
    assert answer_tag_reward(response, label) == reward


def test_the_tag_spans_lines() -> None:
    assert extract_answer_tag("<answer>\n a\nb </answer>") == "a\nb" and extract_answer_tag("none") is None


@pytest.mark.parametrize(
    ("response", "label", "reward"),
    [
        ("2 + 6 = 8", "8", 1.0),
        (" 8.", "8", 1.0),
        ("8, not 9", "8", 0.0),
        ("it is -3", "-3", 1.0),
        ("5-3", "3", 1.0),
        ("$1,234.50", "1234.5", 1.0),
        ("7/8", "8", 1.0),
        ("x8", "8", 0.0),
        ("no number", "8", 0.0),
        ("8" * 5000, "8", 0.0),
        (".5", "0.5", 1.0),
    ],
)
def test_last_number(response: str, label: Any, reward: float) -> None:
    assert last_number_reward(response, label) == reward


def test_a_label_that_is_no_number_can_never_be_met_and_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs a number as label, got 'eight'"):
        last_number_reward("8", "eight")
    assert as_number("8 apples") is None and as_number("") is None


EVALUATION_LIB = """
from dataclasses import dataclass

@dataclass
class InputExample:
    key: int
    instruction_id_list: list
    prompt: str
    kwargs: list

@dataclass
class Output:
    follow_all_instructions: bool

def test_instruction_following_strict(inp, prompt_to_response):
    response = prompt_to_response[inp.prompt]
    assert inp.instruction_id_list == ["length:words", "case:lower"] and inp.key == 7
    assert inp.kwargs == [{"num_words": 2}, {}]
    return Output(len(response.split()) == inp.kwargs[0]["num_words"] and response.islower())
"""


def test_ifbench_asks_its_own_verifiers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evaluation_lib.py").write_text(EVALUATION_LIB)
    monkeypatch.syspath_prepend(str(tmp_path))
    ifbench._evaluation_lib.cache_clear()
    metadata = {
        "instruction_id_list": ["length:words", "case:lower"],
        "kwargs": [{"num_words": 2, "unused": None}, None],
        "prompt_text": "Say two words.",
        "record_id": 7,
    }
    assert ifbench.compute_ifbench_reward("two words", None, metadata) == 1.0
    assert ifbench.compute_ifbench_reward("Two words", None, metadata) == 0.0
    with pytest.raises(ValueError, match="2 instructions have 1 kwargs"):
        ifbench.compute_ifbench_reward("x", None, metadata | {"kwargs": [{}]})
    with pytest.raises(ValueError, match="instruction_id_list"):
        ifbench.compute_ifbench_reward("x", None, None)
    ifbench._evaluation_lib.cache_clear()


def test_a_missing_ifbench_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ifbench._evaluation_lib.cache_clear()
    monkeypatch.setattr(ifbench, "LIBRARY", "a_library_that_is_not_here")
    with pytest.raises(ImportError, match=r"git clone https://github\.com/allenai/IFBench"):
        ifbench.compute_ifbench_reward("x", None, {"instruction_id_list": ["a"]})


def test_metadata_of_a_prompt_file_is_enough(tmp_path: Path) -> None:
    row = json.loads('{"choices": ["x", "y"], "correct_letter": "B"}')
    assert compute_gpqa_reward("answer: B", None, row) == 1.0
