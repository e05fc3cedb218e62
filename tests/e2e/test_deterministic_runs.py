"""--deterministic-mode: two runs are bit-identical, and so is one that was killed and started again."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slime.observability.diff import compare_runs, format_comparison
from slime.observability.ledger import check_ledger

from .conftest import LiveRun

pytestmark = pytest.mark.timeout(1200)

RUN_TIMEOUT_S = 600
FILTER = "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"


@pytest.fixture
def deterministic_flags(tiny_flags: list[str]) -> list[str]:
    """Two engines, over-sampling, a filter, shuffled epochs, a checkpoint at every second step."""
    return [
        *(*tiny_flags, "--deterministic-mode", "--rollout-num-gpus", "2", "--num-rollout", "6", "--save-interval", "2"),
        *("--over-sampling-batch-size", "6", "--dynamic-sampling-filter-path", FILTER, "--rollout-shuffle"),
    ]


@pytest.fixture
def start(repository: Path, tmp_path: Path, deterministic_flags: list[str]) -> Iterator[Callable[[str], LiveRun]]:
    """`start(name)`: the same command line in the folder of that name; going on there if it was there before."""
    runs = []

    def begin(name: str) -> LiveRun:
        (tmp_path / name).mkdir(exist_ok=True)
        runs.append(LiveRun(repository, tmp_path / name, deterministic_flags))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


def finished(run: LiveRun) -> Path:
    """The folder of a run that has come to its end."""
    assert run.process.wait(RUN_TIMEOUT_S) == 0, run.output[-6000:]
    return run.folder


def assert_identical(a: Path, b: Path) -> None:
    comparison = compare_runs(a, b)
    assert comparison.is_identical, format_comparison(comparison, (a.parent.name, b.parent.name))
    assert (comparison.through, comparison.last_steps) == (5, (5, 5))
    assert not comparison.not_compared, "prompts, samples, metrics and weights were all there"


def test_two_runs_are_bit_identical_and_so_is_one_that_was_killed(start: Callable[[str], LiveRun]) -> None:
    first, second = finished(start("first")), finished(start("second"))
    assert_identical(first, second)
    summary = check_ledger(first)
    assert summary.trained == 24 and summary.unknown == 0
    assert summary.discarded + summary.dropped > 0, "else the order of acceptance was not put to the test"

    killed = start("killed")
    killed.wait_for_phase("train", rollout_id=3)
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.process.wait(60)
    again = start("killed")
    resumed = finished(again)
    assert "goes on at step 2" in again.output, "the checkpoint of the second step was there"
    assert_identical(first, resumed)
    assert check_ledger(resumed) == summary
