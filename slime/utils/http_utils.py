"""HTTP to routers, engines and reward services: retries that cannot hide an error, a deadline on each request."""

import asyncio
import contextlib
import json
import logging
import math
import os
import random
import socket
import subprocess
import time
import weakref
from argparse import Namespace
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import orjson

from slime.utils.api_key import headers_for, is_own_server
from slime.utils.direct_requests import ROUTING_KEY, DirectRequests
from slime.utils.http_client import ConnectionPool

logger = logging.getLogger(__name__)

DEFAULT_RETRIES = 60
RETRY_INTERVAL_S = 1.0
OWN_ERRORS = 10
"""How often one request may be answered by 500 from an engine that was reached: it would fail there each time."""
_WARNING_INTERVAL_S = 10.0
_GENERATE = "/generate"
_REPLY_POLL_S = 0.005
MAX_REPLY_CHARS_IN_ERROR = 2000

# Connection-level failures: the request did not get an answer, and asking again is right.
# Not among them: a URL that is wrong, a protocol that is not spoken, a deadline that is over.
_RETRIED_FAILURES = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout)
_RETRIED_STATUS = 429


@dataclass(frozen=True)
class _Settings:
    max_connections: int = 512
    deadline_s: float = 14400.0
    outlives_restarts: bool = False
    """Servers that die are started again: where the caller names no number of attempts, the deadline limits them."""


_settings = _Settings()
_direct = DirectRequests()
_generating: set[object] = set()
"""One token for each request to `/generate` that has no reply yet."""
_http_client: httpx.AsyncClient | None = None
"""When set, every loop uses this client: the seam where tests put an `httpx.MockTransport`."""
_pools: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, ConnectionPool]" = weakref.WeakKeyDictionary()


def init_http_client(args: Namespace) -> None:
    """Size the clients for this run: as many connections as requests in flight, and the run's deadline.

    Requests to the run's router carry its key (`slime.utils.api_key`).
    """
    global _settings
    engines = max(1, get_rollout_num_engines(args))
    _settings = _Settings(
        max_connections=args.sglang_server_concurrency * engines,
        deadline_s=float(getattr(args, "sglang_router_request_timeout_secs", None) or _Settings.deadline_s),
        outlives_restarts=bool(getattr(args, "use_fault_tolerance", False)),
    )
    _pools.clear()
    routers = dict(getattr(args, "sglang_model_routers", None) or {})
    if host := getattr(args, "sglang_router_ip", None):
        routers[""] = (host, args.sglang_router_port)
    urls = [f"http://{_wrap_ipv6(host)}:{port}" for host, port in routers.values()]
    is_own_server(*urls)
    _direct.know_routers(urls)


