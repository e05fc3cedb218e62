"""Two simple rewards: `answer_tag`, what the last `<answer>` holds, and `last_number`, a response's last number."""

import re
from decimal import Decimal, InvalidOperation

_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<![\w.])[-+]?\.\d+")
_MAX_NUMBER_CHARS = 100


def extract_answer_tag(response: str) -> str | None:
    """The content of the last closed `<answer>...</answer>`, stripped; None without one."""
    found = _TAG.findall(response)
    return found[-1].strip() if found else None


def answer_tag_reward(response: str, label: object) -> float:
    """1.0 if the last `<answer>` equals the label: as numbers if both are, else as text up to case and outer space."""
    answer = extract_answer_tag(response)
    return 0.0 if answer is None else float(same_answer(answer, str(label)))


def last_number_reward(response: str, label: object) -> float:
    """1.0 if the last number in the response equals the label.

    Raises:
        ValueError: the label is no number, so nothing could ever be right.
    """
    truth = as_number(str(label))
    if truth is None:
        raise ValueError(f"--rm-type last_number needs a number as label, got {label!r}")
    found = _NUMBER.findall(response)
    return float(bool(found) and as_number(found[-1]) == truth)


def same_answer(answer: str, label: str) -> bool:
    """Whether two short answers are the same number, or the same text up to case and outer space."""
    numbers = as_number(answer), as_number(label)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return answer.strip().casefold() == label.strip().casefold() != ""


def as_number(text: str) -> Decimal | None:
    """A number such as `-1,234.50` or `$5`, exactly; None if the text is more than that."""
    bare = text.strip().removeprefix("$").strip()
    if len(bare) > _MAX_NUMBER_CHARS or not _NUMBER.fullmatch(bare):
        return None
    try:
        return Decimal(bare.replace(",", ""))
    except InvalidOperation:
        return None
