"""The reward of runs under attack: computed from the response, and asked of a grading child like a real one."""

from argparse import Namespace
from typing import Any

from slime.rollout.rm_hub.grading_worker import sympy_equal
from slime.utils.types import Sample


def reward(args: Namespace, sample: Sample, **_: Any) -> float:
    """The share of letters in the response, plus one when their number is even.

    A child process decides the second part (`--custom-rm-path tests.chaos.reward.reward`); the sample's index makes
    nearly every question a new one, which no cache answers.
    """
    letters = sum(character.isalpha() for character in sample.response)
    is_even = sympy_equal(f"(-1)**({letters} + 2*{sample.index})", "1")
    if is_even is None:
        raise RuntimeError(f"the grading child gave up on a parity, of {letters} letters")
    return letters / max(1, len(sample.response)) + float(is_even)
