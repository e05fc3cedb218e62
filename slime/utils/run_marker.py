"""The driver's side of the reaper: a marker on every process of a run, and signals that end the whole of it.

`RunMarker.start` puts a fresh `SLIME_RUN_TOKEN` into this process's environment, which all its children inherit, and
starts `slime.utils.reaper`. From then on nothing of the run survives this process by more than ten seconds.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from slime.utils import reaper

_FINISH_TIMEOUT_S = 12.0
_FINISH_POLL_S = 0.1
_KEEP_ENVIRONMENT = "SPT_NOENV"
"""Told by this, setproctitle does not write a process's title over its environment, where the marker stands: the agents
of Ray, which otherwise live on for some time when their driver is killed, would lose it."""

_pipe_of_the_reaper: int | None = None
"""Write end in this process; a forked child closes its copy, or the reaper would wait for the child too."""


_tells_signals = False
"""Whether this process is a program that a signal should end (`leaves_when_told`)."""


def _close_pipe() -> None:
    global _pipe_of_the_reaper
    if _pipe_of_the_reaper is None:
        return
    if threading.current_thread() is threading.main_thread():
        before = signal.set_wakeup_fd(-1)
        if before not in (-1, _pipe_of_the_reaper):
            signal.set_wakeup_fd(before)
    os.close(_pipe_of_the_reaper)
    _pipe_of_the_reaper = None


os.register_at_fork(after_in_child=_close_pipe)


class RunMarker:
    """The marker of one run and its reaper; one a process at a time."""

    def __init__(self, token: str, process: "subprocess.Popen[bytes]") -> None:
        self.token = token
        self._process = process

    @classmethod
    def start(cls, log_path: Path | str, grace_s: float = reaper.GRACE_S) -> Self:
        """Mark this process's future children and start the reaper.

        Args:
            log_path: where the reaper writes what it had to kill; not made when there is nothing to say.
            grace_s: for the run's processes to end by themselves once this one has ended.
        """
        global _pipe_of_the_reaper
        if _pipe_of_the_reaper is not None:
            raise RuntimeError("This process already has a run: end it (leave its `with Run(...)`) before the next.")
        token = secrets.token_hex(8)
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        script = [sys.executable, "-I", "-S", reaper.__file__]
        try:
            process = subprocess.Popen(
                [*script, str(read_end), str(os.getpid()), token, str(Path(log_path).resolve()), str(grace_s)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"TMPDIR": os.environ["TMPDIR"]} if "TMPDIR" in os.environ else {},
                pass_fds=(read_end,),
                start_new_session=True,  # a terminal's Ctrl-C must not reach it
                cwd="/",
            )
        except BaseException:
            os.close(write_end)
            raise
        finally:
            os.close(read_end)
        _pipe_of_the_reaper = write_end
        os.environ[reaper.TOKEN_VARIABLE] = token
        os.environ[_KEEP_ENVIRONMENT] = "1"
        if _tells_signals and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        return cls(token, process)

    @property
    def reaper_pid(self) -> int:
        return self._process.pid

    def leaving(self) -> None:
        """Say that this process ends its run now: what has not ended after a few seconds is killed."""
        if _pipe_of_the_reaper is not None:
            with contextlib.suppress(OSError):  # the reaper was killed: then everybody ends as without it
                os.write(_pipe_of_the_reaper, bytes([reaper.LEAVING]))

    def finish(self) -> None:
        """Return once nothing of the run is left on this machine."""
        _close_pipe()
        if os.environ.get(reaper.TOKEN_VARIABLE) == self.token:
            del os.environ[reaper.TOKEN_VARIABLE]
            os.environ.pop(_KEEP_ENVIRONMENT, None)
        deadline = time.monotonic() + _FINISH_TIMEOUT_S
        while self._process.poll() is None and time.monotonic() < deadline:
            if not (any(reaper.marked_processes(self.token)) or reaper.shared_memory_folders(self.token)):
                return  # the reaper itself may stay a little, to see this process end
            time.sleep(_FINISH_POLL_S)


def folder_prefix(purpose: str) -> str:
    """How the name of a shared-memory folder of this run begins, so that the reaper knows it as the run's."""
    token = os.environ.get(reaper.TOKEN_VARIABLE)
    return f"slime-{purpose}-{token}-" if token else f"slime-{purpose}-"


class HungUp(KeyboardInterrupt):
    """The terminal is gone (SIGHUP)."""


@contextlib.contextmanager
def leaves_when_told() -> Iterator[None]:
    """For a whole program: Ctrl-C or a closed terminal ends it within ten seconds, even where Python cannot react.

    While a run lives, the C-level signal handler writes each signal's number to the reaper, so that it is known also
    when the main thread sits in a call that does not return. A closed terminal raises `HungUp`, unless the program was
    started to survive that (nohup).
    """
    global _tells_signals
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    hang_up = signal.getsignal(signal.SIGHUP)
    if hang_up == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, _hang_up)
    _tells_signals = True
    try:
        yield
    finally:
        _tells_signals = False
        signal.signal(signal.SIGHUP, hang_up)


def _hang_up(*_: object) -> None:
    raise HungUp


@contextlib.contextmanager
def deaf_to_ctrl_c() -> Iterator[None]:
    """While inside, Ctrl-C and a closed terminal change nothing: for cleaning up, which the reaper bounds in time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
