"""Rollout functions old and new, and the bar that shows how far they are."""

import sys

import pytest

from slime.rollout import progress
from slime.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput, call_rollout_fn, flatten_samples
from slime.utils.types import Sample


def test_plain_returns_are_put_into_the_type_that_is_meant():
    groups = [[Sample()]]
    assert call_rollout_fn(lambda args, evaluation: groups, 1, evaluation=False) == RolloutFnTrainOutput(groups)
    data = {"a": {"rewards": [1.0]}}
    assert call_rollout_fn(lambda evaluation: data, evaluation=True) == RolloutFnEvalOutput(data)
    output = RolloutFnTrainOutput(groups, {"m": 1})
    assert call_rollout_fn(lambda evaluation, extra: output, evaluation=False, extra=2) is output


@pytest.mark.parametrize(("returned", "evaluation"), [({}, False), ([], True), (None, False)])
def test_other_returns_are_an_error_that_names_the_function(returned, evaluation):
    def my_rollout(evaluation):
        return returned

    with pytest.raises(TypeError, match="my_rollout"):
        call_rollout_fn(my_rollout, evaluation=evaluation)


def test_samples_are_found_at_any_depth_and_nothing_else_is():
    a, b, c = Sample(index=0), Sample(index=1), Sample(index=2)
    assert flatten_samples([[a, [b]], (c,)]) == [a, b, c]
    with pytest.raises(TypeError, match="found dict"):
        flatten_samples([[a, {}]])


@pytest.mark.parametrize(
    ("asked", "terminal", "shown"), [(None, False, False), (None, True, True), ("1", False, True), ("0", True, False)]
)
def test_bars_are_shown_on_terminals_or_when_asked(monkeypatch, asked, terminal, shown):
    monkeypatch.delenv(progress.ENVIRONMENT_VARIABLE, raising=False)
    if asked is not None:
        monkeypatch.setenv(progress.ENVIRONMENT_VARIABLE, asked)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with progress.progress_bar(3, "rollout 0") as bar:
        assert bar.disable is not shown


def test_another_bar_can_take_its_place():
    seen = []
    progress.set_bar_factory(lambda *what: seen.append(what))
    try:
        progress.progress_bar(3, "rollout 0")
    finally:
        progress.set_bar_factory(None)
    assert seen == [(3, "rollout 0", "group")]
