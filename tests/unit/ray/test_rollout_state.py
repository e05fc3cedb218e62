"""What the rollout manager saves belongs to the checkpoint's step, however far the next rollout has come."""

import random
import threading
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import pytest

from slime.ray import rollout
from slime.ray.rollout import RolloutController
from slime.rollout.base_types import GroupFates, RolloutFnTrainOutput
from slime.rollout.progress import set_bar_factory
from slime.rollout.random_state import load_random_state
from slime.utils.types import Sample
from tests.run_processes import wait_until


class CountingSource:
    """Stands at the number of prompts that it gave."""

    outstanding: dict[int, tuple[int, int]]

    def __init__(self) -> None:
        self.given, self.kept, self.outstanding, self.saved = 0, None, {}, []  # type: ignore[var-annotated]

    def get_samples(self, count: int) -> list[list[Sample]]:
        first, self.given = self.given, self.given + count
        self.outstanding |= {i: (0, i) for i in range(first, self.given)}
        return [[Sample(index=i, group_index=i, tokens=[1])] for i in range(first, self.given)]

    def state(self) -> int:
        return self.given

    def freeze(self, state: int) -> None:
        self.kept = state

    def thaw(self) -> None:
        self.kept = None

    def save(self, rollout_id: int) -> None:
        self.saved.append((rollout_id, self.given if self.kept is None else self.kept))


@pytest.fixture(autouse=True)
def bars_of_the_process() -> Iterator[None]:
    """A manager draws its own bars, for all of its process."""
    yield
    set_bar_factory(None)


def controller(tmp_path: Any) -> tuple[RolloutController, CountingSource]:
    args = Namespace(
        save=str(tmp_path), run_dir=str(tmp_path), load_debug_rollout_data=None, save_debug_rollout_data=None,
        debug_rollout_only=True, custom_rollout_log_function_path=None, rollout_num_gpus=1, rollouts_ahead=2,
        debug_train_only=False,
    )  # fmt: skip
    manager = RolloutController(args, None)
    manager.data_source = CountingSource()
    manager._generate_rollout = draw_three
    return manager, manager.data_source


def draw_three(args: Namespace, rollout_id: int, source: CountingSource, evaluation: bool) -> RolloutFnTrainOutput:
    groups = source.get_samples(3)
    fates = GroupFates(trained=(groups[0][0].group_index,), dropped=(groups[1][0].group_index,))
    return RolloutFnTrainOutput(samples=groups[:1], fates=fates)


def test_a_checkpoint_of_the_step_before_does_not_hold_prompts_that_were_drawn_since(tmp_path: Any) -> None:
    """A run that leaves between generating and training saves the step before: its prompts must come again."""
    manager, source = controller(tmp_path)
    manager.generate(0)
    manager.save(0)
    manager.generate(1)
    manager.save(0)
    manager.save(1)
    assert source.saved == [(0, 3), (0, 3), (1, 6)]


def test_rollouts_that_were_made_ahead_are_made_again_after_a_resume(tmp_path: Any) -> None:
    """Whatever waits in the buffer when rollout 1 is saved, the checkpoint stands where rollout 1 ended."""
    manager, source = controller(tmp_path)
    for rollout_id in range(4):
        manager.make(rollout_id)
    manager.save(1)
    manager.save(3)
    assert source.saved == [(1, 6), (3, 12)]


def test_the_random_states_of_a_checkpoint_are_those_of_its_step(tmp_path: Any) -> None:
    manager, _ = controller(tmp_path)
    manager.make(0)
    expected = random.getstate()
    manager.make(1)
    random.random()
    manager.save(0)
    load_random_state(str(tmp_path), 0)
    assert random.getstate() == expected


def test_a_rollout_comes_with_its_own_metrics_and_ledger(tmp_path: Any) -> None:
    manager, _ = controller(tmp_path)
    made = [manager.make(rollout_id) for rollout_id in range(2)]
    assert [one.metrics["rollout/step"] for one in made] == [0, 1]
    assert [one.ledger["trained"] for one in made if one.ledger] == [[[0, 0]], [[0, 3]]]


def test_an_evaluation_and_a_rollout_are_never_made_together_and_the_evaluation_goes_first(tmp_path: Any) -> None:
    """A rollout that is full aborts whatever is in flight, which must not be an evaluation's requests."""
    manager, _ = controller(tmp_path)
    order, may_end = [], threading.Event()

    def generate(args: Namespace, rollout_id: int, source: CountingSource, evaluation: bool) -> RolloutFnTrainOutput:
        order.append(f"rollout {rollout_id} begins")
        may_end.wait(20)
        order.append(f"rollout {rollout_id} ends")
        return draw_three(args, rollout_id, source, evaluation)

    manager._generate_rollout = generate
    manager._evaluate = lambda rollout_id: order.append("evaluation")  # type: ignore[method-assign]
    threads = [threading.Thread(target=manager.make, args=(0,))]
    threads[0].start()
    wait_until(lambda: order, 20)
    threads.append(threading.Thread(target=manager.eval, args=(0,)))
    threads[1].start()
    wait_until(lambda: manager._engines_use._evaluations, 20)
    threads.append(threading.Thread(target=manager.make, args=(1,)))
    threads[2].start()
    may_end.set()
    for thread in threads:
        thread.join(20)
    assert order == ["rollout 0 begins", "rollout 0 ends", "evaluation", "rollout 1 begins", "rollout 1 ends"]


@pytest.mark.parametrize(
    ("mode", "expected"), [("in_place", ["caches forgotten", "evaluated"]), ("abort", ["evaluated"])]
)
def test_an_evaluation_is_not_read_out_of_what_older_weights_computed(
    tmp_path: Any, mode: str, expected: list[str]
) -> None:
    """With in_place the sync before it met requests, whose engine kept its cache; each other mode has flushed it."""
    manager, _ = controller(tmp_path)
    order: list[str] = []
    manager.args.pause_generation_mode = mode
    manager._engines = Namespace(forget_caches=lambda: order.append("caches forgotten"))  # type: ignore[assignment]
    manager._evaluate = lambda rollout_id: order.append("evaluated")  # type: ignore[method-assign]
    manager.eval(0)
    assert order == expected


def test_the_ledger_of_a_rollout_is_given_once(tmp_path: Any) -> None:
    manager, _ = controller(tmp_path)
    manager.generate(4)
    line = manager.take_ledger()
    assert line == {
        "rollout_id": 4, "trained": [[0, 0]], "dropped": [[0, 1]], "discarded": [], "outstanding": [[0, 2]]
    }  # fmt: skip
    assert manager.take_ledger() is None


def test_graders_import_while_engines_start(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    manager, source = controller(tmp_path)
    manager.args.rollout_function_path = manager.args.eval_function_path = "slime.rollout.sleep_rollout.sleep"
    done: list[str] = []

    class StubEngines:
        def __init__(self, args: Namespace, devices: Any) -> None: ...

        def launch(self) -> None:
            done.append("launch")

        def wait_until_ready(self) -> None:
            done.append("ready")

    monkeypatch.setattr(rollout, "Engines", StubEngines)
    monkeypatch.setattr(rollout, "warm_up", lambda args: done.append("warm up"))
    monkeypatch.setattr(rollout, "load_data_source", lambda args: source)
    monkeypatch.setattr(rollout, "init_http_client", lambda args: None)
    monkeypatch.setattr(rollout, "settle_objects", lambda: None)
    manager.start()
    assert done == ["launch", "warm up", "ready"]