def get_rollout_num_engines(args: Namespace) -> int:
    """How many engines serve this run; 0 when no device is set aside for them."""
    engines = getattr(args, "rollout_num_engines", None)
    if engines is not None:
        return int(engines)
    if not args.rollout_num_gpus:
        return 0
    return max(1, int(args.rollout_num_gpus) // int(args.rollout_num_gpus_per_engine))


async def post(
    url: str,
    payload: Any,
    max_retries: int = DEFAULT_RETRIES,
    headers: dict[str, str] | None = None,
    timeout_s: float | None = None,
) -> Any:
    """POST `payload` as JSON; the parsed JSON of the reply, or its text when it is none.

    A connection that fails and the statuses 429 and 5xx are tried again after a second, with the same payload, up to
    `max_retries` times; by default, with --use-fault-tolerance, until the deadline: a dead server is being replaced.
    Nothing else retries: the router's own retries are off. Any other status of 400 and above is raised at once, and
    after `OWN_ERRORS` attempts a 500 that comes from an engine itself.

    A request to the run's router with fields that the router would drop goes to one of its engines directly.

    Args:
        timeout_s: deadline over all attempts, by default `--sglang-router-request-timeout-secs`.

    Raises:
        httpx.HTTPStatusError: with the server's words in the message.
        httpx.TransportError: no connection, still, after the last attempt.
        TimeoutError: the deadline is over.
    """
    return await _request("POST", url, payload, max_retries, headers, timeout_s)


async def get(url: str, max_retries: int = 5, timeout_s: float | None = None) -> Any:
    """GET `url`; parsed JSON, or the text when it is none. Retries and errors as in `post`."""
    return await _request("GET", url, None, max_retries, None, timeout_s)


async def stream_post(
    url: str, payload: Any, headers: dict[str, str] | None = None, timeout_s: float | None = None
) -> AsyncGenerator[Any, None]:
    """POST and yield the JSON of each server-sent event (`data: {...}`) until `data: [DONE]`.

    Not retried: what was yielded cannot be taken back. Errors as in `post`, until the reply begins.
    """
    deadline_s = _settings.deadline_s if timeout_s is None else timeout_s
    try:
        async with asyncio.timeout(deadline_s), AsyncExitStack() as stack:
            url = await _target(url, payload, headers, stack)
            stream = _client().stream("POST", url, json=payload, headers=headers_for(url, headers))
            reply = await stack.enter_async_context(stream)
            if reply.status_code >= 400:
                await reply.aread()
                raise _status_error("POST", url, reply)
            async for line in reply.aiter_lines():
                if not line.startswith("data:"):
                    continue
                event = line.removeprefix("data:").strip()
                if event == "[DONE]":
                    return
                yield json.loads(event)
    except TimeoutError:
        raise TimeoutError(f"POST {url} (streaming) was not complete within {deadline_s:g} s.") from None


async def _request(
    method: str, url: str, payload: Any, max_retries: int, headers: dict[str, str] | None, timeout_s: float | None
) -> Any:
    deadline_s = _settings.deadline_s if timeout_s is None else timeout_s
    retries = math.inf if _settings.outlives_restarts and max_retries == DEFAULT_RETRIES else max_retries
    failures: list[Exception] = []
    own_errors = 0
    try:
        async with asyncio.timeout(deadline_s):
            while True:
                try:
                    return await _attempt(method, url, payload, headers)
                except (*_RETRIED_FAILURES, httpx.HTTPStatusError) as error:
                    if isinstance(error, httpx.HTTPStatusError) and not _is_retried(error.response.status_code):
                        raise
                    failures.append(error)
                    own_errors += _is_an_engines_own(error)
                    if len(failures) > retries or own_errors > OWN_ERRORS:
                        raise _after_retries(error, method, url, len(failures)) from error
                    _log_retry(method, url, error, len(failures), retries)
                await asyncio.sleep(RETRY_INTERVAL_S)
    except TimeoutError:
        last = f"; the last attempt failed with {failures[-1]!r}" if failures else ""
        raise TimeoutError(
            f"{method} {url} gave no reply within {deadline_s:g} s ({len(failures) + 1} attempts){last}. "
            "Is the server alive? --sglang-router-request-timeout-secs sets the deadline."
        ) from None


async def _attempt(method: str, url: str, payload: Any, headers: dict[str, str] | None) -> Any:
    async with AsyncExitStack() as stack:
        if url.endswith(_GENERATE):
            stack.enter_context(_counted_as_generating())
        target = await _target(url, payload, headers, stack)
        return await _exchange(method, target, payload, headers)


async def _exchange(method: str, url: str, payload: Any, headers: dict[str, str] | None) -> Any:
    """One request and what its reply says, which has a status below 400: its JSON, or its text."""
    headers = headers_for(url, headers)
    if _http_client is not None:
        reply = await _http_client.request(method, url, json=payload, headers=headers)
    else:
        plain = await _pool().exchange(method, url, payload, headers)
        if plain.status < 400 and not plain.is_packed:
            with contextlib.suppress(orjson.JSONDecodeError):
                return orjson.loads(plain.content)
        reply = plain.as_response(method, url)
    if reply.status_code >= 400:
        raise _status_error(method, url, reply)
    try:
        return orjson.loads(reply.content)
    except orjson.JSONDecodeError:
        pass
    try:
        return reply.json()  # takes NaN too
    except ValueError:
        return reply.text


@contextlib.contextmanager
def _counted_as_generating() -> Iterator[None]:
    token = object()
    _generating.add(token)
    try:
        yield
    finally:
        _generating.discard(token)


async def generation_replies(limit_s: float) -> None:
    """Wait until no request to `/generate` of this process is without its reply, or for `limit_s`.

    An engine that has nothing left to compute may still be writing the replies of what it was told to abort.
    """
    deadline = time.monotonic() + limit_s
    while _generating and time.monotonic() < deadline:
        await asyncio.sleep(_REPLY_POLL_S)


async def _target(url: str, payload: Any, headers: dict[str, str] | None, stack: AsyncExitStack) -> str:
    """Where this attempt goes: `url`, or an engine behind it, whose requests are counted until `stack` closes."""
    dropped = _direct.concerns(url, payload)
    if not dropped:
        return url
    target = await _direct.choose(url, dropped, (headers or {}).get(ROUTING_KEY), _list_of_engines)
    stack.enter_context(_direct.counted(url, target))
    return target


async def _list_of_engines(url: str) -> Any:
    answer = await _exchange("GET", url, None, None)
    if not isinstance(answer, dict):
        raise ValueError(
            f"GET {url} was answered with {str(answer)[:MAX_REPLY_CHARS_IN_ERROR]!r}, not a list of engines."
        )
    return answer


def _is_an_engines_own(error: Exception) -> bool:
    """Whether an engine failed at the request itself; a router that does not reach an engine says so with a code."""
    if not isinstance(error, httpx.HTTPStatusError) or error.response.status_code != 500:
        return False
    try:
        said = error.response.json()
    except ValueError:
        return True
    return not (isinstance(said, dict) and isinstance(said.get("error"), dict) and "code" in said["error"])


def _is_retried(status: int) -> bool:
    return status == _RETRIED_STATUS or status >= 500


def _status_error(method: str, url: str, reply: httpx.Response) -> httpx.HTTPStatusError:
    text = reply.text
    if len(text) > MAX_REPLY_CHARS_IN_ERROR:
        text = f"{text[:MAX_REPLY_CHARS_IN_ERROR]}... ({len(text)} characters)"
    return httpx.HTTPStatusError(
        f"{method} {url} was answered with {reply.status_code}: {text or '(nothing)'}",
        request=reply.request,
        response=reply,
    )


def _after_retries(error: Exception, method: str, url: str, attempts: int) -> Exception:
    """The same kind of error, telling how often it was seen."""
    if isinstance(error, httpx.HTTPStatusError):
        return httpx.HTTPStatusError(
            f"{error} ({attempts} attempts, {RETRY_INTERVAL_S:g} s apart)",
            request=error.request,
            response=error.response,
        )
    assert isinstance(error, httpx.TransportError)
    return type(error)(
        f"{method} {url} failed {attempts} times, {RETRY_INTERVAL_S:g} s apart: {str(error) or type(error).__name__}"
    )


_warned_s: dict[str, float] = {}


def _log_retry(method: str, url: str, error: Exception, failures: int, retries: float) -> None:
    """Warn of a server once in a while, not once a request: all requests in flight fail together."""
    now = time.monotonic()
    if now - _warned_s.get(url, -math.inf) < _WARNING_INTERVAL_S:
        return
    _warned_s[url] = now
    limit = "until its deadline" if math.isinf(retries) else f"attempt {failures} of {retries}"
    logger.warning("%s %s: %r; trying again (%s), and so do other requests to it", method, url, error, limit)


def _client() -> httpx.AsyncClient:
    """For replies that come in parts."""
    return _http_client if _http_client is not None else _pool().client


def _pool() -> ConnectionPool:
    """The connections of the running loop."""
    loop = asyncio.get_running_loop()
    pool = _pools.get(loop)
    if pool is None:
        pool = _pools[loop] = ConnectionPool(_settings.max_connections)
    return pool


# ---- this machine: addresses, ports, processes ----


def is_port_available(port: int) -> bool:
    """Whether nothing listens on `port`, on any address of this machine."""
    families = [(socket.AF_INET, "")] + ([(socket.AF_INET6, "::")] if socket.has_ipv6 else [])
    for family, address in families:
        try:
            with socket.socket(family, socket.SOCK_STREAM) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((address, port))
        except OverflowError:
            return False
        except OSError as error:
            if family == socket.AF_INET6 and error.errno in _NO_IPV6:
                continue
            return False
    return True


_NO_IPV6 = {97, 99}  # EAFNOSUPPORT, EADDRNOTAVAIL: the kernel has no IPv6


def find_available_port(base: int) -> int:
    """A free port some random way above `base`, so that runs started together rarely meet."""
    first = port = base + random.randint(100, 1000)
    while port < 65536:
        if is_port_available(port):
            return port
        port += 42
    raise RuntimeError(f"No free port among {first}, {first + 42}, ... below 65536.")


def get_host_info() -> tuple[str, str]:
    """(host name, address by which other nodes reach this one).

    SLIME_HOST_IP names the address outright; SLIME_PREFER_IPV6=1 asks for an IPv6 one.
    """
    name = socket.gethostname()
    given = os.environ.get("SLIME_HOST_IP")
    if given:
        return name, given
    prefers_ipv6 = os.environ.get("SLIME_PREFER_IPV6", "").lower() in ("1", "true", "yes", "on")
    order = [socket.AF_INET6, socket.AF_INET] if prefers_ipv6 else [socket.AF_INET, socket.AF_INET6]
    for family in order:
        address = _outgoing_address(family)
        if address is not None:
            return name, address
    return name, "127.0.0.1"


def _outgoing_address(family: socket.AddressFamily) -> str | None:
    """The address the kernel would send from; asking sends nothing."""
    target = "2001:4860:4860::8888" if family == socket.AF_INET6 else "8.8.8.8"
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((target, 80))
        return str(probe.getsockname()[0])
    return None


def _wrap_ipv6(host: str) -> str:
    """`host` as it stands in a URL: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def terminate_process(process: "subprocess.Popen[Any]", timeout_s: float = 5.0) -> None:
    """Ask a process to end, and make it after `timeout_s`."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(timeout_s)
