"""What a run's processes are and do, seen from outside: its status file, its family of processes, what it leaves."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from slime.observability.run_status import STATUS_FILE
from tests.chaos.attacks import GRADING_CHILD
from tests.chaos.tiny_run import ROOT


@dataclass(frozen=True)
class Status:
    """status.json of a driver that runs now."""

    phase: str
    rollout_id: int | None
    since: float
    pids: dict[str, int]

    @property
    def moment(self) -> tuple[str, int | None, float]:
        return self.phase, self.rollout_id, self.since


class Driver:
    """One start of the command line: `train.py` in a session of its own, its output in a file."""

    def __init__(self, command: list[str], run_folder: Path, output: Path) -> None:
        self.output = output
        self._status_path = run_folder / STATUS_FILE
        self._seen: tuple[int, int] | None = None
        self._status: Status | None = None
        self.started_s = time.time()
        with output.open("wb") as stream:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "400"},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.family = Family(self.process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.family.look()
        self.family.end()
        self.process.wait()

    @property
    def pid(self) -> int:
        return self.process.pid

    def text(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")

    def status(self) -> Status | None:
        """None until this driver has written one: an older file is the one before's."""
        try:
            facts = self._status_path.stat()
        except FileNotFoundError:
            return None
        if self._seen != (seen := (facts.st_ino, facts.st_mtime_ns)):
            status = parse_status(self._status_path.read_text(encoding="utf-8"))
            self._status = status if status.since > self.started_s else None
            self._seen = seen
        return self._status

    def pid_of(self, target: str) -> int | None:
        """Of a process as it stands in status.json, or of a grading child, which does not; None when it is gone.

        While a run starts status.json names nobody: then it is any process of that kind.
        """
        if target == "driver":
            return self.pid
        pids = status.pids if (status := self.status()) is not None else {}
        if target == GRADING_CHILD:
            return grading_child(pids.get("rollout manager"))
        pid = pids.get(target) if pids else self.family.find(_TITLES[target.rstrip(" 0123456789")])
        return None if pid is None or is_gone(pid) else pid


_TITLES = {
    "rollout manager": "ray::RolloutController",
    "actor rank": "ray::TrainRayActor",
    "owner of engine": "ray::EngineActor",
    "engine": "slime.backends.embedded.server",
    "router": "sglang::router",
}
"""What the title of a process of that kind begins with, or has in it."""


def parse_status(text: str) -> Status:
    facts: dict[str, Any] = json.loads(text)
    pids = {process["name"]: int(process["pid"]) for process in facts["processes"]}
    return Status(facts["phase"], facts["rollout_id"], float(facts["since"]), pids)


def is_actor(name: str) -> bool:
    """Whether a process of that name in status.json is an actor whose owner is the driver."""
    return name.startswith("actor rank") or name == "rollout manager"


def log_of_worker(pid: int) -> str:
    """What a Ray worker of this machine wrote to standard error, from Ray's own folder."""
    logs = Path(tempfile.gettempdir()).glob(f"ray/session_*/logs/worker-*-{pid}.err")
    return "".join(log.read_text(encoding="utf-8", errors="replace") for log in logs)


def grading_child(manager: int | None) -> int | None:
    """The child of the rollout manager that grades answers."""
    if manager is None:
        return None
    with contextlib.suppress(psutil.Error):
        for child in sorted(psutil.Process(manager).children(), key=lambda child: -child.create_time()):
            with contextlib.suppress(psutil.Error):
                if any("grading_child" in word for word in child.cmdline()):
                    return child.pid
    return None


class Family:
    """All processes that a driver was ever seen to have below it; a pid that is used again does not count."""

    def __init__(self, driver: int) -> None:
        self._driver = psutil.Process(driver)
        self._seen: dict[psutil.Process, str] = {}
        self._looked_s = 0.0

    def look(self, *, every_s: float = 0.0) -> None:
        """Note who is there now; does nothing where it was done within `every_s`."""
        if time.monotonic() - self._looked_s < every_s:
            return
        self._looked_s = time.monotonic()
        with contextlib.suppress(psutil.Error):
            for process in self._driver.children(recursive=True):
                if process not in self._seen:
                    self._seen[process] = words_of(process)

    def find(self, title: str) -> int | None:
        """A process of the family that has this in its title and is no watchdog of another."""
        self.look()
        for process in self.alive():
            words = words_of(process)
            if title in words and "watchdog.py" not in words:
                return process.pid
        return None

    def alive(self) -> dict[psutil.Process, str]:
        """Those that have not ended, with their command lines; the driver is not among them."""
        return {process: words for process, words in self._seen.items() if is_alive(process)}

    def wait_for_end(self, timeout_s: float) -> dict[psutil.Process, str]:
        """Who is still alive after `timeout_s`; returns as soon as nobody is."""
        deadline = time.monotonic() + timeout_s
        while (alive := self.alive()) and time.monotonic() < deadline:
            self._look_below(alive)
            time.sleep(0.1)
        return alive

    def end(self) -> None:
        """SIGKILL to the driver and all others, stopped ones too."""
        for process in [self._driver, *self.alive()]:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _look_below(self, alive: dict[psutil.Process, str]) -> None:
        for process in alive:
            with contextlib.suppress(psutil.Error):
                self._seen.update({child: words_of(child) for child in process.children() if child not in self._seen})


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def words_of(process: psutil.Process) -> str:
    """Its command line, shortened; its name where it has none."""
    try:
        return " ".join(process.cmdline())[:160] or process.name()
    except psutil.Error:
        return "?"


def is_gone(pid: int) -> bool:
    try:
        return not is_alive(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return True


def send(pid: int, number: signal.Signals) -> bool:
    """Whether it was there to get the signal."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def ticks(interval_s: float, timeout_s: float) -> Iterator[float]:
    """Seconds since the first tick, every `interval_s`, until `timeout_s` have passed."""
    started = time.monotonic()
    while (passed := time.monotonic() - started) < timeout_s:
        yield passed
        time.sleep(interval_s)
