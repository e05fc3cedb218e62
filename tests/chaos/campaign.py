"""A run under attack: start it, signal its processes by plan, see what becomes of it, start it again, to its end."""

import re
import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from slime.observability.run_log import read_metrics
from tests.chaos.attacks import GRADING_CHILD, RECOVERING, START, Attack, rollouts_needed
from tests.chaos.processes import Driver, Status, is_actor, is_gone, log_of_worker, send, ticks
from tests.chaos.tiny_run import NAMES, TinyRun

_WATCH_S = 0.005
_IDLE_S = 0.05
_USUAL_START_S = 25.0
_NAME = "|".join(sorted(map(re.escape, (*NAMES, GRADING_CHILD)), key=len, reverse=True))
_KNOWN = re.compile(_NAME)
_ACCUSED = re.compile(
    rf"({_NAME})(?: \([^)]*\))? "
    r"(?:died|has given no sign|was killed|ended(?! with its owner)|did not answer|was lost)"
)
_FAILED = re.compile(rf"({_NAME}) failed")
"""A process that an error says to be the cause: one that is gone before one that only failed; others waited."""
_FORGOTTEN = "the driver has given no sign of life"


@dataclass(frozen=True)
class Limits:
    """How long is too long, in seconds."""

    start: float = 300.0
    phase: float = 180.0
    """Until a phase that an attack waits for comes."""
    recover: float = 120.0
    """From the signal to a run that goes on."""
    end: float = 60.0
    """From the signal to the end of the driver."""
    leave: float = 10.0
    """From the end of the driver to the end of the last process of its run."""


@dataclass
class Outcome:
    """What one attack did."""

    attack: Attack
    phase: str
    """Seen when the signal was sent."""
    rollout_id: int | None
    kind: Literal["recovered", "ended", "lost"]
    """`lost`: neither within the limit."""
    seconds: float
    """From the signal until the run went on with a new process, or until the driver had ended."""
    message: str = ""
    """The error that ended the run, or the first line that names the process."""
    problems: list[str] = field(default_factory=list)


