"""Requests: what is retried, what is not, what the errors say, and that each request ends."""

import asyncio
import json
import subprocess
import sys
from argparse import Namespace

import httpx
import pytest

from slime.utils import http_utils
from slime.utils.http_utils import generation_replies, get, post, stream_post

URL = "http://engine.test/generate"


@pytest.fixture
def serve(monkeypatch):
    """Answers requests by the given handler and remembers them."""
    monkeypatch.setattr(http_utils, "RETRY_INTERVAL_S", 0.0)

    def install(handler):
        seen = []

        async def handle(request):
            seen.append(json.loads(request.content) if request.content else None)
            answer = handler(len(seen), request)
            answer = await answer if asyncio.iscoroutine(answer) else answer
            if isinstance(answer, Exception):
                raise answer
            return answer

        client = httpx.AsyncClient(transport=httpx.MockTransport(handle))
        monkeypatch.setattr(http_utils, "_http_client", client)
        return seen

    return install


async def test_json_is_parsed_and_other_replies_are_text(serve):
    serve(
        lambda n, request: httpx.Response(200, json={"a": 1}) if n == 1 else httpx.Response(200, text="Cache flushed.")
    )
    assert await post(URL, {}) == {"a": 1}
    assert await get(URL) == "Cache flushed."


@pytest.mark.parametrize(
    "failure",
    [
        httpx.ConnectError("refused"),
        httpx.ReadError("reset"),
        httpx.RemoteProtocolError("closed"),
        httpx.ConnectTimeout("slow"),
        httpx.Response(429),
        httpx.Response(500),
        httpx.Response(503, text="no_available_workers"),
    ],
)
async def test_a_failure_of_the_connection_or_the_server_is_tried_again_with_the_same_payload(serve, failure):
    seen = serve(lambda n, request: failure if n < 3 else httpx.Response(200, json={"n": n}))
    assert await post(URL, {"rid": "r1", "input_ids": [1]}) == {"n": 3}
    assert seen == [{"rid": "r1", "input_ids": [1]}] * 3


@pytest.mark.parametrize("status", [400, 404, 409, 422])
async def test_a_refusal_is_raised_at_once_with_the_servers_words(serve, status):
    seen = serve(lambda n, request: httpx.Response(status, text="unknown field `bogus`"))
    with pytest.raises(httpx.HTTPStatusError, match=f"POST {URL} was answered with {status}: unknown field `bogus`"):
        await post(URL, {"bogus": 2})
    assert len(seen) == 1


async def test_a_wrong_url_is_not_tried_again(serve):
    seen = serve(lambda n, request: httpx.UnsupportedProtocol("what is gopher?"))
    with pytest.raises(httpx.UnsupportedProtocol):
        await post(URL, {})
    assert len(seen) == 1


async def test_the_last_attempts_error_tells_how_many_there_were(serve):
    seen = serve(lambda n, request: httpx.ConnectError("refused"))
    with pytest.raises(httpx.ConnectError, match=f"POST {URL} failed 3 times.*refused"):
        await post(URL, {}, max_retries=2)
    assert len(seen) == 3
    serve(lambda n, request: httpx.Response(503, text="no_available_workers"))
    with pytest.raises(httpx.HTTPStatusError, match=r"503: no_available_workers.*2 attempts"):
        await post(URL, {}, max_retries=1)


async def test_a_server_that_never_answers_meets_the_deadline(serve):
    async def never():
        await asyncio.sleep(60)

    serve(lambda n, request: never())
    with pytest.raises(TimeoutError, match=r"no reply within 0.05 s \(1 attempts\)"):
        await post(URL, {}, timeout_s=0.05)


async def test_replies_that_are_still_on_their_way_are_waited_for_but_not_for_ever(serve):
    """Also those whose request failed or was given up count no more."""
    may_answer = asyncio.Event()

    async def answer(n, request):
        if request.url.path == "/generate":
            await may_answer.wait()
        return httpx.Response(200, json={})

    serve(answer)
    cancelled, asked = (asyncio.create_task(post(URL, {})) for _ in range(2))
    await asyncio.sleep(0)
    await post("http://engine.test/pause_generation", {})
    cancelled.cancel()
    await generation_replies(0.02)
    assert not asked.done()
    waiting = asyncio.create_task(generation_replies(20))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    may_answer.set()
    await asyncio.wait_for(waiting, 5)
    assert asked.done()


