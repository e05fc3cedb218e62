"""SIGTERM, as schedulers send it before they take a machine away: save where the run stands, and leave."""

import logging
import signal
import threading
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)


class Preempted(Exception):
    """The run was asked to leave; raised where it can be left with nothing lost but a rollout in the making."""


class Leaving:
    """Notes SIGTERM; the run asks between its waits. A second SIGTERM ends the process as it would without slime."""

    def __init__(self) -> None:
        self.is_asked = False
        self._previous: Any = None
        self._is_installed = False

    def install(self) -> None:
        """Take the signal over, where this thread may."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._note)
            self._is_installed = True

    def restore(self) -> None:
        """Give the signal back."""
        if self._is_installed:
            signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)
            self._is_installed = False

    def raise_if_asked(self) -> None:
        """
        Raises:
            Preempted: SIGTERM came.
        """
        if self.is_asked:
            raise Preempted("SIGTERM")

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True
        signal.signal(number, signal.SIG_DFL)
        logger.warning("SIGTERM: the run saves and leaves; a second one ends it at once")
