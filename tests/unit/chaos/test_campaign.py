"""The chaos harness against a run of small processes: it hits what it aims at, and sees what is wrong."""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chaos.attacks import Attack
from tests.chaos.campaign import Campaign, Limits, names, usual_times
from tests.chaos.judge import missing_steps, of_metrics
from tests.chaos.report import report
from tests.chaos.tiny_run import TinyRun

LIMITS = Limits(start=10, phase=10, recover=5, end=3, leave=0.5)
NUM_ROLLOUT = 6


@dataclass(frozen=True)
class FakeRun(TinyRun):
    """`fake_train.py` with the quirks in `extra`."""

    def command(self) -> list[str]:
        script = Path(__file__).with_name("fake_train.py")
        return [sys.executable, "-S", str(script), str(self.folder), str(self.num_rollout), *self.extra]


def kill(number: int, target: str, phase: str, rollout: int) -> Attack:
    return Attack(number, target, phase, rollout, 0.3, signal.SIGKILL)


def campaign(folder: Path, attacks: list[Attack], *quirks: str) -> Campaign:
    run = FakeRun(folder / "run", folder, NUM_ROLLOUT, extra=quirks)
    done = Campaign(run, attacks, {"generate": 0.12, "train": 0.12, "save": 0.12, "sync": 0.12}, LIMITS, say=print)
    done.carry_out()
    return done


def test_a_run_survives_its_engine_and_goes_on_after_its_driver_and_trainer(tmp_path: Path) -> None:
    targets = [("engine 0", "train"), ("driver", "generate"), ("actor rank 0", "sync")]
    attacks = [kill(i, target, phase, i + 1) for i, (target, phase) in enumerate(targets)]
    done = campaign(tmp_path, attacks)
    assert [outcome.kind for outcome in done.outcomes] == ["recovered", "ended", "ended"]
    assert [outcome.phase for outcome in done.outcomes] == ["train", "generate", "sync"]
    assert [problem for outcome in done.outcomes for problem in outcome.problems] == []
    assert done.problems == []
    assert "3 attacks, no problem" in report(done.outcomes, done.problems)
    peaceful = campaign(tmp_path / "peaceful", [])
    assert missing_steps(done.run.folder, NUM_ROLLOUT) == []
    assert of_metrics(peaceful.run.folder, done.run.folder) == []


@pytest.mark.parametrize(
    ("quirk", "problem"),
    [
        ("blames-the-router", "does not blame actor rank 0"),
        ("leaves-a-child", "still there"),
        ("hangs", "neither ended nor went on"),
    ],
)
def test_an_attack_that_goes_wrong_is_a_problem(tmp_path: Path, quirk: str, problem: str) -> None:
    done = campaign(tmp_path, [kill(0, "actor rank 0", "train", 1)], quirk)
    problems = " ".join(done.outcomes[0].problems)
    assert problem in problems
    assert problem in report(done.outcomes, done.problems)


def test_a_step_that_is_lost_by_resuming_is_found(tmp_path: Path) -> None:
    done = campaign(tmp_path, [kill(0, "driver", "train", 2)], "forgets")
    (difference,) = missing_steps(done.run.folder, NUM_ROLLOUT)
    assert "steps [0, 1, 3, 4, 5]" in difference


def test_a_run_that_is_over_before_its_attacks_is_extended(tmp_path: Path) -> None:
    done = campaign(tmp_path, [kill(0, "engine 0", "train", NUM_ROLLOUT + 1)])
    assert [outcome.kind for outcome in done.outcomes] == ["recovered"]
    assert done.run.num_rollout > NUM_ROLLOUT
    assert done.problems == []
    assert missing_steps(done.run.folder, done.run.num_rollout) == []


def test_the_process_that_an_error_blames_is_the_one_that_counts() -> None:
    attack = kill(0, "actor rank 1", "train", 0)
    assert names("actor rank 1 died; actor rank 0 waited for it", attack)
    assert names("actor rank 0 had to train on rollout 3, but actor rank 1 (pid 7) died at 10:11:12", attack)
    assert not names("actor rank 0 failed to train: connection closed by actor rank 1", attack)
    assert not names("owner of engine 1 died", kill(0, "engine 1", "train", 0))
    assert not names("something went wrong", attack)
    router = kill(0, "router", "start", 0)
    assert names("the rollout manager failed to start engines: router ended before it answered: killed", router)
    owner = kill(0, "owner of engine 0", "train", 0)
    assert names("engine 0 ended with its owner: owner of engine 0 (pid 9) has given no sign of life", owner)
    assert names("actor rank 0 died", kill(0, "actor rank 1", "start", 0)), "a starting run's ranks look alike"


def test_usual_times_are_medians_without_the_start(tmp_path: Path) -> None:
    times = [9.0, 1.0, 2.0, 3.0]
    rows = [f'{{"step": {i - 1}, "perf/train_time": {t}, "perf/step_time": 20.5}}\n' for i, t in enumerate(times)]
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    assert usual_times(tmp_path) == {"train": 2.0, "start": 20.5}
