"""Exchanges over real sockets: what arrives, and what each way to fail is called."""

import asyncio
import contextlib
import gzip
import json
from collections.abc import AsyncIterator
from pathlib import Path

import certifi
import httpx
import pytest

from slime.utils import http_utils
from slime.utils.http_client import ConnectionPool, pooled_client, tls_context
from slime.utils.http_utils import post, stream_post
from slime.utils.processes import free_port
from tests.raw_http import Server, answer, read_request, serving


@pytest.fixture
async def pool() -> AsyncIterator[ConnectionPool]:
    pool = ConnectionPool(4)
    yield pool
    await pool.client.aclose()


async def test_json_goes_out_and_the_whole_reply_comes_back(pool: ConnectionPool) -> None:
    seen = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await read_request(reader))
        writer.write(answer(307, b"\xff elsewhere", "Location: /other", "Set-Cookie: a=1"))

    async with serving(handle) as url:
        reply = await pool.exchange("POST", url, {"text": "\u00e9", "n": [1, None]}, {"X-Key": "k"})
        assert (reply.status, dict(reply.headers)[b"Location"], reply.content) == (307, b"/other", b"\xff elsewhere")
        await pool.exchange("GET", url, None, None)
    (headers, body), (second, nothing) = seen
    assert headers[""] == "POST /generate HTTP/1.1"
    assert (headers["content-type"], headers["x-key"]) == ("application/json", "k")
    assert json.loads(body) == {"text": "\u00e9", "n": [1, None]}
    assert (second[""], nothing) == ("GET /generate HTTP/1.1", b"")
    assert "cookie" not in headers and second["cookie"] == "a=1"


async def test_what_json_does_not_have_is_refused_before_anything_is_sent(pool: ConnectionPool) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        await pool.exchange("POST", "http://127.0.0.1:9/", {"temperature": float("nan")}, None)
    with pytest.raises(TypeError, match="not JSON serializable"):
        await pool.exchange("POST", "http://127.0.0.1:9/", {"image": object()}, None)


async def _says_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)


async def _dies_amid_its_reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(answer(200, b"x" * 100)[:-50])


async def _speaks_no_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"220 mail.test ESMTP\r\n")
    with contextlib.suppress(asyncio.IncompleteReadError):
        await read_request(reader)


async def _resets(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.transport.abort()


@pytest.mark.parametrize(
    ("handle", "kind", "is_retried"),
    [
        (_says_nothing, httpx.RemoteProtocolError, True),
        (_dies_amid_its_reply, httpx.ReadError, True),
        (_resets, httpx.TransportError, True),
        (_speaks_no_http, httpx.ProtocolError, False),
    ],
)
async def test_a_server_that_fails(
    monkeypatch: pytest.MonkeyPatch, pool: ConnectionPool, handle: Server, kind: type[Exception], is_retried: bool
) -> None:
    """Connections that break are tried again; a server that is none is told at once."""
    monkeypatch.setattr(http_utils, "RETRY_INTERVAL_S", 0.0)
    async with serving(handle) as url:
        with pytest.raises(kind) as error:
            await pool.exchange("POST", url, {}, None)
        assert isinstance(error.value, httpx.TransportError)
        assert str(error.value.request.url) == url
        with pytest.raises(kind, match="failed 3 times" if is_retried else None) as error:
            await post(url, {}, max_retries=2)
        assert ("failed 3 times" in str(error.value)) == is_retried


async def test_nobody_listens_and_what_is_no_address(pool: ConnectionPool) -> None:
    with pytest.raises(httpx.ConnectError, match="Cannot connect"):
        await pool.exchange("POST", f"http://127.0.0.1:{free_port()}/", {}, None)
    for url in ("gopher://127.0.0.1/", "engine/generate"):
        with pytest.raises(httpx.UnsupportedProtocol):
            await pool.exchange("POST", url, {}, None)


async def test_a_refusal_carries_the_servers_words_and_headers() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(answer(400, b'{"error": "unknown field `bogus`"}', "Content-Type: application/json", "X-Id: 7"))

    async with serving(handle) as url:
        with pytest.raises(httpx.HTTPStatusError, match="was answered with 400: .*unknown field `bogus`") as error:
            await post(url, {"bogus": 1})
    assert error.value.response.json() == {"error": "unknown field `bogus`"}
    assert error.value.response.headers["x-id"] == "7"
    assert str(error.value.request.url) == url


async def test_the_callers_content_type_stays(pool: ConnectionPool) -> None:
    seen = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append((await read_request(reader))[0]["content-type"])
        writer.write(answer(200, b"{}"))

    async with serving(handle) as url:
        await pool.exchange("POST", url, {}, {"content-type": "application/vnd.slime+json"})
    assert seen == ["application/vnd.slime+json"]


async def test_packed_replies_are_unpacked_and_what_cannot_be_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_utils, "RETRY_INTERVAL_S", 0.0)
    bodies = [b"no gzip", gzip.compress(b'{"error": "full"}'), gzip.compress(b'{"a": 1}')]
    statuses = [200, 400, 200]

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(answer(statuses.pop(), bodies.pop(), "Content-Encoding: gzip"))

    async with serving(handle) as url:
        assert await post(url, {}) == {"a": 1}
        with pytest.raises(httpx.HTTPStatusError, match='400: {"error": "full"}'):
            await post(url, {})
        with pytest.raises(httpx.DecodingError):
            await post(url, {})
    assert bodies == []


@pytest.mark.parametrize(
    ("handle", "kind"), [(_says_nothing, httpx.RemoteProtocolError), (_speaks_no_http, httpx.ProtocolError)]
)
async def test_streams_and_httpx_clients_fail_by_the_same_names(handle: Server, kind: type[Exception]) -> None:
    async with serving(handle) as url:
        with pytest.raises(kind):
            [event async for event in stream_post(url, {})]
        async with pooled_client(2, 20.0) as client:
            with pytest.raises(kind):
                await client.post(url, json={})
            with pytest.raises(httpx.ConnectError):
                await client.post(f"http://127.0.0.1:{free_port()}/", json={})


async def test_an_httpx_client_with_a_limit_says_that_it_was_the_reading() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        await asyncio.sleep(5)

    async with serving(handle) as url, pooled_client(2, 0.1) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post(url, json={})


def test_certificates_of_the_environment_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A reward service behind an organisation's own authority."""
    first, end, _ = Path(certifi.where()).read_text().partition("-----END CERTIFICATE-----\n")
    (tmp_path / "own.pem").write_text(first + end)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "own.pem"))
    assert len(tls_context.__wrapped__().get_ca_certs()) == 1


async def test_replies_that_are_not_json_are_text() -> None:
    bodies = [b'{"a": NaN}', "Caché.".encode("latin-1"), "Caché.".encode(), b'{"a": 1}']
    kinds = ["application/json", "text/plain; charset=latin-1", "text/plain; charset=utf-8", "application/json"]

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(answer(200, bodies.pop(), f"Content-Type: {kinds.pop()}"))

    async with serving(handle) as url:
        assert await post(url, {}) == {"a": 1}
        assert await post(url, {}) == "Caché."
        assert await post(url, {}) == "Caché."
        assert str(await post(url, {})) == "{'a': nan}"
