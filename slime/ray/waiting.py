"""Wait for remote calls with a deadline, and name the process that failed or did not answer."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

_POLL_S = 1.0


class RemoteError(RuntimeError):
    """A process of this run failed or missed its deadline; the message names it."""


def wait_for(
    calls: Mapping[str, Any],
    what: str,
    timeout_s: float | None = None,
    *,
    watch: Callable[[], None] | None = None,
) -> list[Any]:
    """Results of remote calls, in order, once all are there.

    Args:
        calls: name of the process -> its ObjectRef.
        what: the work, as the error says it ("train on rollout 3").
        timeout_s: deadline for all of them together; None waits for as long as all are alive.
        watch: called every second; raises to end the wait (a process that others depend on has died).

    Raises:
        RemoteError: a process died or raised (its error is the cause), or the deadline passed; names the process.
    """
    names = {ref: name for name, ref in calls.items()}
    pending, started = list(names), time.monotonic()
    while pending:
        done, pending = ray.wait(pending, num_returns=len(pending), timeout=_POLL_S)
        for ref in done:
            _raise_if_failed(ref, names[ref], what)
        if watch is not None and pending:
            watch()
        waited_s = time.monotonic() - started
        if pending and timeout_s is not None and waited_s > timeout_s:
            late = ", ".join(names[ref] for ref in pending)
            raise RemoteError(f"Waited {waited_s:.0f} s for {late} to {what}; the deadline is {timeout_s:.0f} s.")
    return ray.get(list(calls.values()))


def _raise_if_failed(ref: Any, name: str, what: str) -> None:
    try:
        ray.get(ref, timeout=_POLL_S)
    except GetTimeoutError:
        return  # large result still on its way; the final get waits for it
    except RayTaskError as error:
        raise RemoteError(f"{name} failed to {what}: {error.cause}") from error
    except RayActorError as error:
        raise RemoteError(f"{name} died while it had to {what}: {error}") from error
