"""A run on one machine cannot be reached from another: every socket of every process is on loopback."""

import time
from collections.abc import Callable

import pytest

from tests.run_processes import OpenSocket, open_sockets

from .conftest import LiveRun

SMALL = ["--rollout-batch-size", "4", "--n-samples-per-prompt", "4", "--skip-eval-before-train"]
LOOK_EVERY_S = 0.5


@pytest.mark.timeout(600)
def test_the_quick_start_listens_on_loopback_alone(
    begin: Callable[[list[str]], LiveRun], quickstart_flags: list[str]
) -> None:
    """Looked at all the time, from start-up through two steps of generation, training and sync."""
    run = begin([*quickstart_flags, *SMALL, "--num-rollout", "2"])
    seen: set[OpenSocket] = set()
    phases = set()
    token = run.token
    while run.process.poll() is None:
        phases.add(run.status().get("phase"))
        seen |= set(open_sockets(run.pids()))
        time.sleep(LOOK_EVERY_S)
    assert run.process.returncode == 0, run.output[-6000:]
    assert token
    assert {"start", "generate", "train", "sync"} <= phases
    listeners = " ".join(socket.command for socket in seen)
    for name in ("train.py", "gcs_server", "raylet", "router", "embedded.server", "ray::TrainRayActor"):
        assert name in listeners, f"{name} was not among the listeners that were found"
    elsewhere = [socket for socket in seen if not socket.is_on_loopback]
    assert not elsewhere
