"""A wait that names who is lost: real processes of a small Ray cluster, stopped and killed."""

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

LIMIT_S = 3.0
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    import ray

    ray.init(address="local", _node_ip_address="127.0.0.1", include_dashboard=False, num_cpus=8, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture
def worker(ray: Any) -> Callable[[], Any]:
    from slime.ray.liveness import THREADS, Pulse

    class Worker(Pulse):
        def pid(self) -> int:
            return os.getpid()

        def work(self, seconds: float) -> str:
            time.sleep(seconds)
            return "done"

        def fail(self) -> None:
            raise ConnectionError("Connection closed by peer [127.0.0.1]")

    return lambda: ray.remote(concurrency_groups=THREADS)(Worker).remote()


@pytest.fixture
def liveness(worker: Any) -> Iterator[Any]:
    from slime.ray import waiting
    from slime.ray.liveness import Liveness

    liveness = Liveness("the test", LIMIT_S)
    liveness.start()

    def look() -> None:
        if lost := liveness.lost():
            raise waiting.RemoteError("; ".join(lost.values()))

    waiting.set_look(look)
    yield liveness
    waiting.set_look(None)
    liveness.close()


def wait_until(is_so: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def two(ray: Any, worker: Any, liveness: Any) -> tuple[list[Any], list[int]]:
    actors = [worker(), worker()]
    for rank, actor in enumerate(actors):
        liveness.watch(f"rank {rank}", actor)
    pids = ray.get([actor.pid.remote() for actor in actors])
    wait_until(lambda: all(liveness._watched[f"rank {rank}"].pid for rank in (0, 1)))
    return actors, pids


def test_a_process_that_is_stopped_before_its_first_sign_is_named_once_it_was_introduced(
    ray: Any, worker: Any, liveness: Any
) -> None:
    actor = worker()
    pid = ray.get(actor.pid.remote())
    os.kill(pid, signal.SIGSTOP)
    liveness.watch("rank 0", actor)
    liveness.introduce("rank 0", pid, socket.gethostname())
    wait_until(liveness.lost)
    assert f"rank 0 (pid {pid}) has given no sign of life" in liveness.lost()["rank 0"]
    assert "stopped by a signal" in liveness.lost()["rank 0"]


def test_a_stopped_process_is_named_by_whoever_waits_for_another(ray: Any, worker: Any, liveness: Any) -> None:
    from slime.ray.waiting import RemoteError, wait_for

    actors, pids = two(ray, worker, liveness)
    os.kill(pids[1], signal.SIGSTOP)
    with pytest.raises(RemoteError, match=re.escape(f"rank 0 had to train, but rank 1 (pid {pids[1]})")) as caught:
        wait_for({"rank 0": actors[0].work.remote(PATIENCE_S)}, "train", timeout_s=PATIENCE_S)
    assert "has given no sign of life" in str(caught.value)
    assert "stopped by a signal" in str(caught.value)
    with pytest.raises(ProcessLookupError):  # it must not wake up into a run that goes on without it
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            os.kill(pids[1], 0)
            time.sleep(0.05)


def test_a_killed_process_is_named_though_its_peer_fails_first(ray: Any, worker: Any, liveness: Any) -> None:
    from slime.ray.waiting import RemoteError, wait_for

    actors, pids = two(ray, worker, liveness)
    os.kill(pids[1], signal.SIGKILL)
    calls = {"rank 0": actors[0].fail.remote(), "rank 1": actors[1].work.remote(PATIENCE_S)}
    with pytest.raises(RemoteError) as caught:
        wait_for(calls, "train", timeout_s=PATIENCE_S)
    first_line = str(caught.value).splitlines()[0]
    assert "rank 1" in first_line and "died" in first_line


def test_a_long_task_is_no_silence(ray: Any, worker: Any, liveness: Any) -> None:
    from slime.ray.waiting import wait_for

    actors, _ = two(ray, worker, liveness)
    assert wait_for({"rank 0": actors[0].work.remote(2 * LIMIT_S)}, "train") == ["done"]


def test_an_actor_ends_when_nobody_asks_any_more(ray: Any, worker: Any) -> None:
    from slime.ray.liveness import Liveness

    liveness = Liveness("the test", 1.0)
    liveness.start()
    _, pids = two(ray, worker, liveness)
    liveness.close()
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))


def test_an_actor_that_was_watched_misses_an_owner_that_stops_at_once(ray: Any, worker: Any) -> None:
    from slime.ray.liveness import Liveness

    liveness = Liveness("the test", 1.0)
    actor = worker()
    liveness.watch("rank 0", actor)  # never started: as if it was stopped before its first look around
    pid = ray.get(actor.pid.remote())
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"))


def test_a_process_may_be_silent_for_longer_while_it_loads(ray: Any, worker: Any) -> None:
    from slime.ray.liveness import Liveness

    liveness = Liveness("the test", 1.0)
    actor = worker()
    liveness.watch("rank 0", actor, is_loading=True)
    liveness.start()
    pid = ray.get(actor.pid.remote())
    wait_until(lambda: liveness._watched["rank 0"].pid)
    os.kill(pid, signal.SIGSTOP)
    stopped_s = time.monotonic()
    wait_until(liveness.lost)
    assert time.monotonic() - stopped_s > 3.0
    assert "(--liveness-timeout 1, 5 times that while it loads); it is stopped" in liveness.lost()["rank 0"]
    liveness.close()


def test_who_was_introduced_loads_no_more(ray: Any, worker: Any) -> None:
    from slime.ray.liveness import Liveness

    liveness = Liveness("the test", 1.0)
    actor = worker()
    liveness.watch("rank 0", actor, is_loading=True)
    liveness.start()
    pid = ray.get(actor.pid.remote())
    wait_until(lambda: liveness._watched["rank 0"].pid)
    liveness.introduce("rank 0", pid, socket.gethostname())
    os.kill(pid, signal.SIGSTOP)
    wait_until(liveness.lost)
    assert "(--liveness-timeout 1); it is stopped" in liveness.lost()["rank 0"]
    liveness.close()


def test_a_deadline_names_who_is_late(ray: Any, worker: Any) -> None:
    from slime.ray.waiting import RemoteError, wait_for

    with pytest.raises(RemoteError, match=r"Waited 1 s for rank 0 to train; the limit is 1 s"):
        wait_for({"rank 0": worker().work.remote(PATIENCE_S)}, "train", timeout_s=0.6)
