"""Engines that this run starts, over one node or several: noticed when a part of them dies, never killed too late."""

import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slime.backends.base import EngineSpec
from slime.ray import engine_actor, engine_places
from slime.ray.engine_actor import EngineActor
from slime.ray.engine_places import EnginePlace, OwnEngine
from slime.utils.processes import ServerError
from slime.weight_sync.base import EngineError

PATIENCE_S = 60.0
SERVE = """
import http.server, sys
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        is_allowed = self.path == "/generate" and self.headers["Authorization"] == "Bearer key"
        self.send_response(200 if is_allowed else 401); self.end_headers()
    def log_message(self, *a): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), H).serve_forever()
"""


def spec(node: int = 0, num_nodes: int = 1) -> EngineSpec:
    return EngineSpec(
        index=0, host="", port=0, num_devices=1, device="cpu", device_ids=(), model_path="m", dtype="float32",
        threads=1, log_path=Path("l"), weights_dir=Path("w"), seed=0, num_nodes=num_nodes, node_rank=node,
    )  # fmt: skip


# ---- the actor beside a server ----


@pytest.fixture
def actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineActor]:
    """With a real server that answers /health at once."""

    def command(_: Namespace, spec: EngineSpec) -> tuple[list[str], dict[str, str]]:
        return [sys.executable, "-c", SERVE, str(spec.port)], {}

    monkeypatch.setattr(engine_actor, "_server_command", lambda args: command)
    actor = EngineActor(Namespace(device="cpu"), replace(spec(), log_path=tmp_path / "log"))
    yield actor
    actor.stop()


def test_a_late_kill_spares_the_server_that_was_started_meanwhile(actor: EngineActor) -> None:
    actor.start(1, {})
    second = actor.start(2, {})
    actor.kill(1)
    actor.wait_until_healthy(PATIENCE_S)
    assert actor.how_it_ended() is None
    with pytest.raises(RuntimeError, match="Start 1 of engine 0 came after start 2"):
        actor.start(1, {})
    actor.kill(2)
    ended = actor.how_it_ended()
    assert ended is not None and second.port > 0


def sampling(top_p: float = 1.0, **keys: str) -> Namespace:
    return Namespace(device="cpu", rollout_top_p=top_p, rollout_top_k=-1, eval_datasets=[], **keys)


def test_a_server_on_a_gpu_compiles_the_samplers_of_the_run_before_it_serves(actor: EngineActor) -> None:
    """With the key for requests, which is another than the one for control where there are both."""
    actor._args = sampling(0.9, sglang_api_key="key", sglang_admin_api_key="admin")
    actor._spec = replace(actor._spec, device="cuda")
    actor.start(1, {})
    actor.wait_until_healthy(PATIENCE_S)
    actor._args = sampling(0.9, sglang_api_key="another")
    with pytest.raises(EngineError, match=r"engine 0 .*POST /generate: 401"):
        actor.wait_until_healthy(PATIENCE_S)


@pytest.mark.parametrize(
    ("top_p", "device", "worker_type"),
    [(1.0, "cuda", "regular"), (0.9, "cpu", "regular"), (0.9, "cuda", "decode")],
    ids=["nothing is limited", "nothing is compiled", "alone it answers no request"],
)
def test_other_servers_are_not_sent_a_request_first(
    actor: EngineActor, top_p: float, device: str, worker_type: str
) -> None:
    actor._args = sampling(top_p)
    actor._spec = replace(actor._spec, device=device, worker_type=worker_type)
    actor.start(1, {})
    actor.wait_until_healthy(PATIENCE_S)  # the server would refuse one without its key


def test_a_server_that_was_not_started_has_not_ended(actor: EngineActor) -> None:
    assert actor.how_it_ended() is None
    actor.kill(0)


# ---- engines over two nodes, with actors that are threads ----


class FakeActor:
    """`actor.method.remote(...)` runs on a thread and gives a future, as Ray gives a reference."""

    def __init__(self, part: EngineSpec) -> None:
        self.part = part
        self.ended: str | None = None
        self.is_healthy = threading.Event()
        self.may_tell = threading.Event()
        self.may_tell.set()
        self.starts: list[int] = []
        self.kills: list[int] = []
        self.pool = ThreadPoolExecutor(8)

    def __getattr__(self, name: str) -> Any:
        method = getattr(type(self), f"do_{name}")
        return Namespace(remote=lambda *args: self.pool.submit(method, self, *args))

    def do_start(self, number: int, overrides: Any, first: Any = None) -> EngineSpec:
        meeting = first.result() if first is not None else None
        self.starts.append(number)
        self.ended = None
        return replace(self.part, host=f"node{self.part.node_rank}", port=number, dist_address=str(meeting))

    def do_wait_until_healthy(self, timeout_s: float) -> None:
        if not self.is_healthy.wait(timeout_s):
            raise ServerError("not healthy in time")

    def do_how_it_ended(self) -> str | None:
        return self.ended

    def do_log_tail(self) -> str:
        self.may_tell.wait(PATIENCE_S)
        return "a line before\nLoading:   0%\rthe last line\n \n"

    def do_kill(self, number: int) -> None:
        self.kills.append(number)


