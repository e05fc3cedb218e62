"""Wait for remote calls with a deadline, and name the process that failed, died or did not answer."""

import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

import slime

_POLL_S = 0.5
_GRACE_S = 3.0
"""After a first failure: a process that died takes others with it, and these may be heard of first."""


class RemoteError(RuntimeError):
    """A process of this run failed or missed its deadline; the message names it."""


Look = Callable[[], None]
_look: Look | None = None


def set_look(look: Look | None) -> None:
    """What every wait of this process calls twice a second; it raises to end the wait: what is waited for cannot come.

    Only the driver sets one.
    """
    global _look
    _look = look


def wait_for(calls: Mapping[str, Any], what: str, timeout_s: float | None = None) -> list[Any]:
    """Results of remote calls, in order, once all are there.

    Args:
        calls: name of the process -> its ObjectRef.
        what: the work, as the error says it ("train on rollout 3").
        timeout_s: deadline for all of them together; None waits for as long as all processes of the run give signs of
            life.

    Raises:
        RemoteError: a process died or raised (its error is the cause), or the deadline passed; names the process.
    """
    names = {ref: name for name, ref in calls.items()}
    pending, started = list(names), time.monotonic()
    failures: dict[str, Exception] = {}
    failed_s = 0.0
    while pending:
        done, pending = ray.wait(pending, num_returns=len(pending), timeout=_POLL_S)
        for ref in done:
            if (error := _failure(ref)) is not None:
                failed_s = failed_s or time.monotonic()
                failures[names[ref]] = error
        waiting_for = ", ".join(names[ref] for ref in pending)
        if _look is not None and (pending or failures):
            _look_around(waiting_for or ", ".join(failures), what)
        if failures and (not pending or time.monotonic() - failed_s > _GRACE_S):
            break
        waited_s = time.monotonic() - started
        if pending and not failures and timeout_s is not None and waited_s > timeout_s:
            raise RemoteError(f"Waited {waited_s:.0f} s for {waiting_for} to {what}; the limit is {timeout_s:.0f} s.")
    if failures:
        _raise_the_cause(failures, what)
    return ray.get(list(calls.values()))


def num_ready(calls: Iterable[Any]) -> int:
    """How many of these ObjectRefs are there; waits for none."""
    refs = list(calls)
    return len(ray.wait(refs, num_returns=len(refs), timeout=0)[0]) if refs else 0


def _look_around(waiting_for: str, what: str) -> None:
    assert _look is not None
    try:
        _look()
    except RemoteError as error:
        raise RemoteError(f"{waiting_for} had to {what}, but {error}") from error


def _failure(ref: Any) -> Exception | None:
    try:
        ray.get(ref, timeout=_POLL_S)
    except GetTimeoutError:
        return None  # a large result still on its way; the final get waits for it
    except RayError as error:  # also where Ray itself ended a process, for want of memory
        return error
    return None


def _raise_the_cause(failures: Mapping[str, Exception], what: str) -> None:
    """Raise the failure that explains the others: a death before an error, an error before a lost connection."""
    order = sorted(failures.items(), key=lambda item: _rank(item[1]))
    name, cause = order[0]
    error = RemoteError(_in_words(name, cause, what))
    for other, failure in order[1:]:
        error.add_note(f"and then {_in_words(other, failure, what)}")
    raise error from cause


_SYMPTOMS = ("connection closed by peer", "connection reset", "connection refused", "broken pipe", "timed out")


def _rank(failure: Exception) -> int:
    if not isinstance(failure, RayTaskError):
        return 0
    return 2 if any(symptom in str(failure).lower() for symptom in _SYMPTOMS) else 1


def _in_words(name: str, failure: Exception, what: str) -> str:
    if isinstance(failure, RayTaskError):
        return f"{name} failed to {what}: {error_in_words(failure.cause, str(failure))}"
    return f"{name} died while it had to {what}: {failure}"


_FRAME = re.compile(r'^ *File "([^"]+)", line (\d+), in (.+)$', re.MULTILINE)
_SAY_ENOUGH = (ValueError, RuntimeError, OSError)  # of Python's own; slime raises them with a sentence


def error_in_words(cause: BaseException, traceback_text: str) -> str:
    """What an error says and, where that is not slime's own sentence, its kind and the line that raised it.

    Args:
        traceback_text: as Python or Ray prints it; its last frame is the one that raised.
    """
    frames = _FRAME.findall(traceback_text)
    is_slimes = bool(frames) and Path(frames[-1][0]).is_relative_to(Path(slime.__file__).parent)
    is_worded = type(cause).__module__ != "builtins" or isinstance(cause, _SAY_ENOUGH)
    words = str(cause) if is_worded else f"{type(cause).__name__}: {cause}"
    if frames and not (is_slimes and is_worded):
        path, line, function = frames[-1]
        words += f" ({path}, line {line}, in {function})"
    return "; ".join([words, *getattr(cause, "__notes__", ())])
