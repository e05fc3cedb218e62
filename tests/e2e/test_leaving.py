"""SIGTERM, as a scheduler sends it: the run saves what it has, leaves, and goes on from there when started again."""

import signal
import time
from pathlib import Path

import pytest

from slime.observability.ledger import check_ledger
from slime.observability.run_log import read_metrics
from tests.chaos.processes import Driver
from tests.chaos.tiny_run import TinyRun, save_model_and_prompts

NUM_ROLLOUT = 7
LEAVES_IN = ("generate", 3)  # rollout 2 is trained and, by the interval of 2, not saved
END_WITHIN_S = 120
UNHURRIED = ("--custom-generate-function-path", "tests.chaos.unhurried.generate")
"""So that the signal comes while replies are made."""


def wait_for_moment(driver: Driver, phase: str, rollout_id: int) -> None:
    deadline = time.monotonic() + 600
    while (status := driver.status()) is None or (status.phase, status.rollout_id) != (phase, rollout_id):
        assert driver.process.poll() is None, driver.text()[-4000:]
        assert time.monotonic() < deadline, driver.text()[-4000:]
        time.sleep(0.005)


@pytest.mark.timeout(1200)
def test_a_run_that_is_told_to_leave_saves_and_loses_no_step(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run", save_model_and_prompts(tmp_path / "model"), NUM_ROLLOUT, extra=UNHURRIED)
    with Driver(run.command(), run.folder, tmp_path / "first.log") as driver:
        wait_for_moment(driver, *LEAVES_IN)
        driver.process.send_signal(signal.SIGTERM)
        assert driver.process.wait(END_WITHIN_S) == 128 + signal.SIGTERM, driver.text()[-4000:]
        assert "left after SIGTERM; saved rollout 2" in driver.text()
        assert not driver.family.wait_for_end(10)
    tracker = run.folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text().strip() == "2"

    with Driver(run.command(), run.folder, tmp_path / "second.log") as driver:
        assert driver.process.wait(600) == 0, driver.text()[-4000:]
    assert [line["step"] for line in read_metrics(run.folder) if line["step"] >= 0] == list(range(NUM_ROLLOUT))
    assert check_ledger(run.folder).num_rollouts == NUM_ROLLOUT
