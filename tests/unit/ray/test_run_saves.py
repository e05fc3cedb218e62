"""What a run does before its checkpoint counts, in order."""

from argparse import Namespace
from typing import Any

import pytest

from slime.ray.run import Run


class Recorder:
    """Stands for whatever is asked; writes down by what name."""

    def __init__(self, asked: list[str]) -> None:
        self._asked = asked

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self._asked.append(name)


@pytest.mark.parametrize("is_logged", [False, True], ids=["amid the step", "after its line"])
def test_the_record_is_on_the_disk_before_a_checkpoint_goes_on_from_it(is_logged: bool) -> None:
    """And after the checkpoint before it, whose writing it would wait for."""
    asked: list[str] = []
    run = Run.__new__(Run)
    run.args = Namespace(async_save=True)
    run._metrics, run._ledger, run._logged = {}, None, 3 if is_logged else 2
    run._log = run._actor = Recorder(asked)  # type: ignore[assignment]
    run._ask = lambda method, *_, what: asked.append(method)  # type: ignore[method-assign]
    run._save_checkpoint(3)
    assert asked == ["prepare"] * (not is_logged) + ["finish_saves", "put_to_disk", "save", "save_model"]
