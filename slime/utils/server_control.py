"""Ending all requests of engines: asked again until each engine says that it is idle."""

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

import httpx

from slime.utils.api_key import control_header
from slime.utils.http_utils import get, post

logger = logging.getLogger(__name__)

_FIRST_POLL_S = 0.02  # an engine ends its requests between two steps

# A load reply gives the total under one of these names, or its two parts under one name each.
_TOTAL = ("num_reqs", "num_total_reqs", "total_reqs")
_RUNNING = ("num_running_reqs", "total_running_reqs")
_WAITING = ("num_waiting_reqs", "total_waiting_reqs")


async def abort_servers_until_idle(urls: Iterable[str], *, interval_s: float = 3.0, timeout_s: float = 600.0) -> None:
    """`abort_server_until_idle` on all of them at once; an error of one is raised after all have ended."""
    results = await asyncio.gather(
        *(abort_server_until_idle(url, interval_s=interval_s, timeout_s=timeout_s) for url in urls),
        return_exceptions=True,
    )
    for result in results:
        if isinstance(result, BaseException):
            raise result


async def abort_server_until_idle(url: str, *, interval_s: float = 3.0, timeout_s: float = 600.0) -> None:
    """Abort every request of the engine at `url`, and again while it reports any: some may have been on their way.

    The engine answers the aborted requests with what they had generated (finish reason `abort`). An engine whose load
    cannot be asked for ends the loop: it is gone, or about to be restarted.

    Args:
        interval_s: longest pause between two askings; the first ones follow faster.

    Raises:
        TimeoutError: it still had requests after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    pause_s = _FIRST_POLL_S
    while True:
        try:
            await post(f"{url}/abort_request", {"abort_all": True}, max_retries=1, headers=control_header())
            num_requests = num_requests_from_load(await get(f"{url}/v1/loads?include=core", max_retries=1))
        except (httpx.HTTPError, TimeoutError, ValueError) as error:
            logger.warning("The requests of %s are taken as ended, because it does not tell its load: %s", url, error)
            return
        if num_requests == 0:
            return
        if time.monotonic() >= deadline:
            raise TimeoutError(
                f"{url} still has {num_requests} request(s) {timeout_s:g} s after it was asked to abort all of them. "
                "Its log tells what it is doing; an engine that hangs must be restarted."
            )
        await asyncio.sleep(min(pause_s, interval_s))
        pause_s *= 2


def num_requests_from_load(load: Any) -> int:
    """Requests running or waiting, from the reply of `/v1/loads`: a list or a dict, of one rank or of many.

    Raises:
        ValueError: no count is in it.
    """
    if isinstance(load, Mapping):
        if isinstance(load.get("loads"), list):
            return num_requests_from_load(load["loads"])
        for name in _TOTAL:
            if load.get(name) is not None:
                return int(load[name])
        parts = [next((load[n] for n in names if load.get(n) is not None), None) for names in (_RUNNING, _WAITING)]
        if any(part is not None for part in parts):
            return sum(int(part) for part in parts if part is not None)
    elif isinstance(load, list):
        return sum(num_requests_from_load(rank) for rank in load)
    raise ValueError(f"No number of requests in this reply of /v1/loads: {str(load)[:200]}")
