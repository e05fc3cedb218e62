"""A trainer's processes may be started before its devices are free for it."""

from argparse import Namespace
from typing import Any

import pytest

from slime.ray import actor_group as module
from slime.ray.actor_group import RayTrainGroup

ARGS = Namespace(train_threads=1, train_env_vars=None)
ANSWERS = {"get_master_addr_and_port": ("127.0.0.1", 5), "init": 7, "parallel_config": {"dp_size": 2}}


class Actor:
    """Notes what it is asked, in order, and answers at once."""

    def __init__(self, asked: list[str]) -> None:
        self._asked = asked

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> Any:
            self._asked.append(name)
            return ANSWERS.get(name)

        return Namespace(remote=remote)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """One list of calls for each actor that was created."""
    lists: list[list[str]] = []

    def create(*arguments: Any) -> Actor:
        lists.append([])
        return Actor(lists[-1])

    made = Namespace(options=lambda **options: Namespace(remote=create))
    monkeypatch.setattr(module.ray, "remote", lambda **words: lambda kind: made)
    monkeypatch.setattr(module.ray, "kill", lambda actor: None)
    monkeypatch.setattr(module, "PlacementGroupSchedulingStrategy", lambda **words: None)
    monkeypatch.setattr(module, "shared_nccl_settings", lambda args: {})
    monkeypatch.setattr(module.cluster, "device_resource", lambda args: "GPU")
    monkeypatch.setattr(module, "wait_for", lambda calls, *rest: list(calls.values()))
    return lists


def group() -> RayTrainGroup:
    return RayTrainGroup(ARGS, Namespace(group=None, bundles=(0, 1), device_ids=(-1, -1)))


def test_processes_that_were_begun_load_nothing_until_they_are_told(asked: list[list[str]]) -> None:
    trainer = group()
    trainer.begin()
    assert asked == [["prepare"], ["prepare"]]
    assert trainer.create() == [7, 7]
    assert asked == [["prepare", "get_master_addr_and_port", "init"]] * 2


def test_a_group_that_was_not_begun_is_started_by_its_creation_once(asked: list[list[str]]) -> None:
    trainer = group()
    assert trainer.create() == [7, 7]
    assert trainer.create() == []
    assert asked == [["prepare", "get_master_addr_and_port", "init"]] * 2


def test_a_closed_group_can_be_created_again(asked: list[list[str]]) -> None:
    trainer = group()
    trainer.create()
    trainer.close()
    assert trainer.create() == [7, 7]
    assert len(asked) == 4
