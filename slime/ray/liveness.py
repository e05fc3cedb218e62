"""Signs of life between a process and the actors it started: each side notices that the other is gone.

A process that was stopped, or hangs with its interpreter locked, breaks no connection: whoever waits for it would wait
for ever. So its owner asks every actor for a sign every few seconds, on a thread of the actor that does nothing else,
and an actor that is asked no more ends itself.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

logger = logging.getLogger(__name__)

THREADS = {"liveness": 1}
"""Concurrency groups of an actor with a `Pulse`: `ray.remote(concurrency_groups=THREADS)`."""

_MIN_INTERVAL_S, _MAX_INTERVAL_S = 0.5, 2.0
_INTERVALS_IN_LIMIT = 5
_LOADING_FACTOR = 5
"""Libraries and checkpoints on a slow disk can hold an interpreter for long: so many limits of silence are allowed."""
_TAIL_LINES = 15
_TAIL_BYTES = 64 * 1024


def interval_s(limit_s: float) -> float:
    """Seconds between two signs where silence of `limit_s` means the end."""
    return min(_MAX_INTERVAL_S, max(_MIN_INTERVAL_S, limit_s / _INTERVALS_IN_LIMIT))


class Pulse:
    """What an actor inherits to be watched, and to end when its owner is gone."""

    _asked_s = 0.0
    _forgotten: threading.Thread | None = None

    @ray.method(concurrency_group="liveness")  # type: ignore[untyped-decorator]
    def ping(self, owner: str, limit_s: float) -> tuple[int, str]:
        """The owner's question; (pid, host) of this process.

        Args:
            owner: who asks, for the log.
            limit_s: the actor ends itself when it was not asked for so long; 0 is never.
        """
        self._asked_s = time.monotonic()
        if limit_s > 0 and self._forgotten is None:
            self._forgotten = threading.Thread(target=self._end_when_forgotten, args=(owner, limit_s), daemon=True)
            self._forgotten.start()
        return os.getpid(), socket.gethostname()

    def _end_when_forgotten(self, owner: str, limit_s: float) -> None:
        pause_s = interval_s(limit_s)
        last_look_s = time.monotonic()
        while True:
            time.sleep(pause_s)
            now = time.monotonic()
            if now - last_look_s > 2 * pause_s + 1:  # this process itself was stopped: questions may be on their way
                self._asked_s = now
            last_look_s = now
            silence_s = now - self._asked_s
            if silence_s > limit_s:
                logger.error(
                    "%s has given no sign of life for %.0f s (--liveness-timeout %g): was it stopped? "
                    "This process (pid %d) ends, and with it what it started.",
                    owner, silence_s, limit_s, os.getpid(),
                )  # fmt: skip
                logging.shutdown()
                os._exit(1)


@dataclass
class _Watched:
    """One actor, and what is known of it."""

    name: str
    actor: Any
    question: Any = None
    asked_s: float = 0.0
    pid: int | None = None
    host: str = ""
    lost: str | None = None
    """How it was lost, once it is."""
    is_loading: bool = False


class Liveness:
    """Watches actors from a thread of its owner; `lost` tells which are gone and how.

    What is silent beyond the limit is killed where this host can reach it: from then on it counts as dead, and must not
    wake up into a run that goes on without it.
    """

    def __init__(self, owner: str, limit_s: float) -> None:
        """
        Args:
            owner: how actors call this process.
            limit_s: longest silence, in seconds; 0 watches for deaths alone.
        """
        self._owner, self._limit_s = owner, limit_s
        self._watched: dict[str, _Watched] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="liveness", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ask no more; actors that live on will miss it."""
        self._ended.set()

    def watch(self, name: str, actor: Any, *, is_loading: bool = False) -> None:
        """From now on; a later actor of the same name takes the place of the former.

        Asks at once, from the caller's thread: once its process runs the actor misses its owner, wherever that stops.

        Args:
            is_loading: until it is introduced it may be silent for several times the limit.
        """
        entry = _Watched(name, actor, is_loading=is_loading)
        self._ask(entry)
        with self._lock:
            self._watched[name] = entry

    def introduce(self, name: str, pid: int, host: str) -> None:
        """A watched actor has started and loaded, and this is its process: from now on its silence counts in full."""
        with self._lock:
            if (entry := self._watched.get(name)) is None:
                return
            entry.is_loading = False
            if entry.pid is None:
                entry.pid, entry.host = pid, host

    def forget(self, name: str) -> None:
        with self._lock:
            self._watched.pop(name, None)

    def lost(self) -> dict[str, str]:
        """Name -> how it was lost, of every watched actor that is gone."""
        with self._lock:
            return {entry.name: entry.lost for entry in self._watched.values() if entry.lost is not None}

    def describe(self, name: str) -> str:
        """The end of a process's log, as an error quotes it; empty where it cannot be read from here."""
        with self._lock:
            entry = self._watched.get(name)
        return "" if entry is None else _quoted_log(entry)

    def kill(self, name: str) -> None:
        """End a watched actor now, also where it is stopped."""
        with self._lock:
            entry = self._watched.get(name)
        if entry is not None:
            _kill(entry)

    def _run(self) -> None:
        pause_s = interval_s(self._limit_s or 60.0)
        last_look_s = time.monotonic()
        while not self._ended.wait(pause_s):
            now = time.monotonic()
            was_stopped = now - last_look_s > 2 * pause_s + 1
            last_look_s = now
            for entry in self._entries():
                if was_stopped:  # this process itself: the others had no time to answer
                    entry.asked_s = now
                with contextlib.suppress(RayError):
                    self._look_at(entry)

    def _entries(self) -> Iterator[_Watched]:
        with self._lock:
            entries = list(self._watched.values())
        yield from (entry for entry in entries if entry.lost is None)

    def _look_at(self, entry: _Watched) -> None:
        if entry.question is None:
            self._ask(entry)
        try:
            entry.pid, entry.host = ray.get(entry.question, timeout=0.05)
        except GetTimeoutError:
            silence_s = time.monotonic() - entry.asked_s
            is_started = entry.pid is not None  # until then, whoever starts it has a deadline of its own
            allowed_s = self._limit_s * (_LOADING_FACTOR if entry.is_loading else 1)
            if is_started and 0 < allowed_s < silence_s:
                option = f"--liveness-timeout {self._limit_s:g}"
                option += f", {_LOADING_FACTOR} times that while it loads" if entry.is_loading else ""
                self._lose(entry, f"has given no sign of life for {silence_s:.0f} s ({option}){_state(entry)}")
                _kill(entry)
        except RayError as error:  # also where Ray itself ended it, for want of memory
            self._lose(entry, f"died at {time.strftime('%H:%M:%S')}: {_first_line(error)}")
        else:
            entry.question = None

    def _ask(self, entry: _Watched) -> None:
        entry.question, entry.asked_s = entry.actor.ping.remote(self._owner, self._limit_s), time.monotonic()

    def _lose(self, entry: _Watched, how: str) -> None:
        where = "" if entry.pid is None else f" (pid {entry.pid}{_elsewhere(entry)})"
        entry.lost = f"{entry.name}{where} {how}.{_quoted_log(entry)}"
        logger.debug("lost: %s", entry.lost)


