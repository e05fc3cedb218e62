"""A run on one machine cannot be reached from another: every socket of every process is on loopback."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import httpx
import pytest

from tests.run_processes import OpenSocket, marked_pids, open_sockets

from .conftest import LiveRun

SMALL = ["--rollout-batch-size", "4", "--n-samples-per-prompt", "4", "--skip-eval-before-train"]
LOOK_EVERY_S = 0.5
KEY = "a-key-that-nobody-should-see"
NUM_ENGINES = 2
SERVERS = {"embedded.server": "/server_info", "router": "/workers"}
"""Part of the command -> a path that asks for the key."""


@pytest.mark.timeout(600)
def test_the_quick_start_listens_on_loopback_alone(
    begin: Callable[[list[str]], LiveRun], quickstart_flags: list[str]
) -> None:
    """Looked at all the time, from start-up through two steps of generation, training and sync.

    With a key, which changes no address, but must be on no server's command line and asked for by each of them.
    """
    run = begin([*quickstart_flags, *SMALL, "--num-rollout", "2", "--sglang-api-key", KEY])
    seen: set[OpenSocket] = set()
    phases = set()
    asked: dict[str, list[int]] = {}
    token = run.token
    while run.process.poll() is None:
        phases.add(run.status().get("phase"))
        seen |= set(open_sockets(run.pids()))
        if run.status().get("phase") == "train" and not asked:
            asked = {name: ask_without_key(seen, name, path) for name, path in SERVERS.items()}
            assert not [pid for pid in marked_pids(token) if KEY in command_of(pid)]
        time.sleep(LOOK_EVERY_S)
    assert run.process.returncode == 0, run.output[-6000:]
    assert token
    assert {"start", "generate", "train", "sync"} <= phases
    listeners = " ".join(socket.command for socket in seen)
    for name in ("train.py", "gcs_server", "raylet", "router", "embedded.server", "ray::TrainRayActor"):
        assert name in listeners, f"{name} was not among the listeners that were found"
    assert asked["embedded.server"] == [401] * NUM_ENGINES
    assert 401 in asked["router"]  # its other port has its metrics
    elsewhere = [socket for socket in seen if not socket.is_on_loopback]
    assert not elsewhere


def ask_without_key(sockets: Iterable[OpenSocket], command: str, path: str) -> list[int]:
    """Statuses with which the servers of that command answer."""
    statuses = []
    for socket in sockets:
        if command in socket.command and "watchdog" not in socket.command:
            reply = httpx.get(f"http://127.0.0.1:{socket.port}{path}", timeout=30, trust_env=False)
            statuses.append(reply.status_code)
    return statuses


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""
