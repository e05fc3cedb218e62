"""While the driver waits: draw how far the rollout is, and notice whatever makes the wait pointless."""

import contextlib
import sys
from typing import Any

import ray
from ray.exceptions import RayError
from tqdm import tqdm

from slime.observability.timer import StepClock
from slime.ray.leaving import Leaving
from slime.ray.liveness import Liveness
from slime.ray.repair import Repairs
from slime.ray.waiting import RemoteError

_ASK_TIMEOUT_S = 1.0
_SERVING = ("generate", "wait_for_rollout", "eval")
"""Phases that need engines and router, and that can be left at any moment."""
_SYNCING = "sync"
"""The phase in which a lost engine shows by itself: the sync fails."""


class Watch:
    """`look` is what every wait of the driver calls twice a second."""

    def __init__(self, clock: StepClock, liveness: Liveness, leaving: Leaving) -> None:
        self._clock, self._liveness, self._leaving = clock, liveness, leaving
        self.repairs: Repairs | None = None
        """None until engines run, and where there are none."""
        self.manager: Any = None
        """Asked for its progress, once it is there."""
        self._bar: tqdm[None] | None = None

    def look(self) -> None:
        """
        Raises:
            RemoteError: a process is lost that nothing replaces; names it, with its last log lines.
            Preempted: SIGTERM came in a phase that can be left.
        """
        if lost := self._liveness.lost():
            raise RemoteError("; ".join(lost.values()))
        phase = self._clock.current
        if phase in _SERVING:
            self._leaving.raise_if_asked()
            self._draw()
        if self.repairs is None:
            return
        if phase in _SERVING:
            self.repairs.look()
        elif phase != _SYNCING:
            self.repairs.look_only()

    def close_bar(self) -> None:
        """The rollout is there."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _draw(self) -> None:
        if self.manager is None or not sys.stderr.isatty():
            return
        progress = None
        with contextlib.suppress(RayError):  # busy, or lost: others tell
            progress = ray.get(self.manager.progress.remote(), timeout=_ASK_TIMEOUT_S)
        if progress is None:
            return
        what, done, total, unit = progress
        if self._bar is None:
            self._bar = tqdm(total=total, unit=unit, leave=False, file=sys.stderr)
        self._bar.set_description(what, refresh=False)
        self._bar.total, self._bar.n = total, done
        self._bar.refresh()
