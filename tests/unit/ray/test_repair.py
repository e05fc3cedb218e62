"""What the driver does about lost engines, with a rollout manager and a trainer that note what they are asked."""

from argparse import Namespace
from typing import Any

import pytest

from slime.ray import repair
from slime.ray.repair import Repairs
from slime.ray.waiting import RemoteError


class Called:
    """Notes calls; a method answers with the value that `replies` has for it, a list one after another."""

    def __init__(self, calls: list[Any], replies: dict[str, Any]) -> None:
        self.calls, self.replies = calls, replies

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            self.calls.append((name, *args) if args else name)
            reply = self.replies.get(name)
            if isinstance(reply, list) and reply and isinstance(reply[0], list | Exception):
                reply = reply.pop(0)
            if isinstance(reply, Exception):
                raise reply
            return reply

        call.remote = call  # type: ignore[attr-defined]
        return call


class Trainer(Called):
    weight_version = 7
    has_trained_since_sync = False


DEAD = "engine 1 (http://127.0.0.1:1) was killed by SIGKILL at 10:11:12.\nLast lines"
RECORD = Namespace(name="engine 1", url="http://127.0.0.1:2")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(repair, "wait_for", lambda calls, what: list(calls.values()))
    monkeypatch.setattr(repair.ray, "wait", lambda refs, timeout: (refs, []))
    monkeypatch.setattr(repair.ray, "get", lambda ref: ref)
    monkeypatch.setattr(repair, "_POLL_INTERVAL_S", 0.0)
    monkeypatch.setattr(repair, "_NOTICE_S", 0.0)
    return []


def repairs(calls: list[Any], dead: Any, *, allowed: bool = True, trainer: Any = None, **replies: Any) -> Repairs:
    manager = {"dead_servers": dead, "restart_servers": [[RECORD]] * 20, "engine_records": ["all"], **replies}
    return Repairs(Namespace(use_fault_tolerance=allowed), Called(calls, manager), trainer)


def test_an_engine_is_back_with_the_current_weights_before_it_takes_requests(calls: list[Any]) -> None:
    hands = repairs(calls, [[DEAD]], trainer=Trainer(calls, {}))
    hands.look()
    assert calls == [
        "dead_servers", "make_room", "restart_servers", ("connect_engines", [RECORD]), "send_weights_again",
        "engine_records",
        ("connect_engines", ["all"]), "admit_engines",
    ]  # fmt: skip


def test_where_the_trainer_has_left_the_engines_version_behind_all_get_the_next(calls: list[Any]) -> None:
    """Else engines of one version would hold different weights."""
    trainer = Trainer(calls, {})
    trainer.has_trained_since_sync = True
    manager = Called(calls, {"dead_servers": [[DEAD]], "restart_servers": [[RECORD]], "engine_records": ["all"]})
    arguments = Namespace(use_fault_tolerance=True)
    Repairs(arguments, manager, trainer, new_version=lambda: calls.append("new version")).look()
    assert calls == [
        "dead_servers", "make_room", "restart_servers", "engine_records", ("connect_engines", ["all"]), "new version",
        "admit_engines",
    ]  # fmt: skip


def test_whoever_shows_the_processes_of_the_run_hears_of_new_ones(calls: list[Any]) -> None:
    manager = Called(calls, {"dead_servers": [[DEAD], []], "restart_servers": [[RECORD]] * 2})
    hands = Repairs(Namespace(use_fault_tolerance=True), manager, None, lambda: calls.append("shown"))
    hands.look()
    assert calls[-2:] == ["admit_engines", "shown"]
    hands.look()
    assert calls.count("shown") == 1


def test_without_the_flag_a_loss_ends_the_run_by_name(calls: list[Any]) -> None:
    hands = repairs(calls, [[DEAD], [DEAD]], allowed=False)
    for look in (hands.look, hands.look_only):
        with pytest.raises(RemoteError, match=r"engine 1 .* was killed by SIGKILL at 10:11:12(.|\n)*--use-fault-toler"):
            look()


def test_while_no_engine_is_needed_nothing_is_started(calls: list[Any]) -> None:
    repairs(calls, [[DEAD]]).look_only()
    assert calls == []


def test_a_sync_that_failed_without_a_loss_is_not_tried_again(calls: list[Any]) -> None:
    assert repairs(calls, []).restart_lost() is False


def test_a_sync_that_failed_by_a_loss_finds_the_engine_started_and_connected(calls: list[Any]) -> None:
    assert repairs(calls, [[DEAD]], trainer=Trainer(calls, {})).restart_lost() is True
    assert calls[1:] == ["make_room", "restart_servers", "engine_records", ("connect_engines", ["all"])]


def test_a_sync_that_failed_by_an_engine_that_hangs_finds_it_started_again(calls: list[Any]) -> None:
    """Its scheduler is stopped and its front process answers: nobody else notices while weights are on their way."""
    hands = repairs(calls, [[], []], trainer=Trainer(calls, {}), give_up_silent_servers=[DEAD])
    assert hands.restart_lost() is True
    assert calls[:4] == ["dead_servers", "give_up_silent_servers", "make_room", "restart_servers"]


def test_a_loss_during_the_repair_is_repaired_too(calls: list[Any]) -> None:
    trainer = Trainer(calls, {"send_weights_again": [RemoteError("engine 1 is gone"), []]})
    hands = repairs(calls, [[DEAD]], trainer=trainer)
    hands.look()
    assert calls.count("restart_servers") == 2
    assert calls[-1] == "admit_engines"


def test_what_is_lost_again_and_again_ends_the_run(calls: list[Any]) -> None:
    hands = repairs(calls, [[DEAD]] * 20)
    with pytest.raises(RemoteError, match="lost 6 times in one rollout"):
        for _ in range(20):
            hands.look()
    hands = repairs(calls, [[DEAD]] * 20)
    for _ in range(10):
        hands.look()
        hands.begin_rollout()


def test_an_engine_that_is_started_again_before_a_sync_is_told_when_it_serves(
    calls: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Once, and not before the sync has given it the weights."""
    caplog.set_level("INFO")
    hands = repairs(calls, [[DEAD], []], trainer=Trainer(calls, {}))
    hands.start_lost_before_a_sync()
    assert "serves again" not in caplog.text
    hands.admit()
    hands.admit()
    assert caplog.text.count("engine 1 serves again at http://127.0.0.1:2 with the current weights") == 1