async def test_the_deadline_covers_all_attempts_and_tells_the_last_failure(serve, monkeypatch):
    monkeypatch.setattr(http_utils, "RETRY_INTERVAL_S", 0.02)
    serve(lambda n, request: httpx.ConnectError("refused"))
    with pytest.raises(TimeoutError, match="refused"):
        await post(URL, {}, max_retries=10_000, timeout_s=0.1)


async def test_events_are_yielded_until_done(serve):
    body = 'data: {"n": 1}\n\n: comment\n\ndata: {"n": 2}\n\ndata: [DONE]\n\ndata: {"n": 3}\n\n'
    serve(lambda n, request: httpx.Response(200, text=body))
    assert [event async for event in stream_post(URL, {})] == [{"n": 1}, {"n": 2}]
    serve(lambda n, request: httpx.Response(400, text="bad"))
    with pytest.raises(httpx.HTTPStatusError, match="400: bad"):
        [event async for event in stream_post(URL, {})]


async def test_the_clients_of_two_loops_are_two(monkeypatch):
    args = Namespace(sglang_server_concurrency=8, rollout_num_engines=3, sglang_router_request_timeout_secs=77)
    monkeypatch.setattr(http_utils, "_settings", http_utils._settings)
    http_utils.init_http_client(args)
    assert (http_utils._settings.max_connections, http_utils._settings.deadline_s) == (24, 77.0)
    here = http_utils._client()
    assert http_utils._client() is here

    async def there():
        return http_utils._client()

    assert await asyncio.to_thread(lambda: asyncio.run(there())) is not here
    assert here.trust_env is False


@pytest.mark.parametrize(
    ("args", "engines"),
    [
        ({"rollout_num_engines": 5}, 5),
        ({"rollout_num_engines": None, "rollout_num_gpus": 8, "rollout_num_gpus_per_engine": 2}, 4),
        ({"rollout_num_gpus": 1, "rollout_num_gpus_per_engine": 2}, 1),
        ({"rollout_num_gpus": 0, "rollout_num_gpus_per_engine": 2}, 0),
    ],
)
def test_the_number_of_engines_is_given_or_follows_from_devices(args, engines):
    assert http_utils.get_rollout_num_engines(Namespace(**args)) == engines


def test_the_host_address_can_be_given(monkeypatch):
    monkeypatch.setenv("SLIME_HOST_IP", "10.1.2.3")
    assert http_utils.get_host_info()[1] == "10.1.2.3"
    monkeypatch.delenv("SLIME_HOST_IP")
    assert http_utils.get_host_info()[1].count(".") == 3 or ":" in http_utils.get_host_info()[1]
    assert http_utils._wrap_ipv6("::1") == "[::1]"
    assert http_utils._wrap_ipv6("[::1]") == "[::1]"
    assert http_utils._wrap_ipv6("127.0.0.1") == "127.0.0.1"


def test_an_available_port_lies_above_its_base():
    port = http_utils.find_available_port(20000)
    assert port >= 20100
    assert http_utils.is_port_available(port)
    assert not http_utils.is_port_available(70000)


def test_a_process_that_made_requests_ends_without_a_word_of_open_sessions() -> None:
    """Whether its loops run, were closed or were left open; aiohttp would report each as an error."""
    program = """
import asyncio, logging, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from slime.utils import async_utils, http_utils
logging.basicConfig()
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200); self.send_header("Content-Length", "2"); self.end_headers(); self.wfile.write(b"{}")
    def log_message(self, *args): pass
from http.server import ThreadingHTTPServer
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/"
assert asyncio.run(http_utils.post(url, {})) == {}
assert async_utils.run(http_utils.post(url, {})) == {}
left = asyncio.new_event_loop()
assert left.run_until_complete(http_utils.post(url, {})) == {}
print("done")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")
