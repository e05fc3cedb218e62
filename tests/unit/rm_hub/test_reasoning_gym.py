"""reasoning-gym's tasks are graded by their own verifiers, which never run what the model wrote."""

import json
from pathlib import Path
from typing import Any

import pytest

from slime.rollout.rm_hub import grading_worker
from slime.rollout.rm_hub.reasoning_gym_tasks import compute_reasoning_gym_reward

reasoning_gym = pytest.importorskip("reasoning_gym")


def entry(task: str, **config: Any) -> dict[str, Any]:
    item = reasoning_gym.create_dataset(task, size=1, seed=1, **config)[0]
    return json.loads(json.dumps(item))  # type: ignore[no-any-return]


@pytest.mark.parametrize("task", ["basic_arithmetic", "chain_sum", "countdown", "arc_agi", "simple_integration"])
def test_the_reference_answer_earns_one_and_a_wrong_one_zero(task: str) -> None:
    item = entry(task)
    metadata = {"source_dataset": task, "entry": item}
    assert compute_reasoning_gym_reward(f"so <answer>{item['answer']}</answer>", None, metadata) == 1.0
    assert compute_reasoning_gym_reward("so <answer>definitely not</answer>", None, metadata) == 0.0
    assert compute_reasoning_gym_reward("", None, metadata) == 0.0


def test_the_task_may_be_named_three_ways() -> None:
    item = entry("chain_sum")
    assert compute_reasoning_gym_reward(item["answer"], None, {"entry": item}) == 1.0
    assert compute_reasoning_gym_reward(item["answer"], None, {"entry": json.dumps(item)}) == 1.0
    assert compute_reasoning_gym_reward(item["answer"], item["answer"], {}, task="chain_sum") == 1.0
    assert compute_reasoning_gym_reward(item["answer"], item["answer"], {"source_dataset": "chain_sum"}) == 1.0
    with pytest.raises(ValueError, match="reasoning_gym:<task>"):
        compute_reasoning_gym_reward("1", "1", {})


def test_partial_credit_is_nothing_unless_the_metadata_says_otherwise() -> None:
    """Countdown gives 0.05 for a well-formed expression with the wrong value."""
    item = entry("countdown")
    metadata = {"entry": item}
    wrong = "+".join(str(number) for number in item["metadata"]["numbers"])
    score = grading_worker.reasoning_gym_score("countdown", wrong, item)
    assert 0 < score < 1
    assert compute_reasoning_gym_reward(wrong, None, metadata) == 0.0
    assert compute_reasoning_gym_reward(wrong, None, metadata | {"partial_credit": True}) == score
    assert compute_reasoning_gym_reward(wrong, None, metadata | {"score_threshold": score}) == 1.0


@pytest.mark.parametrize("task", ["n_queens", "string_insertion", "spiral_matrix", "binary_matrix", "countdown"])
def test_a_verifier_that_evaluates_answers_runs_no_code(task: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    item = entry(task)
    for attack in (f"open('{marker}', 'w')", f"__import__('pathlib').Path('{marker}').touch()", "[1, 2"):
        assert compute_reasoning_gym_reward(f"<answer>{attack}</answer>", None, {"entry": item}) == 0.0
    assert not marker.exists()


def test_arithmetic_that_a_verifier_evaluates_still_works() -> None:
    item = entry("bitwise_arithmetic")
    assert compute_reasoning_gym_reward(item["answer"], None, {"entry": item}) == 1.0
    assert grading_worker.reasoning_gym_score("string_insertion", str(list("AB")), {"answer": "AB"}) == 0.1


def test_an_answer_that_never_ends_is_wrong() -> None:
    item = entry("countdown")
    assert grading_worker.reasoning_gym_score("countdown", "factorial(factorial(factorial(9)))", item) < 0.1
    assert compute_reasoning_gym_reward(item["answer"], None, {"entry": item}) == 1.0


def test_an_unknown_task_lists_the_known() -> None:
    with pytest.raises(grading_worker.GradingError, match=r"no task 'chain_some'.*chain_sum"):
        grading_worker.reasoning_gym_score("chain_some", "1", {})
