"""Runs a command and reports the CPU time of every process that came out of it, daemons included.

`time` counts only processes that somebody waited for. Ray's daemons start workers without waiting for them, so their
time would be missing. This wrapper becomes the parent of whatever loses its own parent (a "subreaper"), looks at the
whole family once a second, and adds up what each member used itself. What a process used in its last second is
missing where neither its parent nor this wrapper waited for it; nothing is counted twice.

    python scripts/cpu_time.py --write cost.json -- python train.py ...

Linux only. The exit code is the command's; processes that outlive it by ten seconds are named and ended.
"""

import argparse
import ctypes
import itertools
import json
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

PR_SET_CHILD_SUBREAPER = 36
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
SAMPLE_INTERVAL_S = 1.0
GRACE_S = 10.0


@dataclass
class Process:
    """One process as last seen; times in seconds."""

    pid: int
    parent: int
    started: int
    name: str
    own_s: float
    children_s: float
    """Time of the children that it waited for, theirs included."""
    is_alive: bool = True


class Family:
    """All descendants of this process, past and present."""

    def __init__(self) -> None:
        self.root = os.getpid()
        self.members: dict[tuple[int, int], Process] = {}

    def look(self) -> list[Process]:
        """Update every member from /proc; returns those that live now (zombies do not)."""
        seen = {process.pid: process for process in read_processes()}
        alive: list[Process] = []
        keys = set()
        for process in seen.values():
            if not self._descends(process, seen):
                continue
            key = (process.pid, process.started)
            keys.add(key)
            known = self.members.get(key)
            process.name = describe(process) or (known.name if known else process.name)
            self.members[key] = process
            if process.is_alive:
                alive.append(process)
        for key, process in self.members.items():
            process.is_alive = process.is_alive and key in keys
        return alive

    def _descends(self, process: Process, seen: dict[int, Process]) -> bool:
        while process.parent in seen and process.parent != self.root:
            process = seen[process.parent]
        return process.parent == self.root

    def total_s(self) -> float:
        """CPU time of all members.

        A parent that waits for its children knows their time exactly, also of those too short to be seen here; one
        that does not knows nothing. So each generation counts as the larger of what its parent knows and what was
        seen.
        """
        children: dict[int, list[Process]] = defaultdict(list)
        for process in self.members.values():
            children[process.parent].append(process)

        def cost(process: Process) -> float:
            ended = sum(cost(child) for child in children[process.pid] if not child.is_alive)
            running = sum(cost(child) for child in children[process.pid] if child.is_alive)
            return process.own_s + max(process.children_s, ended) + running

        return sum(cost(process) for process in children[self.root])

    def by_name_s(self) -> dict[str, float]:
        """CPU time by process name, the most expensive first; `unseen` are processes too short to be looked at."""
        times: dict[str, float] = defaultdict(float)
        for process in self.members.values():
            times[process.name] += process.own_s
        times["unseen"] = max(0.0, self.total_s() - sum(times.values()))
        return {name: round(s, 1) for name, s in sorted(times.items(), key=lambda item: -item[1])}


def read_processes() -> list[Process]:
    """Every process of the machine that can be read, with its kernel name."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                found.append(parse_stat(Path(f"/proc/{entry}/stat").read_text()))
            except OSError:
                continue  # it ended meanwhile
    return found


def parse_stat(text: str) -> Process:
    """One line of /proc/PID/stat (proc(5)); the name stands in parentheses and may hold spaces and parentheses."""
    pid, rest = text.split(" (", 1)
    name, rest = rest.rsplit(") ", 1)
    fields = rest.split()
    user, system, children_user, children_system = (int(value) / TICKS_PER_S for value in fields[11:15])
    return Process(
        pid=int(pid),
        parent=int(fields[1]),
        started=int(fields[19]),
        name=name,
        own_s=user + system,
        children_s=children_user + children_system,
        is_alive=fields[0] not in "ZX",
    )


def describe(process: Process) -> str:
    """What people call the process: Ray's title, or a Python program's module or script; "" when it has ended."""
    try:
        words = Path(f"/proc/{process.pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    if not words[0]:
        return ""
    if words[0].startswith("ray::"):
        return words[0].split(".")[0].split("(")[0]
    program = Path(words[0].split()[0]).name
    if not program.startswith("python"):
        return program
    for flag, word in itertools.pairwise(words):
        if flag == "-m":
            return word
        if not word.startswith("-"):
            return Path(word).name
    return program


def one_interval(family: Family) -> None:
    """What `run` does between two looks, unless told otherwise."""
    time.sleep(SAMPLE_INTERVAL_S)


def run(command: list[str], pause: Callable[[Family], None] = one_interval) -> tuple[int, Family]:
    """Run the command to its end, and what it left behind; returns its exit code and the family.

    Between two looks at the family `pause` is called with it: it should take about a second, and may look more often.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed: this needs Linux")
    family = Family()
    child = os.posix_spawnp(command[0], command, os.environ)

    def forward(number: int, _: FrameType | None) -> None:
        os.kill(child, number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches the command by itself
    signal.signal(signal.SIGTERM, forward)
    code = None
    while code is None:
        pause(family)
        family.look()
        code = reap(child)
    end_the_rest(family)
    return code, family


def reap(child: int) -> int | None:
    """Collect all that have ended; returns the command's exit code if it is among them."""
    code = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if pid == 0:
            return code
        if pid == child:
            ended = os.waitstatus_to_exitcode(status)
            code = ended if ended >= 0 else 128 - ended


def end_the_rest(family: Family) -> None:
    deadline = time.monotonic() + GRACE_S
    while (left := family.look()) and time.monotonic() < deadline:
        reap(0)
        time.sleep(0.2)
    for number in (signal.SIGTERM, signal.SIGKILL) if left else ():
        print(
            f"cpu_time: still running after the command: {', '.join(p.name for p in left)}; {number.name}", flush=True
        )
        for process in left:
            try:
                os.kill(process.pid, number)
            except ProcessLookupError:
                continue
        time.sleep(2)
        left = family.look()
        reap(0)
        if not left:
            return


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a command and count the CPU time of its whole process tree.")
    parser.add_argument("--write", type=Path, help="JSON file for {wall_s, cpu_s, by_name_s}")
    parser.add_argument("command", nargs="+", help="the command and its arguments, after --")
    args = parser.parse_args()
    began = time.monotonic()
    code, family = run(args.command)
    cost = {
        "wall_s": round(time.monotonic() - began, 1),
        "cpu_s": round(family.total_s(), 1),
        "by_name_s": family.by_name_s(),
    }
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(json.dumps(cost, indent=2) + "\n")
    else:
        print(json.dumps(cost, indent=2), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
