r"""`--rm-type dapo`: the text after the last `Answer:`, normalised as Minerva does (arXiv:2206.14858, appendix D.1).

Right is +1, wrong is -1, as in DAPO (arXiv:2503.14476). The reward is a dict, so training needs `--reward-key score`.
"""

import re

TAIL_CHARS = 300
STRICT_TAIL_CHARS = 100
ANSWER_PATTERN = r"(?i)Answer\s*:\s*([^\n]+)"
INVALID = "[INVALID]"

_REPLACED = (
    ("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"),
    (",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}"),
)  # fmt: skip
_REMOVED = (
    "square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "\\ldots", "sue", "points",
    "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students",
    "childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3",
    "\\text{\n}", "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots",
    "<|im_end|>", "<|endoftext|>",
)  # fmt: skip
_UNWRAPPED = (
    (re.compile(r"\\text(bf)?\{(.*?)\}"), r"\2"),
    (re.compile(r"\\overline\{(.*?)\}"), r"\1"),
    (re.compile(r"\\boxed\{(.*)\}"), r"\1"),
)


def compute_score(
    solution_str: str,
    ground_truth: object,
    strict_box_verify: bool = False,
    pause_tokens_index: list[int] | None = None,
) -> dict[str, float | bool | str | None]:
    """The reward of a response.

    Args:
        solution_str: only its last 300 characters count.
        ground_truth: the label.
        strict_box_verify: compare the last box with the label exactly instead of the text after `Answer:`.
        pause_tokens_index: for the strict form, four positions of pause tokens; the text from 100 characters before
            the last of them counts.

    Returns:
        {"score": 1.0 or -1.0, "acc": whether it is right, "pred": the answer found}.
    """
    is_right, pred = verify(solution_str[-TAIL_CHARS:], ground_truth, strict_box_verify, pause_tokens_index)
    return {"score": 1.0 if is_right else -1.0, "acc": is_right, "pred": pred}


def verify(
    solution_str: str,
    answer: object,
    strict_box_verify: bool = False,
    pause_tokens_index: list[int] | None = None,
) -> tuple[bool, str | None]:
    """Whether a response is right, and the answer found in it."""
    if strict_box_verify:
        score, boxed = is_correct_strict_box(solution_str, str(answer), pause_tokens_index)
        return score == 1, boxed
    return is_correct_minerva(solution_str, str(answer))


def is_correct_minerva(
    solution_str: str, gt: str, gt_need_extract: bool = False, answer_pattern: str = ANSWER_PATTERN
) -> tuple[bool, str]:
    """Compares the normalised text after the last `Answer:` with the label.

    Args:
        gt: the label; an integer, which may be written as a decimal.
        gt_need_extract: the label is a solution whose box holds the answer; it may then be any text.

    Returns:
        whether they are equal, and the normalised answer (`[INVALID]` if there is none).

    Raises:
        ValueError: the label is no number.
    """
    matches = re.findall(answer_pattern, solution_str)
    pred = normalize_final_answer(matches[-1] if matches else INVALID)
    if gt_need_extract:
        truth = normalize_final_answer(remove_boxed(last_boxed_only_string(gt) or ""))
    else:
        normalized = normalize_final_answer(gt)
        try:
            truth = str(int(float(normalized)))
        except (ValueError, OverflowError) as error:
            raise ValueError(
                f"A dapo label must be an integer, got {gt!r}. For other answers use --rm-type math."
            ) from error
    return pred == truth, pred


def is_correct_strict_box(pred: str, gt: str, pause_tokens_index: list[int] | None = None) -> tuple[int, str | None]:
    """1 if the last box in the last 100 characters holds exactly the label, else -1; and what the box holds."""
    if pause_tokens_index is not None:
        if len(pause_tokens_index) != 4:
            raise ValueError(f"pause_tokens_index needs four positions, got {pause_tokens_index}")
        pred = pred[max(0, pause_tokens_index[-1] - STRICT_TAIL_CHARS) :]
    else:
        pred = pred[-STRICT_TAIL_CHARS:]
    boxed = last_boxed_only_string(pred)
    content = remove_boxed(boxed) if boxed is not None else None
    return (1 if content == gt else -1), content


def normalize_final_answer(final_answer: str) -> str:
    """An answer in Minerva's normal form: what follows the last `=`, without units, spaces and LaTeX wrappers."""
    text = final_answer.split("=")[-1]
    for before, after in _REPLACED:
        text = text.replace(before, after)
    for word in _REMOVED:
        text = text.replace(word, "")
    if (dollars := text.split("$", 2)) and len(dollars) == 3:  # what is between the first two dollar signs
        text = dollars[1]
    for pattern, content in _UNWRAPPED:
        text = pattern.sub(content, text)
    text = re.sub(r"frac([^{])(.)", r"frac{\1}{\2}", text)
    text = re.sub(r"sqrt([^{])", r"sqrt{\1}", text)
    text = text.replace("$", "")
    return text.replace(",", "") if text.replace(",", "").isdigit() else text.strip()


def last_boxed_only_string(string: str) -> str | None:
    r"""The last `\boxed{...}` of a text, braces matched, or None."""
    start = string.rfind("\\boxed{")
    depth = 0
    for index in range(start, len(string)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(string[index], 0)
        if string[index] == "}" and depth == 0:
            return string[start : index + 1]
    return None


def remove_boxed(s: str) -> str:
    r"""What is inside `\boxed{...}`.

    Raises:
        AssertionError: the text is not exactly one box.
    """
    assert s.startswith("\\boxed{") and s.endswith("}"), f"box error: {s}"
    return s[len("\\boxed{") : -1]
