"""Asks other processes to grade what may take for ever: SymPy, Math-Verify and reasoning-gym's verifiers.

A worker process is started when it is first needed, answers one question at a time and is killed by the kernel when
a question takes more than its CPU seconds or memory; the next question then gets a new one. A worker that is killed or
stopped from outside says nothing about the answer: the question is asked again. Questions may come from any thread.
"""

import atexit
import contextlib
import json
import logging
import os
import queue
import select
import signal
import subprocess
import sys
import threading
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

CPU_LIMIT_S = 5.0
WALL_LIMIT_S = 120.0
MEMORY_LIMIT_BYTES = 4 << 30
MAX_LOST_WORKERS = 3
"""So many workers may be lost over one question; then it counts as too much after all."""
NUM_WORKERS = max(1, min(4, (os.cpu_count() or 1) // 2))


class GradingError(RuntimeError):
    """A worker could not even try: a package is missing, or the question itself was wrong."""


@lru_cache(maxsize=20_000)
def sympy_equal(given: str, truth: str) -> bool | None:
    """Whether SymPy simplifies the difference of two plain-text expressions to zero; None: unreadable or too long."""
    return _ask("sympy_equal", given, truth)  # type: ignore[no-any-return]


@lru_cache(maxsize=20_000)
def math_verify_equal(given: str, truth: str) -> bool | None:
    """Whether Math-Verify finds two LaTeX answers equal; None: unreadable or too long."""
    return _ask("math_verify_equal", given, truth)  # type: ignore[no-any-return]


def reasoning_gym_score(task: str, answer: str, entry: dict[str, Any]) -> float:
    """The score that a reasoning-gym task gives an answer, 0 to 1; 0 if its verifier takes too long.

    Raises:
        GradingError: reasoning-gym is missing, the task is unknown, or its verifier fails on the entry.
    """
    score = _ask("reasoning_gym_score", task, answer, entry)
    return 0.0 if score is None else float(score)


def warm_up(*questions: tuple[Any, ...]) -> None:
    """Start all workers now, and have each import what grading will need, while the caller does something else.

    To be called before anything is graded.

    A package that is missing, or a task that is not known, is told when the first answer is graded.

    Args:
        questions: (name of a function above, the arguments that its imports depend on).
    """
    for worker in [_take() for _ in range(NUM_WORKERS)]:
        threading.Thread(target=_warm_up_one, args=(worker, *questions), name="warm-up", daemon=True).start()


def _warm_up_one(worker: "_Worker", *questions: tuple[Any, ...]) -> None:
    try:
        for function, *arguments in questions:
            worker.ask({"function": function, "arguments": arguments, "is_asked_later": True})
    except (_WorkerLostError, OSError):
        pass  # the first answer that is graded starts another, or tells why it cannot
    finally:
        _idle.put(worker)


class _WorkerLostError(Exception):
    """A worker ended, or stood still, for a reason that is not the question."""


class _Worker:
    """One child process; `ask` gives its reply, or None when the question was too much for it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, question: dict[str, Any]) -> dict[str, Any] | None:
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        is_silent = False
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            is_silent = not select.select([process.stdout], [], [], WALL_LIMIT_S)[0]
            line = b"" if is_silent else process.stdout.readline()
        except OSError:
            line = b""
        if line.endswith(b"\n"):
            reply: dict[str, Any] = json.loads(line)
            return reply
        if not is_silent:
            process.wait()  # it closed its end of the pipe only by ending
        code = process.poll()
        self.stop()
        if code is None:
            raise _WorkerLostError(f"stood still for {WALL_LIMIT_S:.0f} s")
        if code in _KILLED_FROM_OUTSIDE:
            raise _WorkerLostError(f"was killed by {signal.Signals(-code).name}")
        return None

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # a question that was never read cannot be flushed
                        pipe.close()

    def _start(self) -> "subprocess.Popen[bytes]":
        root = str(Path(__file__).parents[3])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "slime.rollout.rm_hub.grading_child", str(CPU_LIMIT_S), str(MEMORY_LIMIT_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        return self._process


_lock = threading.Lock()
_idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
_started: list[_Worker] = []
_killed: Counter[str] = Counter()


def stop_workers() -> None:
    """Ends the worker processes that are idle; they start again when needed."""
    while True:
        try:
            worker = _idle.get_nowait()
        except queue.Empty:
            return
        worker.stop()
        with _lock:
            _started.remove(worker)


atexit.register(stop_workers)


_KILLED_FROM_OUTSIDE = tuple(-number for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT))
"""Exit codes that a question cannot cause by itself: too much CPU time ends by SIGPROF, too much memory by exit."""


def _ask(function: str, *arguments: Any) -> Any:
    for lost in range(1, MAX_LOST_WORKERS + 1):
        worker = _take()
        try:
            reply = worker.ask({"function": function, "arguments": arguments})
            break
        except _WorkerLostError as error:
            logger.warning("the grading child %s; asking again (%d of %d)", error, lost, MAX_LOST_WORKERS)
        finally:
            _idle.put(worker)
    else:
        reply = None
    if reply is None:
        _report_kill(function, arguments)
        return None
    if "error" in reply:
        raise GradingError(f"{function} cannot grade: {reply['error']}")
    return reply["result"]


def _take() -> _Worker:
    """An idle worker, a new one while there are fewer than NUM_WORKERS, else the next that becomes idle."""
    try:
        return _idle.get_nowait()
    except queue.Empty:
        pass
    with _lock:
        if len(_started) < NUM_WORKERS:
            _started.append(_Worker())
            return _started[-1]
    return _idle.get(timeout=WALL_LIMIT_S * 10)


def _report_kill(function: str, arguments: tuple[Any, ...]) -> None:
    """Says it the 1st, 10th, 100th, ... time: a policy may learn to write such answers by the thousand."""
    _killed[function] += 1
    count = _killed[function]
    if str(count).strip("0") == "1":
        logger.warning(
            "%s was stopped after %.0f CPU s or %.0f s; the answer counts as wrong (%d so far). Latest: %.200r",
            function, CPU_LIMIT_S, WALL_LIMIT_S, count, arguments[:2],
        )  # fmt: skip