@dataclass
class Campaign:
    """All attacks on one run folder.

    Args:
        usual_s: phase -> how long it takes undisturbed.
        say: gets a line an event.
    """

    run: TinyRun
    attacks: Sequence[Attack]
    usual_s: Mapping[str, float]
    limits: Limits = Limits()
    say: Callable[[str], None] = print
    outcomes: list[Outcome] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Of the run as a whole."""

    def carry_out(self) -> None:
        """Start the run again and again until it ends by itself; what went wrong is in `problems` and `outcomes`."""
        self._waiting = list(self.attacks)
        starts = 0
        while starts <= 2 * len(self.attacks):
            with Driver(self.run.command(), self.run.folder, self._output(starts)) as driver:
                self.say(f"start {starts}: pid {driver.pid}")
                goes_on = self._one_start(driver)
            starts += 1
            if not goes_on:
                return
        self.problems.append(f"{starts} starts and still not at its end")

    def _output(self, start: int) -> Path:
        folder = self.run.folder.parent / f"{self.run.folder.name}-output"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"start_{start:03d}.txt"

    def _one_start(self, driver: Driver) -> bool:
        """Attack this start until it ends; whether another start has to follow.

        A run that goes on for long without a stopped process may be over before the last attack: then it is extended.
        """
        while True:
            attack = self._next(driver)
            status = self._moment(driver, attack)
            if status is None:
                return self._ended_by_itself(driver)
            assert attack is not None
            self._waiting.remove(attack)
            outcome = self._strike(driver, attack, status)
            self.outcomes.append(outcome)
            self.say(describe(outcome))
            if outcome.kind != "recovered":
                return True

    def _next(self, driver: Driver) -> Attack | None:
        """The next one of the plan that can come now: one on the start only while the run starts."""
        is_starting = is_start(driver.status())
        for attack in self._waiting:
            if is_starting or attack.phase != START:
                return attack
        return None

    def _moment(self, driver: Driver, attack: Attack | None) -> Status | None:
        """Wait for the attack's moment; what the run does then, or None when the driver has ended before.

        A phase that was over before its moment came is waited for again, and hit earlier in it.
        """
        fraction = 1.0 if attack is None else attack.fraction
        deadline = time.monotonic() + self.limits.start + self.limits.phase
        seen: Status | None = None
        while driver.process.poll() is None:
            driver.family.look(every_s=0.5)
            status = driver.status()
            if attack is not None and attack.phase == START:
                usual_s = self.usual_s.get(START, _USUAL_START_S)
                if time.time() - driver.started_s > fraction * usual_s and driver.pid_of(attack.target):
                    return status or Status(START, None, driver.started_s, {})
            elif attack is not None and status is not None and is_due(attack, status):
                moment_s = status.since + fraction * self.usual_s.get(attack.phase, 0.1)
                if time.time() >= moment_s and driver.pid_of(attack.target):
                    return status
                seen = status
            elif seen is not None:
                seen, fraction = None, fraction / 2
            if time.monotonic() > deadline:
                driver.family.end()
                self.problems.append(f"{attack}: its moment did not come; last seen {status}")
            time.sleep(_WATCH_S if seen is not None else 2 * _WATCH_S)
        return None

    def _ended_by_itself(self, driver: Driver) -> bool:
        code = driver.process.wait()
        if code != 0:
            self.problems.append(f"the run ended with {code} though nobody was attacked: {error_of(driver.text())}")
        self._check_left(driver, self.problems)
        if code != 0 or not self._waiting:
            return False
        self.run = replace(self.run, num_rollout=self.run.num_rollout + rollouts_needed(self._waiting, first=0))
        self.say(f"{len(self._waiting)} attacks are left: the run is extended to {self.run.num_rollout} rollouts")
        return True

    # ---- one attack ----

    def _strike(self, driver: Driver, attack: Attack, status: Status) -> Outcome:
        pid = driver.pid_of(attack.target)
        driver.family.look()
        written = len(driver.text())
        now = driver.status() or status
        struck_s = time.monotonic()
        outcome = Outcome(attack, now.phase, now.rollout_id, "lost", 0.0)
        if pid is None or not send(pid, attack.signal):
            outcome.problems.append("was gone before the signal was sent")
        if attack.target == "driver" and attack.signal == signal.SIGSTOP:
            self._others_end_without_the_driver(driver, outcome, now)
        else:
            self._watch(driver, outcome, pid, now)
        outcome.seconds = time.monotonic() - struck_s
        if outcome.kind == "lost":
            outcome.problems.append(f"neither ended nor went on within {outcome.seconds:.0f} s")
            driver.family.end()
            driver.process.wait()
        if outcome.kind == "ended":
            self._judge_end(driver, outcome)
        elif outcome.kind == "recovered":
            self._judge_recovery(driver, outcome, written)
        return outcome

    def _watch(self, driver: Driver, outcome: Outcome, pid: int | None, before: Status) -> None:
        """Until the driver has ended, or a new process has the old one's name and the run has moved on."""
        target = outcome.attack.target
        can_recover = target in RECOVERING or target.startswith("owner")
        replaced_at: Status | None = None
        limit_s = self.limits.recover if can_recover else self.limits.end
        if outcome.attack.signal == signal.SIGSTOP:  # nothing shows until the deadline of those who wait for it
            limit_s += self.run.liveness_timeout_s
        for _ in ticks(_IDLE_S, limit_s):
            if driver.process.poll() is not None:
                outcome.kind = "ended"
                return
            driver.family.look(every_s=0.5)
            status = driver.status()
            if pid is None or status is None or is_start(status) or not is_gone(pid):
                continue
            if replaced_at is None and driver.pid_of(target) not in (None, pid):
                replaced_at = status
            if replaced_at is not None and status.moment not in (replaced_at.moment, before.moment):
                outcome.kind = "recovered"
                return

    def _others_end_without_the_driver(self, driver: Driver, outcome: Outcome, before: Status) -> None:
        """A stopped driver can end nobody: the others must do it themselves; continued, it ends with an error.

        The processes of Ray, which belong to the driver, wait for it.
        """
        others = {name: pid for name, pid in before.pids.items() if name != "driver"}
        left = others
        for _ in ticks(_IDLE_S, self.run.liveness_timeout_s + self.limits.end):
            if not (left := {name: pid for name, pid in left.items() if not is_gone(pid)}):
                break
        if left:
            outcome.problems.append(f"did not end without their driver: {sorted(left)}")
        silent = [name for name, pid in others.items() if is_actor(name) and _FORGOTTEN not in log_of_worker(pid)]
        if silent:
            outcome.problems.append(f"ended without saying why in their logs: {silent}")
        send(driver.pid, signal.SIGCONT)
        for _ in ticks(_IDLE_S, self.limits.end):
            if driver.process.poll() is not None:
                outcome.kind = "ended"
                return

    def _judge_end(self, driver: Driver, outcome: Outcome) -> None:
        attack, code = outcome.attack, driver.process.wait()
        if attack.target in RECOVERING and self.run.is_fault_tolerant and attack.phase != START:
            outcome.problems.append("ended the run, which had to go on")
        self._check_left(driver, outcome.problems)
        if attack.target == "driver" and attack.signal == signal.SIGKILL:
            return
        outcome.message = error_of(driver.text())
        if code in (0, -signal.SIGKILL):
            outcome.problems.append(f"the driver ended with {code}")
        if attack.target != "driver" and not names(outcome.message, attack):
            outcome.problems.append(f"does not blame {attack.target}")

    def _judge_recovery(self, driver: Driver, outcome: Outcome, written: int) -> None:
        target = outcome.attack.target
        if target not in RECOVERING and not target.startswith("owner"):
            outcome.problems.append("the run went on without it")
        if not self.run.is_fault_tolerant and target != GRADING_CHILD:
            outcome.problems.append("the run went on without --use-fault-tolerance")
        lines = [line for line in driver.text()[written:].splitlines() if "WARNING" in line or "ERROR" in line]
        outcome.message = next((line for line in lines if names(line, outcome.attack)), "")
        if not outcome.message:
            outcome.problems.append(f"no warning says that {target} was lost")

    def _check_left(self, driver: Driver, problems: list[str]) -> None:
        left = driver.family.wait_for_end(self.limits.leave)
        if left:
            problems.append(f"still there {self.limits.leave:.0f} s after the driver: {sorted(left.values())}")


