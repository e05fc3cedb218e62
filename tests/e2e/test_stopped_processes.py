"""Processes that are stopped break no connection and answer nothing: a run ends by name, or goes on without them."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.chaos.attacks import STOPPED, STOPPED_PHASES, draw_stops
from tests.chaos.comparison import attack_and_compare, say_with_time
from tests.chaos.processes import Driver, is_alive, log_of_worker, send, ticks, words_of
from tests.chaos.tiny_run import TinyRun, save_model_and_prompts

LIVENESS_TIMEOUT_S = 10.0
NUM_STOPS = 10


@pytest.fixture
def seed() -> int:
    """Another one each time, unless SLIME_CHAOS_SEED says which."""
    seed = int(os.environ.get("SLIME_CHAOS_SEED") or time.time())
    say_with_time(f"SLIME_CHAOS_SEED={seed}")
    return seed


@pytest.mark.timeout(2400)
def test_a_stopped_process_is_replaced_or_ends_the_run_by_name(tmp_path: Path, seed: int) -> None:
    """Each process at least once and in each phase one of them; `benchmarks/chaos.py --signal STOP` does all pairs."""
    attacks = draw_stops(STOPPED, STOPPED_PHASES, seed, NUM_STOPS)
    comparison = attack_and_compare(tmp_path, attacks, liveness_timeout_s=LIVENESS_TIMEOUT_S, say=say_with_time)
    assert comparison.is_right, f"SLIME_CHAOS_SEED={seed}\n{comparison}"
    assert len(comparison.outcomes) == NUM_STOPS


@pytest.mark.timeout(1200)
def test_without_fault_tolerance_a_stopped_server_ends_the_run_by_name(tmp_path: Path, seed: int) -> None:
    attacks = draw_stops(["engine 0", "router"], ["generate", "sync"], seed, 2)
    comparison = attack_and_compare(
        tmp_path, attacks, is_fault_tolerant=False, liveness_timeout_s=LIVENESS_TIMEOUT_S, say=say_with_time
    )
    assert comparison.is_right, f"SLIME_CHAOS_SEED={seed}\n{comparison}"
    assert [outcome.kind for outcome in comparison.outcomes] == ["ended", "ended"]


@pytest.mark.timeout(600)
def test_whoever_still_loads_ends_without_a_stopped_driver_too(tmp_path: Path) -> None:
    model = save_model_and_prompts(tmp_path / "model")
    run = TinyRun(tmp_path / "run", model, num_rollout=2, liveness_timeout_s=LIVENESS_TIMEOUT_S)
    with Driver(run.command(), run.folder, tmp_path / "output.txt") as driver:
        assert next((True for _ in ticks(0.05, 120.0) if len(loading_ranks(driver)) == 2), False), driver.text()
        time.sleep(0.5)  # until the driver has heard that they are there
        ranks = loading_ranks(driver)
        assert driver.status() is None or not driver.status().pids, "they have loaded already"
        send(driver.pid, signal.SIGSTOP)
        assert next((True for _ in ticks(0.2, LIVENESS_TIMEOUT_S + 60.0) if not any(map(is_alive, ranks))), False)
        assert all("the driver has given no sign of life" in log_of_worker(rank.pid) for rank in ranks)
        send(driver.pid, signal.SIGCONT)
        assert driver.process.wait(60.0) not in (0, -signal.SIGKILL), driver.text()
        assert not driver.family.wait_for_end(10.0)


def loading_ranks(driver: Driver) -> list[psutil.Process]:
    driver.family.look()
    return [process for process in driver.family.alive() if words_of(process).startswith("ray::TrainRayActor")]
