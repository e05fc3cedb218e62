"""Whole-stack runs of `train_async.py`: whole rollouts made ahead, and the pool that is never drained."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slime.config.config import FULLY_ASYNC_ROLLOUT
from slime.observability.ledger import check_ledger
from slime.observability.run_log import read_metrics

from .conftest import FinishedRun, LiveRun, Train

pytestmark = pytest.mark.timeout(900)

PROGRAM = "train_async.py"
AHEAD = ["--async-buffer-size", "2", "--update-weights-interval", "2"]
POOL = ["--rollout-function-path", FULLY_ASYNC_ROLLOUT]
LONG = ["--rollout-max-response-len", "200"]
EXACT = ["--rollout-max-response-len", "800", "--custom-generate-function-path", "benchmarks/exact_length.py:generate"]
"""Every reply takes longer than a training step, so that updates meet requests in flight."""
MODES = {"ahead": (AHEAD, 4), "pool": (POOL, 2)}
"""Flags, and the staleness that they allow."""

Begin = Callable[..., LiveRun]


@pytest.fixture
def async_flags(tiny_flags: list[str]) -> list[str]:
    prompts = tiny_flags[tiny_flags.index("--prompt-data") + 1]
    evaluation = ["--eval-interval", "2", "--eval-prompt-data", "held", f"{prompts}@[0:4]", "--eval-temperature", "0"]
    return [*tiny_flags, *LONG, *evaluation]


def assert_in_order(folder: Path, num_rollout: int, limit: int) -> None:
    """Every step is there once, every prompt is accounted for once, and no sample was too old."""
    steps = [line for line in read_metrics(folder) if line["step"] >= 0]
    assert [step["step"] for step in steps] == list(range(num_rollout))
    summary = check_ledger(folder)
    assert (summary.num_rollouts, summary.trained, summary.unknown) == (num_rollout, 4 * num_rollout, 0)
    assert all(0 <= step["rollout/staleness/max"] <= limit for step in steps)
    for step in steps:
        phases = ("wait_for_rollout", "train", "sync", "eval", "save", "other")
        assert sum(step.get(f"perf/{phase}_time", 0.0) for phase in phases) == pytest.approx(step["perf/step_time"])


def rows(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "samples").glob("rollout_*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_weights_change_under_requests_in_flight(train: Train, async_flags: list[str], mode: str) -> None:
    run: FinishedRun = train(
        [*async_flags, *POOL, *EXACT, "--num-rollout", "6", "--pause-generation-mode", mode, "--use-tis"],
        program=PROGRAM,
    )
    assert_in_order(run.folder, 6, limit=2)
    assert any(len(set(row["weight_versions"])) > 1 for row in rows(run.folder)), "no sample met an update"
    assert len(run.column("eval/held")) == 3
    assert max(run.column("train/train_rollout_logprob_abs_diff")[:1]) < 1e-4, "the first rollout is on policy"


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_is_told_to_leave_and_then_killed_loses_and_doubles_nothing(
    begin: Begin, async_flags: list[str], mode: str
) -> None:
    flags, limit = MODES[mode]
    words = [*async_flags, *flags, "--num-rollout", "24", "--save-interval", "2", "--eval-interval", "8"]
    first = begin(words, PROGRAM)
    first.wait_for_phase("train", 3)
    first.process.send_signal(signal.SIGTERM)
    assert first.process.wait(120) == 128 + signal.SIGTERM, first.output[-4000:]
    assert "left after SIGTERM" in first.output
    left_after = max(line["step"] for line in read_metrics(first.folder))
    assert left_after < 20, "it goes on for a long time after SIGTERM, or steps here are too short for this test"

    second = begin(words, PROGRAM)
    second.wait_for_phase("train", left_after + 2)
    os.kill(second.process.pid, signal.SIGKILL)
    second.close()

    third = begin(words, PROGRAM)
    assert third.process.wait(300) == 0, third.output[-4000:]
    assert_in_order(third.folder, 24, limit)


def test_an_engine_that_dies_is_started_again_while_training_goes_on(begin: Begin, async_flags: list[str]) -> None:
    words = [*async_flags, *POOL, "--num-rollout", "6", "--use-fault-tolerance", "--rollout-health-check-interval", "1"]
    run = begin(words, PROGRAM)
    run.wait_for_phase("train", 1)
    (engine,) = [process for process in run.status()["processes"] if process["role"] == "engine"]
    os.kill(engine["pid"], signal.SIGKILL)
    assert run.process.wait(300) == 0, run.output[-4000:]
    assert "It is started again" in run.output
    assert_in_order(run.folder, 6, limit=2)
