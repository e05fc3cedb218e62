"""`--rm-type gpqa`: the letter of a multiple-choice answer, or the text of the right choice."""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

DEFAULT_LETTERS = string.ascii_uppercase[:10]


def compute_gpqa_reward(response: str, label: Any, metadata: Mapping[str, Any] | None = None) -> float:
    """1.0 if the letter chosen after the last `</think>` is the right one, else 0.0.

    Without a letter in the response, or without a known right letter, the text of the right choice must occur in it.

    Args:
        label: a letter, an index into the choices, or a choice's text.
        metadata: `choices` (list, or dict letter -> text), `valid_letters`, `correct_letter`, `correct_answer`,
            `answer_text`; all optional, `correct_letter` and `correct_answer` win over the label.
    """
    data = metadata or {}
    choices = _choices(data.get("choices"))
    letters = _valid_letters(data, choices)
    right_letter = _right_letter(label, data, choices, letters)
    text = response.rpartition("</think>")[2]
    letter = extract_letter(text, letters)
    if letter is not None and right_letter is not None:
        return float(letter == right_letter)
    right_text = _right_text(label, data, choices, right_letter, letters)
    return float(bool(right_text) and f" {right_text} " in f" {_normalize(text)} ")


def extract_letter(text: str, letters: Sequence[str]) -> str | None:
    """The letter that a text answers with: the last one it says so of, else the last capital that stands alone."""
    letter = f"([{''.join(letters)}])"
    wrapped = rf"[\s:*_$(\[{{]{{0,12}}(?:\\(?:boxed|text|mathrm|mathbf)\{{){{0,3}}[(\[]?{letter}(?![a-zA-Z'’])"
    patterns = (
        rf"(?i:answer|option|choice)(?:\s{{1,4}}(?i:is|was|would be))?\s{{0,4}}[:=]?{wrapped}",
        rf"(?<![a-zA-Z]){letter}[)\]*.]{{0,4}}\s{{1,4}}(?i:is)\s{{1,4}}(?i:the\s{{1,4}})?(?i:correct|right)\b",
        rf"\\boxed\{{\s{{0,4}}(?:\\text\{{)?\s{{0,4}}\(?{letter}\)?\s{{0,4}}\}}",
    )
    found = [(match.start(), match.group(1)) for pattern in patterns for match in re.finditer(pattern, text)]
    if found:
        return max(found)[1]
    alone = re.findall(rf"(?<![a-zA-Z'’]){letter}(?![a-zA-Z'’])(?!\s+[a-z])", text)
    return alone[-1] if alone else None


def _choices(given: Any) -> dict[str, str]:
    """Letter -> text."""
    if isinstance(given, Mapping):
        return {str(letter).strip().upper(): str(text) for letter, text in given.items()}
    if given is None or isinstance(given, str):
        return {}
    return dict(zip(string.ascii_uppercase, (str(text) for text in given), strict=False))


def _valid_letters(data: Mapping[str, Any], choices: Mapping[str, str]) -> list[str]:
    letters = data.get("valid_letters") or list(choices) or DEFAULT_LETTERS
    return [str(letter).strip().upper() for letter in letters]


def _right_letter(
    label: Any, data: Mapping[str, Any], choices: Mapping[str, str], letters: Sequence[str]
) -> str | None:
    if data.get("correct_letter"):
        return str(data["correct_letter"]).strip().upper()
    for value in (data.get("correct_answer"), label, data.get("answer_text")):
        if (letter := _as_letter(value, choices, letters)) is not None:
            return letter
    return None


def _as_letter(value: Any, choices: Mapping[str, str], letters: Sequence[str]) -> str | None:
    """The letter that a letter, an index or a choice's text stands for."""
    if isinstance(value, int) and not isinstance(value, bool):
        return letters[value] if 0 <= value < len(letters) else None
    if not isinstance(value, str):
        return None
    bare = value.strip().strip("()[].:").strip().upper()
    if bare in letters:
        return bare
    return next((letter for letter, text in choices.items() if _normalize(text) == _normalize(value) != ""), None)


def _right_text(
    label: Any, data: Mapping[str, Any], choices: Mapping[str, str], right_letter: str | None, letters: Sequence[str]
) -> str:
    """The right choice's text, normalised; empty if only a letter is known."""
    texts = (data.get("answer_text"), data.get("correct_answer"), choices.get(right_letter or ""), label)
    for text in texts:
        if isinstance(text, str) and text.strip().strip("()[].:").upper() not in letters:
            return _normalize(text)
    return ""


def _normalize(text: str) -> str:
    """Lower-case words separated by one space."""
    return " ".join(re.findall(r"\w+", text.lower()))
