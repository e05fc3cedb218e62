r"""Grades mathematical answers: string rules first, symbolic equality next, Math-Verify for what is then undecided.

`grade_answer_verl` is `--rm-type math`. In this order, and the first that decides wins:

1. The response's last `\boxed{...}` is the answer; without one it is wrong. A label in a box is taken out of it.
2. Both sides normalised in the way of the MATH benchmark (arXiv:2103.03874) are the same string: right.
3. Both sides normalised further (units, percent, "million", LaTeX to plain text, mixed numbers) are the same: right.
   Both are numbers or fractions of integers: right only if they are equal and written in lowest terms alike.
   Exactly one side is an integer and neither is a set, list or relation: wrong (an answer must be worked out).
   Either side has words (three letters or more in a row that name nothing mathematical): wrong.
   Tuples and intervals: brackets and number of elements must agree, then each element is graded by these rules.
4. SymPy simplifies the difference of both sides to zero: right; to something else: wrong. Only expressions of
   harmless characters with at most two unknown letters and small exponents are given to it.
5. What remains (sets, equations, matrices, roots of higher order, exponents in braces, ...) Math-Verify decides.

Steps 4 and 5 run in another process under a deadline (grading_worker); what exceeds it is wrong.
"""

import re

from slime.rollout.rm_hub import grading_worker
from slime.rollout.rm_hub.latex_text import (
    FUNCTIONS,
    is_words,
    latex_to_text,
    matching_brace,
    normalize_expression,
)

MAX_UNKNOWN_LETTERS = 2
MAX_EXPRESSION_CHARS = 300
MAX_ANSWER_CHARS = 2000
"""An answer that is longer is right only if it is the label, character by character."""

_INTEGER = re.compile(r"[+-]?\d+(\.0+)?")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")
_FRACTION = re.compile(r"[+-]?\d+/0*[1-9]\d*")
_TOWER = re.compile(r"\^[\s{(]*\d+\s*\^|\^[\s{(]*\d{4,}")
_BIG_EXPONENT = re.compile(r"\^[{(]|\^\d+\^|\^\d\d+")
_FUNCTION_NAMES = re.compile("|".join(sorted(FUNCTIONS, key=len, reverse=True)))


def grade_answer_verl(solution_str: str, ground_truth: object) -> bool:
    """Whether the last boxed answer of a response equals the label, by the rules of this module.

    Args:
        solution_str: the response.
        ground_truth: the label, with or without a box; an empty one grades nothing right.
    """
    if ground_truth is None or ground_truth == "":
        return False
    truth: str | None = str(ground_truth)
    if "\\boxed" in str(truth):
        truth = extract_answer(str(truth))
    given = extract_answer(solution_str)
    if not given or not truth:
        return False
    if grade_answer_mathd(given, truth):
        return True
    verdict = _symbolic_verdict(given, truth)
    return _math_verify(given, truth) if verdict is None else verdict


def grade_answer_mathd(given_answer: str, ground_truth: str) -> bool:
    """Whether both are the same string after the normalisation of the MATH benchmark."""
    if _is_overlong(given_answer, ground_truth):
        return given_answer.strip() == ground_truth.strip()
    return mathd_normalize_answer(given_answer) == mathd_normalize_answer(ground_truth)


def grade_answer_sympy(given_answer: str, ground_truth: str) -> bool:
    """Whether both are equal by steps 3 and 4 of this module; what they leave undecided is False."""
    return _symbolic_verdict(given_answer, ground_truth) is True


def extract_answer(passage: str) -> str | None:
    """The content of the last box of a text, or None."""
    return extract_boxed_answer(passage) if "\\boxed" in passage else None


def extract_boxed_answer(solution: str) -> str | None:
    r"""The content of the last `\boxed{...}` (or `\fbox{...}`), or None."""
    return remove_boxed(last_boxed_only_string(solution))


def last_boxed_only_string(string: str) -> str | None:
    r"""The last `\boxed{...}` of a text, braces matched, or None if there is none or it is not closed."""
    start = string.rfind("\\boxed")
    if start < 0:
        start = string.rfind("\\fbox")
    opening = string.find("{", start) if start >= 0 else -1
    if opening < 0:
        return None
    closing = matching_brace(string, opening)
    return None if closing is None else string[start : closing + 1]


def remove_boxed(s: str | None) -> str | None:
    r"""What is inside `\boxed{...}`; None if the text is not exactly one."""
    if s is None:
        return None
    for prefix in ("\\boxed{", "\\fbox{"):
        if s.startswith(prefix) and s.endswith("}"):
            return s[len(prefix) : -1]
    return None


def mathd_normalize_answer(answer: str | None) -> str | None:
    r"""An answer in the MATH benchmark's normal form, e.g. ` 3/4 ` and `\dfrac34` both as `\frac{3}{4}`."""
    if answer is None:
        return None
    stripped = answer.strip()
    if whole_text := re.fullmatch(r"\\text\{(?P<text>.+?)\}", stripped):
        stripped = whole_text.group("text").strip()
    return _strip_string(stripped)


