"""HTTP connections of one event loop, for many requests at once, over aiohttp; failures have httpx's names.

httpx's own pool looks at every connection for each request: two seconds of CPU with 256 in flight. Even over another
transport its requests and replies cost much of what a whole exchange costs here (benchmarks/README.md has both).
"""

import asyncio
import atexit
import contextlib
import functools
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport

CONNECT_TIMEOUT_S = 30.0
_KEEPALIVE_S = 3.0  # less than the five seconds after which uvicorn closes an idle connection, maybe under a request
_CLOSE_TIMEOUT_S = 1.0

# The first kind that an error is of names it.
_FAILURES: tuple[tuple[type[BaseException], type[httpx.TransportError]], ...] = (
    (aiohttp.InvalidURL, httpx.UnsupportedProtocol),
    (aiohttp.NonHttpUrlClientError, httpx.UnsupportedProtocol),
    (aiohttp.SocketTimeoutError, httpx.ReadTimeout),
    (aiohttp.ServerTimeoutError, httpx.ConnectTimeout),
    (aiohttp.ClientConnectorError, httpx.ConnectError),
    (aiohttp.ServerDisconnectedError, httpx.RemoteProtocolError),
    (aiohttp.ClientConnectionError, httpx.ReadError),
    (aiohttp.ClientPayloadError, httpx.ReadError),
    (ConnectionError, httpx.ReadError),
    (aiohttp.ClientError, httpx.ProtocolError),  # e.g. what answers does not speak HTTP
)


@dataclass(frozen=True)
class Reply:
    """The whole answer to one request, as it came: a content that was packed for the way still is."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    content: bytes

    @property
    def is_packed(self) -> bool:
        return any(name.lower() == b"content-encoding" for name, _ in self.headers)

    def as_response(self, method: str, url: str) -> httpx.Response:
        """The same as httpx gives it, unpacked.

        Raises:
            httpx.DecodingError: it cannot be unpacked.
        """
        request = httpx.Request(method, url)
        return httpx.Response(self.status, headers=list(self.headers), content=self.content, request=request)


class ConnectionPool:
    """Connections of the running event loop; they cannot be used on another."""

    def __init__(self, max_connections: int) -> None:
        self._session = _new_session(max_connections)
        self.client = _over(self._session, httpx.Timeout(None, connect=CONNECT_TIMEOUT_S))
        """For what `exchange` does not do: replies that come in parts."""

    async def exchange(self, method: str, url: str, payload: Any, headers: Mapping[str, str] | None) -> Reply:
        """Send `payload` as JSON, or nothing where it is None, and read the whole reply, whatever its status.

        Raises:
            httpx.TransportError: there was none; the class tells the kind of failure as httpx's own client does.
            ValueError: the payload has a number that JSON does not have, e.g. NaN.
            TypeError: the payload has something that JSON does not have.
        """
        body, headers = None, dict(headers or {})
        if payload is not None:
            text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
            body = text.encode()
            if not any(name.lower() == "content-type" for name in headers):
                headers["Content-Type"] = "application/json"
        try:
            async with self._session.request(method, url, data=body, headers=headers, allow_redirects=False) as reply:
                return Reply(reply.status, reply.raw_headers, await reply.read())
        except (aiohttp.ClientError, ConnectionError) as error:
            raise _named(error, httpx.Request(method, url)) from error


def _named(error: BaseException, request: httpx.Request) -> httpx.TransportError:
    kind = next(named for known, named in _FAILURES if isinstance(error, known))
    return kind(str(error) or type(error).__name__, request=request)


class _Transport(AiohttpTransport):
    """aiohttp beneath an httpx client, with the same names for the same failures to get a reply."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            return await super().handle_async_request(request)
        except (aiohttp.ClientError, ConnectionError) as error:
            raise _named(error, request) from error
        except httpx.TransportError as error:
            if isinstance(cause := error.__cause__, aiohttp.ClientError | ConnectionError):
                raise _named(cause, request) from cause
            raise


def pooled_client(max_connections: int, timeout: httpx.Timeout | float) -> httpx.AsyncClient:
    """An httpx client of the running loop, for many requests at once, over aiohttp's connections."""
    return _over(_new_session(max_connections), timeout)


def _over(session: aiohttp.ClientSession, timeout: httpx.Timeout | float) -> httpx.AsyncClient:
    transport = _Transport(verify=tls_context(), trust_env=False, client=session)
    return httpx.AsyncClient(transport=transport, timeout=timeout, trust_env=False)


def _new_session(max_connections: int) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=max_connections, keepalive_timeout=_KEEPALIVE_S, ssl=tls_context())
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
    cookies = aiohttp.CookieJar(unsafe=True)  # also of addresses without a name
    session = aiohttp.ClientSession(connector=connector, timeout=timeout, cookie_jar=cookies, auto_decompress=False)
    for known in [known for known in _sessions if known.closed]:
        del _sessions[known]
    _sessions[session] = asyncio.get_running_loop()
    return session


@functools.cache
def tls_context() -> ssl.SSLContext:
    """What every client of this process shows and trusts (SSL_CERT_FILE and SSL_CERT_DIR count).

    Reading the certificates anew takes each client 15 ms.
    """
    return httpx.create_ssl_context()


_sessions: dict[aiohttp.ClientSession, asyncio.AbstractEventLoop] = {}


@atexit.register
def _close_sessions() -> None:
    """aiohttp reports sessions that are open at the end as errors; ours live as long as the process."""
    for session, loop in list(_sessions.items()):
        if session.closed:
            continue
        with contextlib.suppress(Exception):
            if loop.is_running():
                asyncio.run_coroutine_threadsafe(session.close(), loop).result(_CLOSE_TIMEOUT_S)
            elif loop.is_closed():
                asyncio.run(session.close())  # its sockets went with its loop
            else:
                loop.run_until_complete(session.close())
