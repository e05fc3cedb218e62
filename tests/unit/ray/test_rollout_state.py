"""What the rollout manager saves belongs to the checkpoint's step, however far the next rollout has come."""

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import pytest

from slime.ray.rollout import RolloutController
from slime.rollout.base_types import GroupFates, RolloutFnTrainOutput
from slime.rollout.progress import set_bar_factory
from slime.utils.types import Sample


class CountingSource:
    """Stands at the number of prompts that it gave."""

    outstanding: dict[int, tuple[int, int]]

    def __init__(self) -> None:
        self.given, self.kept, self.outstanding, self.saved = 0, None, {}, []  # type: ignore[var-annotated]

    def get_samples(self, count: int) -> list[list[Sample]]:
        first, self.given = self.given, self.given + count
        self.outstanding |= {i: (0, i) for i in range(first, self.given)}
        return [[Sample(index=i, group_index=i, tokens=[1])] for i in range(first, self.given)]

    def freeze(self) -> None:
        self.kept = self.given

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
        debug_rollout_only=True, custom_rollout_log_function_path=None, rollout_num_gpus=1,
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


def test_the_ledger_of_a_rollout_is_given_once(tmp_path: Any) -> None:
    manager, _ = controller(tmp_path)
    manager.generate(4)
    line = manager.take_ledger()
    assert line == {
        "rollout_id": 4, "trained": [[0, 0]], "dropped": [[0, 1]], "discarded": [], "outstanding": [[0, 2]]
    }  # fmt: skip
    assert manager.take_ledger() is None
