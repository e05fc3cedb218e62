"""A twenty-line engine for the client's tests: it records what it is asked and answers what a test tells it."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class FakeEngine:
    """Answers `replies[path]` = (status, body); a list of replies is used up one by one but for the last."""

    def __init__(self) -> None:
        self.replies: dict[str, Any] = {}
        self.asked: list[tuple[str, str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.delay_s = 0.0
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def reply_to(self, path: str) -> tuple[int, Any]:
        replies = self.replies.get(path, (404, {"detail": "Not Found"}))
        if isinstance(replies, list):
            return replies.pop(0) if len(replies) > 1 else replies[0]
        return replies

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                engine.asked.append((self.command, self.path, json.loads(body) if body else None))
                engine.headers.append({name.lower(): value for name, value in self.headers.items()})
                engine.closing.wait(engine.delay_s)
                status, reply = engine.reply_to(self.path.partition("?")[0])
                data = reply.encode() if isinstance(reply, str) else json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = answer

            def log_message(self, *args: object) -> None:
                pass

        return Handler


@pytest.fixture
def fake_engine() -> Iterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    engine.close()
