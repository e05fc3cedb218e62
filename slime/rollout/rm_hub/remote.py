"""`--rm-type remote_rm`: asks an HTTP service for the reward."""

import argparse
import asyncio
import logging
import random
import time
import weakref
from typing import Any

import httpx

from slime.utils.http_client import pooled_client
from slime.utils.types import Sample

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 10
ATTEMPT_TIMEOUT_S = 120.0
DEADLINE_S = 900.0
MAX_BACKOFF_S = 30.0
MAX_CONNECTIONS = 64

_RETRIED_STATUS = frozenset({408, 425, 429})
_clients: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient]" = weakref.WeakKeyDictionary()


async def remote_rm(
    args: argparse.Namespace, sample: Sample, max_retries: int = MAX_ATTEMPTS, response: str | None = None
) -> Any:
    """POSTs {"prompt", "response", "label"} to --rm-url; the reply's JSON is the reward.

    Errors of the connection and of the server (5xx, 408, 425, 429) are retried after min(2^n, 30) s plus up to 1 s.

    Args:
        max_retries: how often the service is asked at most.
        response: what to send instead of the sample's response.

    Raises:
        RuntimeError: no reply after the last attempt or within DEADLINE_S; names the service and the last error.
        httpx.HTTPStatusError: the service refuses the request (another 4xx): asking again would not help.
    """
    url = getattr(args, "rm_url", None)
    if not url:
        raise ValueError("--rm-type remote_rm needs --rm-url, the address that rewards are asked from.")
    payload = {
        "prompt": sample.prompt,
        "response": sample.response if response is None else response,
        "label": sample.label,
    }
    started = time.monotonic()
    for attempt in range(1, max_retries + 1):
        try:
            return await _ask(url, payload)
        except (httpx.HTTPError, ValueError) as error:
            if isinstance(error, httpx.HTTPStatusError) and not _is_retried(error.response.status_code):
                raise
            elapsed_s = time.monotonic() - started
            pause_s = min(2.0**attempt, MAX_BACKOFF_S) + random.random()
            if attempt == max_retries or elapsed_s + pause_s > DEADLINE_S:
                raise RuntimeError(
                    f"The reward service {url} gave no reward in {attempt} attempts and {elapsed_s:.0f} s. "
                    f"Last: {type(error).__name__}: {error}"
                ) from error
            logger.warning(
                "reward service %s: %s: %s; attempt %d of %d, again in %.1f s",
                url, type(error).__name__, error, attempt, max_retries, pause_s,
            )  # fmt: skip
            await asyncio.sleep(pause_s)
    raise ValueError(f"max_retries is the number of attempts and at least 1, got {max_retries}")


async def _ask(url: str, payload: dict[str, Any]) -> Any:
    reply = await _client().post(url, json=payload)
    reply.raise_for_status()
    return reply.json()


def _is_retried(status: int) -> bool:
    return status >= 500 or status in _RETRIED_STATUS


def _client() -> httpx.AsyncClient:
    """One client an event loop, since connections belong to their loop."""
    loop = asyncio.get_running_loop()
    client = _clients.get(loop)
    if client is None:
        client = _clients[loop] = pooled_client(MAX_CONNECTIONS, ATTEMPT_TIMEOUT_S)
    return client
