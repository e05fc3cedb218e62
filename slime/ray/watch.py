"""While the rollout manager works: draw how far it is, and notice an engine or router that has died."""

import sys
import time
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import GetTimeoutError
from tqdm import tqdm

from slime.ray.waiting import RemoteError

_ASK_TIMEOUT_S = 1.0
_CHECK_TIMEOUT_S = 30.0
_CHECK_INTERVAL_S = 5.0


class Watch:
    """Call `look` about once a second while waiting. The bar is drawn only on a terminal."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._checked_s = time.monotonic()
        self._bar: tqdm[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def look(self) -> None:
        """Draw the bar; every few seconds ask whether all servers are alive.

        Raises:
            RemoteError: one is not; names it and ends with its last log lines.
        """
        self._draw()
        if time.monotonic() - self._checked_s > _CHECK_INTERVAL_S:
            self._checked_s = time.monotonic()
            self._check()

    def _check(self) -> None:
        try:
            dead = ray.get(self._manager.dead_servers.remote(), timeout=_CHECK_TIMEOUT_S)
        except GetTimeoutError:
            return  # busy; it is asked again
        if dead:
            raise RemoteError("\n".join(dead))

    def _draw(self) -> None:
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
