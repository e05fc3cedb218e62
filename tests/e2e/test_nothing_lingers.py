"""However a run ends, ten seconds later nothing of it is left on the machine."""

import os
import signal
import time
from collections.abc import Callable

import pytest

from slime.utils.reaper import shared_memory_folders
from tests.run_processes import wait_until

from .conftest import LiveRun

pytestmark = pytest.mark.timeout(300)
Begin = Callable[[list[str]], LiveRun]
BOUND_S = 10.0
ENDLESS = ["--num-rollout", "10000", "--rollout-max-response-len", "64", "--skip-eval-before-train"]


def assert_nothing_is_left(run: LiveRun, since_s: float) -> None:
    """No process (so no socket) with the run's marker, nor its reaper, nor a folder in memory."""
    token = run.token
    wait_until(lambda: not run.pids() and not shared_memory_folders(token), since_s + BOUND_S - time.monotonic())


def wait_for(run: LiveRun, phase: str) -> None:
    if phase == "start":
        wait_until(lambda: len(run.pids()) >= 5, timeout_s=60)
    else:
        run.wait_for_phase(phase, rollout_id=0)
    assert run.token


@pytest.mark.parametrize("phase", ["start", "generate", "train", "sync"])
def test_after_sigkill_of_the_driver(begin: Begin, tiny_flags: list[str], phase: str) -> None:
    run = begin([*tiny_flags, *ENDLESS])
    wait_for(run, phase)
    run.process.kill()
    assert_nothing_is_left(run, time.monotonic())


def test_after_sigkill_of_the_driver_of_processes_that_are_stopped(begin: Begin, tiny_flags: list[str]) -> None:
    """A stopped process notices neither a closed pipe nor SIGTERM."""
    run = begin([*tiny_flags, *ENDLESS])
    wait_for(run, "generate")
    stopped = {process["role"]: process["pid"] for process in run.status()["processes"] if process["role"] != "driver"}
    assert {"engine", "trainer", "manager", "router"} <= set(stopped)
    for pid in stopped.values():
        os.kill(pid, signal.SIGSTOP)
    run.process.kill()
    assert_nothing_is_left(run, time.monotonic())


@pytest.mark.parametrize("phase", ["start", "generate", "sync"])
def test_after_ctrl_c(begin: Begin, tiny_flags: list[str], phase: str) -> None:
    """Pressed twice, as people do; a terminal sends it to every process of the group."""
    run = begin([*tiny_flags, *ENDLESS])
    wait_for(run, phase)
    pressed_s = time.monotonic()
    os.killpg(run.process.pid, signal.SIGINT)
    time.sleep(0.3)
    if run.process.poll() is None:
        os.killpg(run.process.pid, signal.SIGINT)
    # While Ray starts, the driver may sit in a call that no signal interrupts: then the reaper ends it.
    expected = {128 + signal.SIGINT, -signal.SIGKILL} if phase == "start" else {128 + signal.SIGINT}
    assert run.process.wait(BOUND_S) in expected, run.output[-3000:]
    assert_nothing_is_left(run, pressed_s)
    if phase != "start":
        assert run.output.rstrip().endswith("train.py: interrupted")