class Engine(OwnEngine):
    def _place(self, part: EngineSpec) -> Any:
        return FakeActor(part)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Over two nodes; the fake of Ray knows what the code under test asks of it."""

    def fake_wait(refs: list[Future], num_returns: int = 1, timeout: float | None = None) -> tuple[list, list]:
        done, pending = wait(refs, timeout, "ALL_COMPLETED" if num_returns > 1 else FIRST_COMPLETED)
        return [ref for ref in refs if ref in done], [ref for ref in refs if ref in pending]

    def fake_get(refs: Any, timeout: float | None = None) -> Any:
        return [ref.result(timeout) for ref in refs] if isinstance(refs, list) else refs.result(timeout)

    monkeypatch.setattr(engine_places.ray, "wait", fake_wait)
    monkeypatch.setattr(engine_places.ray, "get", fake_get)
    monkeypatch.setattr(engine_places, "_POLL_S", 0.02)
    liveness: Any = Namespace(lost=dict)
    engine = Engine(Namespace(rollout_engine="sglang", device="cpu"), [spec(0, 2), spec(1, 2)], None, liveness)
    yield engine
    for actor in engine._actors:
        actor.is_healthy.set()
        actor.may_tell.set()
        actor.pool.shutdown()


def starting(engine: Engine) -> "Future[None]":
    engine.begin()
    return ThreadPoolExecutor(1).submit(engine.wait_until_healthy)


def test_a_part_that_dies_on_the_second_node_ends_the_start_at_once_and_by_name(engine: Engine) -> None:
    """The first node waits for it until its own time is out: here a quarter of an hour."""
    healthy = starting(engine)
    engine._actors[1].ended = "ended with exit code 1 at 10:11:12.\nLast lines"
    with pytest.raises(EngineError, match=r"engine 0 on its node 1 \(http://node1:1\) ended with exit code 1"):
        healthy.result(PATIENCE_S)
    assert engine.record is None


def test_an_engine_of_two_nodes_serves_and_is_lost_with_either(engine: Engine) -> None:
    engine._actors[0].is_healthy.set()
    starting(engine).result(PATIENCE_S)
    assert engine.record is not None and engine.record.url == "http://node0:1"
    engine.find_out()
    assert engine.death is None
    engine._actors[1].ended = "was killed by SIGKILL at 10:11:12."
    engine.find_out()
    assert engine.death == "engine 0 on its node 1 (http://node1:1) was killed by SIGKILL at 10:11:12."


def test_who_finds_an_engine_silent_ends_all_of_its_parts(engine: Engine) -> None:
    engine._actors[0].is_healthy.set()
    starting(engine).result(PATIENCE_S)
    engine.kill("did not answer for 30 s", 1)
    assert engine.death is not None and engine.death.startswith("engine 0 (http://node0:1) did not answer for 30 s")
    assert "the last line" in engine.death
    assert [actor.kills for actor in engine._actors] == [[1], [1]]


def test_who_finds_an_engine_silent_too_late_leaves_its_successor_alone(engine: Engine) -> None:
    """While its owner is asked for its log, the death shows another way, and it is started again."""
    engine._actors[0].is_healthy.set()
    starting(engine).result(PATIENCE_S)
    engine._actors[0].may_tell.clear()
    giving_up = ThreadPoolExecutor(1).submit(engine.kill, "did not answer for 30 s", engine.num_starts)
    engine.death = "engine 0 was killed"
    starting(engine).result(PATIENCE_S)
    engine._actors[0].may_tell.set()
    giving_up.result(PATIENCE_S)
    assert engine.death is None and engine.num_starts == 2
    assert not [number for actor in engine._actors for number in actor.kills]


def test_the_last_line_of_its_log_is_one_that_says_something(engine: Engine) -> None:
    assert engine.last_line() == "the last line"


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_engine_elsewhere_that_is_another_by_now_is_not_lost() -> None:
    place = engine_places.ExternalEngine.__new__(engine_places.ExternalEngine)
    EnginePlace.__init__(place, spec())
    place.begin()
    place.kill("did not answer", 0)
    assert place.death is None
    place.kill("did not answer", 1)
    assert place.death is not None