def _strip_string(string: str) -> str:
    """The string normalisation of the MATH benchmark (arXiv:2103.03874, its public grading code), rule by rule."""
    text = string.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = re.sub(r"\\[td]frac", r"\\frac", text)
    text = re.sub(r"\\(left|right)(?![a-zA-Z])", "", text)
    text = re.sub(r"\^(\{\\circ\}|\\circ)", "", text)
    text = text.replace("\\$", "")
    if text.count("\\text{ ") == 1:  # a unit on the right
        text = text.split("\\text{ ")[0]
    text = text.replace("\\%", "").replace("%", "")
    text = re.sub(r"(^|[ {])\.", r"\g<1>0.", text)
    if text.count("=") == 1 and len(text.split("=")[0]) <= 2:  # a short name: "x = 5"
        text = text.split("=")[1]
    text = re.sub(r"\\sqrt([^{\[\\])", r"\\sqrt{\1}", text.replace("\\sqrt ", "\\sqrt"))
    text = text.replace(" ", "")
    text = re.sub(r"\\frac([^{}\\])\{", r"\\frac{\1}{", text)
    text = re.sub(r"\\frac([^{}\\])([^{}\\])", r"\\frac{\1}{\2}", text)
    if text == "0.5":
        return "\\frac{1}{2}"
    if re.fullmatch(r"-?\d+/-?\d+", text):
        numerator, denominator = text.split("/")
        return f"\\frac{{{int(numerator)}}}{{{int(denominator)}}}"
    return text


def _symbolic_verdict(given: str, truth: str) -> bool | None:
    """Steps 3 and 4: right, wrong, or None for undecided."""
    if _is_overlong(given, truth):
        return given.strip() == truth.strip()
    given_text, truth_text = normalize_expression(given), normalize_expression(truth)
    if given_text == truth_text:
        return bool(given_text)
    if not given_text or not truth_text:
        return False
    given_parts, truth_parts = _split_tuple(given_text), _split_tuple(truth_text)
    if len(given_parts) == len(truth_parts) == 1:
        return _element_verdict(given_text, truth_text)
    if min(len(given_parts), len(truth_parts)) == 1:  # a tuple against something else
        return None if _is_collection(given_text) and _is_collection(truth_text) else False
    if given_text[0] + given_text[-1] != truth_text[0] + truth_text[-1] or len(given_parts) != len(truth_parts):
        return False
    verdicts = [_element_verdict(g, t) for g, t in zip(given_parts, truth_parts, strict=True)]
    if False in verdicts:
        return False
    return True if all(verdicts) else None


def _element_verdict(given: str, truth: str) -> bool | None:
    """The verdict on one element, both sides normalised."""
    if given == truth:
        return True
    if _is_plain(given) and _is_plain(truth):
        return _numbers_equal(given, truth)
    if bool(_INTEGER.fullmatch(given)) != bool(_INTEGER.fullmatch(truth)):
        return None if _is_collection(given) or _is_collection(truth) else False
    if is_words(given) or is_words(truth):
        return False
    if not (_may_evaluate(given) and _may_evaluate(truth)):
        return None
    return grading_worker.sympy_equal(given, truth)


def _is_overlong(given: str, truth: str) -> bool:
    return max(len(given), len(truth)) > MAX_ANSWER_CHARS


def _is_plain(text: str) -> bool:
    return bool(_NUMBER.fullmatch(text) or _FRACTION.fullmatch(text))


def _numbers_equal(given: str, truth: str) -> bool:
    """Numbers are compared as numbers; a fraction must be written as the label writes it, or be a decimal's equal."""
    if _FRACTION.fullmatch(given) and _FRACTION.fullmatch(truth):
        return False  # the texts differ: not in lowest terms
    is_integer = [bool(_INTEGER.fullmatch(text)) for text in (given, truth)]
    if is_integer[0] != is_integer[1]:
        return False
    a, b = _to_float(given), _to_float(truth)
    return abs(a - b) <= 1e-9 * max(1.0, abs(a), abs(b)) if not all(is_integer) else _to_int(given) == _to_int(truth)


def _to_int(text: str) -> int:
    return int(text.split(".")[0])


def _to_float(text: str) -> float:
    numerator, _, denominator = text.partition("/")
    return float(numerator) / float(denominator or 1)


def _split_tuple(text: str) -> list[str]:
    """The elements of `(a, b)` or `[a, b)`; anything else is one element."""
    inner = text[1:-1]
    if len(text) > 2 and text[0] in "([" and text[-1] in ")]" and not any(c in inner for c in "()[]"):
        return [element.strip() for element in inner.split(",")]
    return [text]


def _is_collection(text: str) -> bool:
    """Whether the order or the writing of elements is not settled by string rules: sets, unions, lists, relations."""
    text = re.sub(r"\^\{[^{}]*\}", "", text)
    return any(mark in text for mark in ("{", ",", "∪", "=", "<", ">", "\\"))


def _may_evaluate(text: str) -> bool:
    """Whether SymPy may see it: short, few unknown letters, small exponents."""
    letters = {c for c in _FUNCTION_NAMES.sub("", text) if c.isalpha()}
    return len(text) <= MAX_EXPRESSION_CHARS and len(letters) <= MAX_UNKNOWN_LETTERS and not _BIG_EXPONENT.search(text)


def _math_verify(given: str, truth: str) -> bool:
    """Step 5; words (whose letters it would multiply), towers of powers and long texts are kept from Math-Verify."""
    for text in (given, truth):
        if len(text) > MAX_EXPRESSION_CHARS or _TOWER.search(text) or is_words(latex_to_text(text)):
            return False
    return grading_worker.math_verify_equal(given, truth) is True
