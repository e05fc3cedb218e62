"""Engines that share devices give memory back and take it again, also when one of them is lost meanwhile."""

from typing import Any

import pytest

from slime.ray import engines as module
from slime.ray.engine_places import EnginePlace
from slime.ray.engines import Engines
from slime.weight_sync.base import EngineError


class Client:
    """Notes calls; fails them all once `is_lost`."""

    def __init__(self, is_lost: bool = False) -> None:
        self.calls: list[Any] = []
        self.is_lost = is_lost

    def release_memory(self) -> None:
        self.note("release")

    def resume_memory(self, tags: list[str]) -> None:
        self.note(tags)

    def note(self, call: Any) -> None:
        if self.is_lost:
            raise EngineError("no connection")
        self.calls.append(call)


class Record:
    def __init__(self, client: Client) -> None:
        self._client = client

    def client(self) -> Client:
        return self._client


class TwoEngines(Engines):
    """Two places without processes; `dead` finds those lost whose client is, unless `notices` is false. With `hangs`
    they are silent, where somebody asks."""

    def __init__(self, *clients: Client, notices: bool = True, hangs: bool = False) -> None:
        spec: Any = type("Spec", (), {"name": "engine", "gives_memory_back": True})
        self._places = [EnginePlace(spec, Record(client)) for client in clients]  # type: ignore[arg-type]
        self.clients, self.notices, self.hangs = clients, notices, hangs

    def give_up_silent(self) -> None:
        self.notices = self.notices or self.hangs
        self.dead()

    def dead(self) -> list[str]:
        for place, client in zip(self._places, self.clients, strict=True):
            if client.is_lost and self.notices:
                place.death = "was killed"
        return []


def test_memory_comes_back_tag_by_tag() -> None:
    both = TwoEngines(Client(), Client())
    both.release_memory()
    both.resume_memory(["weights"])
    both.resume_memory(["kv_cache"])
    both.resume_memory(["kv_cache"])
    assert [client.calls for client in both.clients] == [["release", ["weights"], ["kv_cache"]]] * 2


def test_an_engine_that_is_lost_meanwhile_is_left_to_the_repair() -> None:
    both = TwoEngines(Client(), Client())
    both.release_memory()
    both.clients[1].is_lost = True
    both.resume_memory(["weights"])
    assert both.clients[0].calls == ["release", ["weights"]]
    assert both._places[1].death is not None
    both.resume_memory(["kv_cache"])
    assert both.clients[0].calls[-1] == ["kv_cache"]


def test_an_engine_that_was_started_since_has_given_nothing_back() -> None:
    both = TwoEngines(Client(), Client())
    both.release_memory()
    both._places[1].gave_back = set()  # as after `restart_dead`
    both.resume_memory(["weights"])
    assert both.clients[1].calls == ["release"]


def test_a_failure_of_an_engine_that_lives_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NOTICE_S", 0.0)
    with pytest.raises(EngineError, match="no connection"):
        TwoEngines(Client(), Client(is_lost=True), notices=False).release_memory()


def test_an_engine_that_hangs_meanwhile_is_left_to_the_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NOTICE_S", 0.0)
    both = TwoEngines(Client(), Client(is_lost=True), notices=False, hangs=True)
    both.release_memory()
    assert both.clients[0].calls == ["release"] and both._places[1].death is not None