def _is_here(entry: _Watched) -> bool:
    return entry.pid is not None and entry.host == socket.gethostname()


def _elsewhere(entry: _Watched) -> str:
    return "" if _is_here(entry) else f" on {entry.host}"


def _state(entry: _Watched) -> str:
    """What the kernel says of a silent process of this host."""
    if not _is_here(entry):
        return ""
    try:
        state = Path(f"/proc/{entry.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
    words = {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "waiting for a device", "Z": "dead"}
    return f"; it is {words[state]}" if state in words else "; it runs, but does not answer"


def _kill(entry: _Watched) -> None:
    """SIGKILL by pid where that is possible: a stopped process obeys nothing else."""
    if _is_here(entry) and entry.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(entry.pid, signal.SIGKILL)
    with contextlib.suppress(RayError):
        ray.kill(entry.actor)


def _quoted_log(entry: _Watched) -> str:
    lines = _log_tail(entry)
    return f"\nLast lines of its log:\n{lines}" if lines else ""


def _log_tail(entry: _Watched) -> str:
    """The end of what an actor of this host wrote, from Ray's log of its worker process."""
    node = ray._private.worker._global_node
    if node is None or not _is_here(entry):
        return ""
    for path in Path(node.get_logs_dir_path()).glob(f"worker-*-{entry.pid}.err"):
        with contextlib.suppress(OSError), path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = log.read().decode("utf-8", "replace").splitlines()
            return "\n".join(line for line in lines if not line.startswith(":"))[-4000:] if lines else ""
    return ""


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
