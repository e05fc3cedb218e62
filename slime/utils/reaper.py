"""A small process beside the driver that ends what a run left behind, however the driver ended.

    python reaper.py FD DRIVER_PID TOKEN LOG GRACE_S

FD is the read end of a pipe whose only writer is the driver. When the kernel closes it, or the driver is gone, the
reaper gives the processes of the run GRACE_S seconds to end by themselves, kills with SIGKILL whatever on this machine
still carries `SLIME_RUN_TOKEN=TOKEN` in its environment (a stopped process, too), removes the run's shared-memory
folders, and ends. Bytes in the pipe ask for an end while the driver lives: the number of a signal that told it to
leave (the same grace, and then the driver itself if it still hangs), or LEAVING from a driver that cleans up itself.

Ray ends its own processes with the driver and every server has a watchdog; this is for those that cannot: a process
that is stopped, that ignores SIGTERM, that was started by a process that is gone. Nothing else is ever killed: the
marker is compared whole, the process must be this user's, and it is held by a pidfd (or its start time is compared)
between the look and the signal.

Runs as a script, by its path, with the standard library only and an empty environment: it must start in
milliseconds, import nothing of the package, and not look like a process of a run itself.
"""

import contextlib
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

TOKEN_VARIABLE = "SLIME_RUN_TOKEN"
LEAVING = 0xFF
"""Byte from a driver that has begun to end its processes; any other is the number of a signal."""

GRACE_S = 4.0
"""For the processes of a run to end by themselves."""

_DRIVER_GRACE_S = 3.0  # longer: for a driver that was told to leave by a signal
_GIVE_UP_S = 5.0  # longer: on a process that SIGKILL does not end, because the kernel is busy with it
_POLL_S = 0.2
_LEAVING_SIGNALS = (signal.SIGINT, signal.SIGHUP)  # not SIGTERM: on it a driver saves first, which takes its time
_SHARED_MEMORY = "/dev/shm"


def main(arguments: list[str]) -> None:
    """Wait for the driver's end, then see to it that nothing of its run is left."""
    descriptor, driver_pid, token, log, grace_s = arguments
    for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    run = _Run(token, Path(log), float(grace_s))
    driver = _Held(int(driver_pid))
    began_s = run.wait_for_the_end(int(descriptor), driver)
    run.end_processes(began_s)
    for folder in shared_memory_folders(token):
        shutil.rmtree(folder, ignore_errors=True)
    run.end_driver(driver)


class _Run:
    """The processes of one run, and when they have to end."""

    def __init__(self, token: str, log: Path, grace_s: float) -> None:
        self._token, self._log, self._grace_s = token, log, grace_s
        self._told_s: float | None = None
        """Since when the driver should clean up, because a signal said so."""

    def wait_for_the_end(self, pipe: int, driver: "_Held") -> float:
        """Return once the driver is gone or has closed the pipe: `time.monotonic()` of when that began."""
        leaving_s: float | None = None  # since when it cleans up by itself
        watched = [pipe, driver.pidfd] if driver.pidfd is not None else [pipe]
        while True:
            began_s = self._told_s or leaving_s
            readable, _, _ = select.select(watched, [], [], None if began_s is None else _POLL_S)
            now = time.monotonic()
            received = os.read(pipe, 4096) if pipe in readable else b""
            if driver.pidfd in readable or (pipe in readable and not received):
                return began_s or now
            if LEAVING in received:
                leaving_s = leaving_s or now
            if any(number in received for number in _LEAVING_SIGNALS):
                self._told_s = self._told_s or now
            if began_s is not None and now - began_s > self._grace_s:
                kill_marked(self._token, self._log)
            if self._is_overdue(now):
                self._kill_driver(driver, now)

    def end_driver(self, driver: "_Held") -> None:
        """A driver that a signal told to leave has nothing more to do than to end; a hanging one is made to."""
        if self._told_s is None or driver.pidfd is None:
            return
        while not select.select([driver.pidfd], [], [], _POLL_S)[0]:
            if self._is_overdue(now := time.monotonic()):
                self._kill_driver(driver, now)
                return

    def _is_overdue(self, now: float) -> bool:
        return self._told_s is not None and now - self._told_s > self._grace_s + _DRIVER_GRACE_S

    def _kill_driver(self, driver: "_Held", now: float) -> None:
        if driver.kill():
            waited_s = now - (self._told_s or now)
            _write(self._log, f"killed the driver (pid {driver.pid}), {waited_s:.1f} s after a signal to leave")

    def end_processes(self, began_s: float) -> None:
        """Wait for the marked processes to end, and kill those that have not after the grace."""
        while left := sorted(marked_processes(self._token)):
            waited_s = time.monotonic() - began_s
            if waited_s > self._grace_s:
                kill_marked(self._token, self._log)
            if waited_s > self._grace_s + _GIVE_UP_S:
                _write(self._log, f"still there after SIGKILL: {left}")
                return
            time.sleep(_POLL_S)


def marked_processes(token: str) -> Iterator[int]:
    """Pids of this user's living processes whose environment holds exactly this token; zombies have none left."""
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdecimal() and int(name) != os.getpid() and _carries(int(name), token):
            yield int(name)


def kill_marked(token: str, log: Path | None = None) -> list[int]:
    """SIGKILL to every marked process; returns their pids."""
    killed = []
    for pid in marked_processes(token):
        held = _Held(pid)
        name = _name(pid)
        if _carries(pid, token) and held.kill():  # looked at again, now that it is held
            killed.append(pid)
            if log is not None:
                _write(log, f"killed pid {pid} ({name}), which outlived its run")
        held.close()
    return killed


def shared_memory_folders(token: str) -> list[Path]:
    """Folders that the run made for handing over weights (`slime-<what for>-<token>-<random>`)."""
    parents = {_SHARED_MEMORY, tempfile.gettempdir()}
    found = [path for parent in sorted(parents) for path in Path(parent).glob(f"slime-*-{token}-*")]
    return [path for path in found if _is_own_folder(path)]


def _is_own_folder(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.getuid() and not path.is_symlink()
    except FileNotFoundError:  # another has just removed it
        return False


def _carries(pid: int, token: str) -> bool:
    try:
        if os.stat(f"/proc/{pid}").st_uid != os.getuid():
            return False
        with open(f"/proc/{pid}/environ", "rb") as environment:
            return f"{TOKEN_VARIABLE}={token}".encode() in environment.read().split(b"\0")
    except OSError:  # gone, or not ours to read
        return False


class _Held:
    """One process that cannot be mistaken for a later one with its pid."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.pidfd: int | None = None
        self._started = _start_time(pid)
        with contextlib.suppress(OSError, AttributeError):  # an old kernel, or gone
            self.pidfd = os.pidfd_open(pid)
        if self._started != _start_time(pid):
            self._started = None

    def kill(self) -> bool:
        """Whether SIGKILL was sent."""
        if self._started is None:
            return False
        with contextlib.suppress(OSError):
            if self.pidfd is not None:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
                return True
            if _start_time(self.pid) == self._started:
                os.kill(self.pid, signal.SIGKILL)
                return True
        return False

    def close(self) -> None:
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None


def _start_time(pid: int) -> str | None:
    """Clock ticks since boot at which the process began (field 22 of its stat), None if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as command:
            return command.read(200).replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except OSError:
        return "?"


def _write(log: Path, line: str) -> None:
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"[{stamp}] {line}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
