"""Where the time goes: `StepClock` divides a step into phases, `Timer` sums named stretches inside one process."""

import functools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from slime.observability.metric_names import STEP_PHASES
from slime.utils.misc import SingletonMeta

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class StepClock:
    """Divides the driver's wall time into phases that, with `other`, add up to the step.

    A phase inside another is taken out of the outer one, so no second is counted twice. One thread uses a clock.
    """

    def __init__(
        self,
        now: Callable[[], float] = time.perf_counter,
        on_change: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            now: seconds of a clock that never goes back.
            on_change: told the innermost phase whenever it changes; "other" between phases.
        """
        self._now, self._on_change = now, on_change
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._start_s = self._last_s = now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside the `with` block as `perf/<name>_time`; name is one of STEP_PHASES."""
        if name not in STEP_PHASES:
            raise ValueError(
                f"A step has no phase {name!r}; known: {', '.join(STEP_PHASES)}. "
                "A new one is added to STEP_PHASES in slime/observability/metric_names.py."
            )
        self._charge()
        self._open.append(name)
        self._tell()
        try:
            yield
        finally:
            self._charge()
            self._open.pop()
            self._tell()

    def finish(self) -> dict[str, float]:
        """Ends the step and starts the next at the same instant.

        Returns:
            `perf/<phase>_time` of every phase that was entered, `perf/other_time` and their sum `perf/step_time`, in s.
        """
        if self._open:
            raise RuntimeError(
                f"The step cannot end inside its phase {self._open[-1]!r}: leave the `with` block first."
            )
        self._charge()
        parts, whole = self._seconds, self._last_s - self._start_s
        other = parts.pop("other", 0.0)
        self._seconds, self._start_s = {}, self._last_s
        return {f"perf/{name}_time": seconds for name, seconds in parts.items()} | {
            "perf/other_time": other,
            "perf/step_time": whole,
        }

    @property
    def current(self) -> str:
        """The innermost open phase, or "other"."""
        return self._open[-1] if self._open else "other"

    def _tell(self) -> None:
        if self._on_change is not None:
            self._on_change(self.current)

    def _charge(self) -> None:
        """Counts the time since the last change towards the innermost open phase."""
        name, now = self.current, self._now()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last_s
        self._last_s = now


class Timer(metaclass=SingletonMeta):
    """Sums the seconds of named stretches in this process; a stretch that is timed again adds up.

    Attributes:
        timers: seconds by name since the last `reset`.
        seq_lens: lengths of the sequences trained in this step, which the trainer sets to turn seconds into speeds.
    """

    def __init__(self) -> None:
        self.timers: dict[str, float] = {}
        self.start_time: dict[str, float] = {}
        self.seq_lens: list[int] = []

    def start(self, name: str) -> None:
        if name in self.start_time:
            raise RuntimeError(f"Timer {name!r} is running already: call end({name!r}) before starting it again.")
        self.start_time[name] = time.perf_counter()

    def end(self, name: str) -> None:
        if name not in self.start_time:
            raise RuntimeError(f"Timer {name!r} is not running; running: {', '.join(self.start_time) or 'none'}.")
        self.add(name, time.perf_counter() - self.start_time.pop(name))

    def add(self, name: str, elapsed_time: float) -> None:
        self.timers[name] = self.timers.get(name, 0.0) + elapsed_time

    def reset(self, name: str | None = None) -> None:
        """Forgets one timer, or all; what is running goes on."""
        if name is None:
            self.timers = {}
        else:
            self.timers.pop(name, None)

    def log_dict(self) -> dict[str, float]:
        """Seconds by name, a copy."""
        return dict(self.timers)

    @contextmanager
    def context(self, name: str) -> Iterator[None]:
        self.start(name)
        try:
            yield
        finally:
            self.end(name)


def timer(name_or_function: Any) -> Any:
    """`with timer("train"):` times a block; `@timer` times a function under its own name."""
    if isinstance(name_or_function, str):
        return Timer().context(name_or_function)

    @functools.wraps(name_or_function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with Timer().context(name_or_function.__name__):
            return name_or_function(*args, **kwargs)

    return timed


@contextmanager
def inverse_timer(name: str) -> Iterator[None]:
    """Stops the running timer `name` inside the block and starts it again after."""
    Timer().end(name)
    try:
        yield
    finally:
        Timer().start(name)


def with_defer(deferred: Callable[[], Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that calls `deferred` when the function has returned or raised."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            finally:
                deferred()

        return wrapper

    return decorate