def is_start(status: Status | None) -> bool:
    return status is None or not status.pids


def is_due(attack: Attack, status: Status) -> bool:
    return status.phase == attack.phase and status.rollout_id is not None and status.rollout_id >= attack.rollout


def error_of(text: str) -> str:
    """What the run said at its end: its error line and what follows, or the last lines where there is none."""
    head, found, error = text.rpartition("train.py: error: ")
    return error.strip() if found else "\n".join(head.splitlines()[-12:] or text.splitlines()[-12:])


def names(message: str, attack: Attack) -> bool:
    """Whether the first process that the message blames is the attacked one (one of its kind, in the phase start).

    Where it blames nobody in words that are known here, the first process that it names counts.
    """
    blamed = _ACCUSED.search(message) or _FAILED.search(message)
    found = blamed[1] if blamed else (known[0] if (known := _KNOWN.search(message)) else None)
    if found is not None and attack.phase == START:
        return found.rstrip(" 01") == attack.target.rstrip(" 01")
    return found == attack.target


def describe(outcome: Outcome) -> str:
    attack = outcome.attack
    where = outcome.phase if outcome.rollout_id is None else f"{outcome.phase} of rollout {outcome.rollout_id}"
    text = (
        f"{attack.number}: {attack.signal.name} to {attack.target} in {where}: {outcome.kind}, {outcome.seconds:.1f} s"
    )
    if outcome.message:
        text += f"\n    {outcome.message.splitlines()[0][:300]}"
    return text + "".join(f"\n    PROBLEM: {problem}" for problem in outcome.problems)


def usual_times(run_folder: Path) -> dict[str, float]:
    """Median duration of each phase of a finished run, in seconds; a median start takes what it took before step 0."""
    lines = read_metrics(run_folder)
    usual = {}
    for phase in ("generate", "train", "sync", "save", "eval"):
        times = [line[f"perf/{phase}_time"] for line in lines[1:] if line.get(f"perf/{phase}_time")]
        if times:
            usual[phase] = statistics.median(times)
    if lines and lines[0]["step"] < 0:
        usual[START] = lines[0]["perf/step_time"]
    return usual
