"""Draw how far the rollout manager is, where there is a terminal to draw on."""

import sys
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import GetTimeoutError
from tqdm import tqdm

_ASK_TIMEOUT_S = 1.0


class ProgressBar:
    """A bar that follows the manager's `progress()`; call `draw` now and then. Nothing without a terminal."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._bar: tqdm[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def draw(self) -> None:
        """Ask how far it is and show it."""
        if not sys.stderr.isatty():
            return
        try:
            progress = ray.get(self._manager.progress.remote(), timeout=_ASK_TIMEOUT_S)
        except GetTimeoutError:
            return
        if progress is None:
            return
        what, done, total, unit = progress
        if self._bar is None:
            self._bar = tqdm(total=total, unit=unit, leave=False, file=sys.stderr)
        self._bar.set_description(what, refresh=False)
        self._bar.total, self._bar.n = total, done
        self._bar.refresh()
