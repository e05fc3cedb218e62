"""Which engines the router may send requests to, when servers are lost while others are being replaced."""

import dataclasses
import socket
import threading
from argparse import Namespace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slime.backends.base import EngineSpec
from slime.ray import engines as module
from slime.ray.engine_places import EnginePlace
from slime.ray.engines import Engines
from slime.weight_sync.base import EngineError

PATIENCE_S = 20


class Router:
    """Stands for the router."""

    def __init__(self) -> None:
        self.workers: list[str] = []
        self.ended: str | None = None

    def admit(self, url: str, *_: Any) -> None:
        self.workers.append(url)

    def withdraw(self, url: str) -> None:
        self.workers.remove(url)

    def death(self) -> str | None:
        return self.ended

    def restart(self) -> None:
        self.workers.clear()
        self.ended = None


class Place(EnginePlace):
    """An engine that serves as soon as it is started, unless it cannot or may not; each time at another port."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self.cannot: Exception | None = None
        self.may_start = threading.Event()
        self.may_start.set()

    def begin(self) -> None:
        self.num_starts += 1

    def wait_until_healthy(self) -> None:
        assert self.may_start.wait(PATIENCE_S)
        if self.cannot is not None:
            raise self.cannot
        self.spec = dataclasses.replace(self.spec, host=self.name, port=self.num_starts)
        self._serves("embedded")

    def last_line(self) -> str:
        return f"{self.name} loads"


def spec(index: int) -> EngineSpec:
    return EngineSpec(
        index=index, host="", port=0, num_devices=1, device="cpu", device_ids=(), model_path="m", dtype="float32",
        threads=1, log_path=Path("l"), weights_dir=Path("w"), seed=0,
    )  # fmt: skip


def make() -> tuple[Engines, Any]:
    """Two engines that serve; starting one again gives it another port."""
    router = Router()
    engines = Engines.__new__(Engines)
    engines._args = Namespace(rollout_engine="embedded")
    engines._places = [Place(spec(0)), Place(spec(1))]
    engines._routers = {"default": router}  # type: ignore[dict-item]
    engines._lock = threading.RLock()
    engines._health = SimpleNamespace(forget=lambda name: None, watch=lambda *_, **__: None)  # type: ignore[assignment]
    assert not list(engines._start_errors(engines._places))
    engines.admit()
    return engines, router


def test_an_engine_that_cannot_start_is_told_while_others_start() -> None:
    engines, _ = make()
    slow, broken = engines._places
    slow.may_start.clear()  # type: ignore[attr-defined]
    broken.cannot = EngineError("engine 1 has no memory")  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match="engine 1 has no memory"):
        engines.wait_until_ready()
    slow.may_start.set()  # type: ignore[attr-defined]


def test_of_engines_that_are_started_again_only_those_that_failed_are_started_once_more() -> None:
    engines, router = make()
    first, second = engines._places
    first.death = second.death = "killed"
    first.cannot = EngineError("engine 0 has no memory")  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match="engine 0 has no memory"):
        engines.restart_dead()
    first.cannot = None  # type: ignore[attr-defined]
    assert [record.name for record in engines.restart_dead()] == ["engine 0", "engine 1"]
    assert (first.num_starts, second.num_starts) == (2, 1)
    assert router.workers == [], "neither has the weights"


def test_a_long_start_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    engines, _ = make()
    told: list[str] = []

    def tell(text: str, *values: Any) -> None:
        told.append(text % values)
        engines._places[0].may_start.set()  # type: ignore[attr-defined]
        engines._places[1].may_start.set()  # type: ignore[attr-defined]

    monkeypatch.setattr(module, "_TELL_EVERY_S", 0.05)
    monkeypatch.setattr(module.logger, "info", tell)
    for place in engines._places:
        place.may_start.clear()  # type: ignore[attr-defined]
    assert not list(engines._start_errors(engines._places))
    assert told[0] == "engine 0 has been starting for 0 s, as 1 more; its log says: engine 0 loads"


def test_an_engine_whose_weights_could_not_be_sent_is_handed_out_again() -> None:
    engines, router = make()
    engines._places[1].death = "killed"
    (restarted,) = engines.restart_dead()
    assert engines.restart_dead() == [restarted], "nothing is lost any more, but it still lacks the weights"
    assert router.workers == ["http://engine 0:0"]
    engines.admit()
    assert router.workers == ["http://engine 0:0", restarted.url]
    assert engines.restart_dead() == []


def test_a_new_router_does_not_learn_of_engines_without_the_weights() -> None:
    engines, router = make()
    engines._places[1].death = "killed"
    (restarted,) = engines.restart_dead()
    router.ended = "killed"
    assert engines.restart_dead() == [restarted]
    assert router.workers == ["http://engine 0:0"]


class Scheduler(BaseHTTPRequestHandler):
    """Answers /server_info with an error."""

    def do_GET(self) -> None:
        self.send_response(503)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Server(Place):
    """At an address that is given."""

    port = 0

    def wait_until_healthy(self) -> None:
        self.spec = dataclasses.replace(self.spec, host="127.0.0.1", port=self.port)
        self._serves("sglang")

    def kill(self, reason: str, start: int) -> None:
        self.death = f"{self.name} {reason}"


def test_after_a_call_failed_engines_whose_scheduler_is_silent_are_given_up() -> None:
    """One that answers is left alone, be it with an error: the call's own error tells what is wrong."""
    engines, _ = make()
    engines._args = Namespace(rollout_engine="sglang", rollout_health_check_timeout=1.0)
    engines._places = [Server(spec(0)), Server(spec(1))]
    http = ThreadingHTTPServer(("127.0.0.1", 0), Scheduler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    with socket.create_server(("127.0.0.1", 0)) as hangs:
        for place, port in zip(engines._places, (http.server_address[1], hangs.getsockname()[1]), strict=True):
            place.port = port  # type: ignore[attr-defined]
            place.wait_until_healthy()
        engines.give_up_silent()
    http.shutdown()
    assert engines._places[0].death is None
    (death,) = engines.dead()
    assert death.startswith(f"engine 1 did not answer {engines._places[1].spec.url}/server_info for 1 s")
