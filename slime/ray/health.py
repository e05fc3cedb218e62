"""Health checks of servers: each is asked over HTTP from time to time, and one that stays silent is given up."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import httpx

from slime.utils.api_key import api_key, key_header
from slime.utils.http_client import tls_context

logger = logging.getLogger(__name__)

_RETRY_S = 1.0
_LATE_S = 2.0


class HealthMonitor:
    """Watches any number of servers, from a thread of its own: what blocks elsewhere must not look like silence."""

    def __init__(self, *, interval_s: float, timeout_s: float, first_wait_s: float = 0.0) -> None:
        """
        Args:
            interval_s: between two checks of a healthy server.
            timeout_s: a server that has not answered 200 for so long, in two attempts at least, is given up.
            first_wait_s: before the first check of a server.
        """
        self._interval_s, self._timeout_s, self._first_wait_s = interval_s, timeout_s, first_wait_s
        self._loop = asyncio.new_event_loop()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._thread = threading.Thread(target=self._loop.run_forever, name="health", daemon=True)
        self._thread.start()

    def watch(
        self,
        name: str,
        url: str,
        give_up: Callable[[str], None],
        *,
        patience: float = 1.0,
        when: Callable[[], bool] = lambda: True,
    ) -> None:
        """Begin to check a server; `give_up` is called once, with the reason, from the monitor's thread.

        Args:
            url: answers 200 while the server is well.
            patience: multiplies the silence after which it is given up.
            when: whether silence means anything now; asked before each check.
        """
        self._loop.call_soon_threadsafe(self._start, name, self._check(name, url, give_up, patience, when))

    def forget(self, name: str) -> None:
        """Check it no more."""
        self._loop.call_soon_threadsafe(self._cancel, name)

    def close(self) -> None:
        """End all checks and the thread."""
        asyncio.run_coroutine_threadsafe(self._cancel_all(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    def _start(self, name: str, check: Coroutine[Any, Any, None]) -> None:
        self._cancel(name)
        self._tasks[name] = self._loop.create_task(check)

    def _cancel(self, name: str) -> None:
        if (task := self._tasks.pop(name, None)) is not None:
            task.cancel()

    async def _cancel_all(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _check(
        self, name: str, url: str, give_up: Callable[[str], None], patience: float, when: Callable[[], bool]
    ) -> None:
        await asyncio.sleep(self._first_wait_s)
        silent_since_s: float | None = None
        failures = 0
        timeout_s = self._timeout_s * patience
        async with httpx.AsyncClient(
            timeout=timeout_s / 2, headers=key_header(api_key()), trust_env=False, verify=tls_context()
        ) as client:
            while True:
                asked_s = time.monotonic()
                answer = await _ask(client, url, timeout_s / 2) if when() else None
                answer = answer if when() else None
                was_late = time.monotonic() - asked_s > timeout_s / 2 + _LATE_S  # this process did not run itself
                if answer is None or was_late:
                    silent_since_s, failures = None, 0
                    await asyncio.sleep(self._interval_s)
                    continue
                silent_since_s = asked_s if silent_since_s is None else silent_since_s
                silence_s = time.monotonic() - silent_since_s
                failures += 1
                if silence_s >= timeout_s and failures > 1:
                    reason = f"did not answer {url} for {silence_s:.0f} s ({answer})"
                    logger.warning("%s %s and is given up", name, reason)
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.to_thread(give_up, reason)
                    return
                await asyncio.sleep(min(_RETRY_S, self._interval_s))


async def _ask(client: httpx.AsyncClient, url: str, timeout_s: float) -> str | None:
    """None for 200, else what came instead. The whole attempt has one deadline, where httpx has one a part."""
    try:
        async with asyncio.timeout(timeout_s):
            reply = await client.get(url)
    except (TimeoutError, httpx.TimeoutException):
        return "no answer"
    except httpx.HTTPError as error:
        return str(error) or type(error).__name__
    return None if reply.status_code == 200 else f"status {reply.status_code}"
