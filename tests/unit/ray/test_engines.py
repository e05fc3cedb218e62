"""Which engines the router may send requests to, when servers are lost while others are being replaced."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from slime.ray import engines as module
from slime.ray.engines import EngineRecord, Engines, _Slot


class Router:
    """Stands for the router process and for its client."""

    def __init__(self) -> None:
        self.workers: list[str] = []
        self.ended: str | None = None

    def add_worker(self, url: str, **_: Any) -> None:
        self.workers.append(url)

    def remove_worker(self, url: str, *_: Any) -> None:
        self.workers.remove(url)

    def close(self) -> None:
        pass

    def how_it_ended(self) -> str | None:
        return self.ended

    def terminate(self, timeout_s: float) -> None:
        self.workers.clear()

    def start(self) -> None:
        self.ended = None


def make(monkeypatch: pytest.MonkeyPatch) -> tuple[Engines, Router]:
    """Two engines that serve; starting one gives it another port."""
    router, ports = Router(), iter(range(100))
    monkeypatch.setattr(module, "RouterClient", lambda *_, **__: router)
    engines = Engines.__new__(Engines)
    start = SimpleNamespace(start=SimpleNamespace(remote=lambda: None))
    engines._slots = [_Slot(SimpleNamespace(name=f"engine {i}"), start) for i in range(2)]  # type: ignore[arg-type]
    engines._router, engines._router_url, engines._router_silence = router, "http://router", None  # type: ignore[assignment]
    engines._lock = threading.RLock()
    nothing = SimpleNamespace(forget=lambda name: None, lost=dict)
    engines._health = engines._liveness = nothing  # type: ignore[assignment]
    monkeypatch.setattr(engines, "_wait_for_router", lambda: None)

    def become_healthy(slots: list[_Slot], starting: dict[str, Any]) -> None:
        for slot in slots:
            slot.record = EngineRecord(slot.name, f"{slot.name}:{next(ports)}", "embedded", 1, "")
            slot.is_admitted, slot.death = False, None

    monkeypatch.setattr(engines, "_wait_until_healthy", become_healthy)
    become_healthy(engines._slots, {})
    engines.admit()
    return engines, router


def test_an_engine_whose_weights_could_not_be_sent_is_handed_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engines, router = make(monkeypatch)
    engines._slots[1].death = "killed"
    (restarted,) = engines.restart_dead()
    assert engines.restart_dead() == [restarted], "nothing is lost any more, but it still lacks the weights"
    assert router.workers == ["engine 0:0"]
    engines.admit()
    assert router.workers == ["engine 0:0", restarted.url]
    assert engines.restart_dead() == []


def test_a_new_router_does_not_learn_of_engines_without_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    engines, router = make(monkeypatch)
    engines._slots[1].death = "killed"
    (restarted,) = engines.restart_dead()
    router.ended = "killed"
    assert engines.restart_dead() == [restarted]
    assert router.workers == ["engine 0:0"]
