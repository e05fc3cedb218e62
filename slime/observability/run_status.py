"""What a run is doing now, as a small file beside its metrics: its phase, and which processes do it.

Tools that watch a run, tests, and a person with `cat` read `<run_dir>/status.json`; slime itself never does.
"""

import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

STATUS_FILE = "status.json"

Role = Literal["driver", "manager", "trainer", "engine", "router", "owner"]


@dataclass(frozen=True)
class ProcessInfo:
    """One process of a run."""

    name: str
    """As errors call it: "actor rank 0", "engine 1", "router", "rollout manager", "owner of engine 1", "driver"."""
    role: Role
    pid: int
    """Of the process that does the work: for a server the server itself, not what watches over it."""
    host: str = field(default_factory=socket.gethostname)


class RunStatus:
    """Rewrites the file at every change, whole: a reader never sees half of it."""

    def __init__(self, run_dir: Path | str) -> None:
        self._path = Path(run_dir) / STATUS_FILE
        self._phase, self._since = "start", time.time()
        self._rollout_id: int | None = None
        self._processes: list[ProcessInfo] = []
        self._write()

    def phase(self, name: str) -> None:
        """The run has begun to do `name` (a phase of the step's clock, "start", or "done")."""
        if name != self._phase:
            self._phase, self._since = name, time.time()
            self._write()

    def rollout(self, rollout_id: int | None) -> None:
        """Which rollout the phases from now on belong to."""
        if rollout_id != self._rollout_id:
            self._rollout_id = rollout_id
            self._write()

    def processes(self, processes: Sequence[ProcessInfo]) -> None:
        """All processes of the run, the driver included."""
        self._processes = list(processes)
        self._write()

    def _write(self) -> None:
        status = {
            "phase": self._phase,
            "rollout_id": self._rollout_id,
            "since": round(self._since, 3),
            "processes": [asdict(process) for process in self._processes],
        }
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(status, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self._path)
