"""Processes that are stopped break no connection and answer nothing: a run ends by name, or goes on without them."""

import os
import time
from pathlib import Path

import pytest

from tests.chaos.attacks import STOPPED, STOPPED_PHASES, draw_stops
from tests.chaos.comparison import attack_and_compare, say_with_time

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
