"""The order in which trainer and engines hand shared devices to each other."""

from argparse import Namespace
from typing import Any

import pytest

from slime.observability.timer import StepClock
from slime.ray import turns
from slime.ray.schedule import Schedule


class Recorder:
    """Trainer and rollout manager in one: notes what was asked of it, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        call = lambda: self.calls.append(name)  # noqa: E731
        call.remote = call  # type: ignore[attr-defined]
        return call


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    monkeypatch.setattr(turns, "wait_for", lambda calls, what: [None])
    return Recorder()


def turns_of(args: Namespace, recorder: Recorder) -> turns.Turns:
    hands = turns.Turns(args, recorder)
    hands.trainer = recorder
    return hands


def one_step(hands: turns.Turns, recorder: Recorder, syncs: bool = True) -> list[str]:
    recorder.calls.clear()
    clock = StepClock()
    hands.to_trainer(clock)
    recorder.calls.append("train")
    if syncs:
        hands.to_engines(clock)
        recorder.calls.append("sync")
        hands.to_generation(clock)
    return list(recorder.calls)


def test_shared_devices_are_released_before_the_other_side_takes_them(recorder: Recorder) -> None:
    hands = turns_of(Namespace(offload_rollout=True, offload_train=True), recorder)
    handed_over = ["offload", "onload_weights", "sync", "offload_weights", "onload_kv"]
    assert one_step(hands, recorder) == ["offload", "train", *handed_over]
    assert one_step(hands, recorder) == ["offload", "onload", "train", *handed_over]


def test_engines_that_came_first_make_room_for_a_trainer_that_loads(recorder: Recorder) -> None:
    hands = turns_of(Namespace(offload_rollout=True, offload_train=True), recorder)
    clock = StepClock()
    hands.to_loading(clock)
    hands.to_engines(clock)
    hands.to_generation(clock)
    assert recorder.calls == ["offload", "offload", "onload_weights", "offload_weights", "onload_kv"]


def test_the_first_sync_finds_engines_that_never_gave_anything_back(recorder: Recorder) -> None:
    hands = turns_of(Namespace(offload_rollout=True, offload_train=False), recorder)
    clock = StepClock()
    hands.to_engines(clock)
    hands.to_generation(clock)
    assert recorder.calls == []


def test_devices_of_their_own_are_kept(recorder: Recorder) -> None:
    hands = turns_of(Namespace(offload_rollout=False, offload_train=False), recorder)
    assert one_step(hands, recorder) == ["train", "sync"]


def test_engines_without_weights_are_synced_whatever_the_interval() -> None:
    args = Namespace(
        start_rollout_id=0, num_rollout=4, eval_interval=None, eval_datasets=[], save_interval=None, save_hf=None,
        offload_rollout=True, update_weights_interval=3, skip_eval_before_train=False,
    )  # fmt: skip
    schedule = Schedule.of(args, None)
    assert all(schedule.syncs_after(rollout_id) for rollout_id in schedule)
