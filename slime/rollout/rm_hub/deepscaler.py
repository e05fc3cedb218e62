"""`--rm-type deepscaler`: the boxed answer after the reasoning, graded as mathematics (the rule of DeepScaleR)."""

from slime.rollout.rm_hub.math_utils import extract_answer, grade_answer_mathd, grade_answer_sympy

THINK_END = "</think>"
RESPONSE_MARK = "###Response"


def get_deepscaler_rule_based_reward(response: str, label: object) -> int:
    r"""1 if the solution's last `\boxed{...}` equals the label, else 0.

    Args:
        response: its solution is what follows the last `</think>`, else the first `###Response`; without either it
            has none and earns 0.
        label: text, int or float; in a box or not; an empty one earns 0.
    """
    if THINK_END in response:
        solution = response.rpartition(THINK_END)[2]
    elif RESPONSE_MARK in response:
        solution = response.split(RESPONSE_MARK)[1]
    else:
        return 0
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        raise TypeError(
            f"The label of a deepscaler reward is a text or a number, not {type(label).__name__}: {label!r}"
        )
    given = extract_answer(solution)
    truth: str | None = str(label)
    if "\\boxed" in str(truth):
        truth = extract_answer(str(truth))
    if given is None or not truth:
        return 0
    return int(grade_answer_mathd(given, truth) or grade_answer_sympy(given, truth))
