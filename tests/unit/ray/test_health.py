"""Health checks: a server that stays silent is given up once, one that answers again is not."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from slime.ray.health import HealthMonitor


class Server:
    """Answers /health with `status`, after `delay_s`."""

    def __init__(self) -> None:
        self.status, self.delay_s, self.asked = 200, 0.0, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked += 1
                time.sleep(outer.delay_s)
                self.send_response(outer.status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/health"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()


@pytest.fixture
def monitor() -> Iterator[HealthMonitor]:
    monitor = HealthMonitor(interval_s=0.05, timeout_s=0.6)
    yield monitor
    monitor.close()


def watched(monitor: HealthMonitor, server: Server) -> tuple[threading.Event, list[str]]:
    given_up, reasons = threading.Event(), []

    def give_up(reason: str) -> None:
        reasons.append(reason)
        given_up.set()

    monitor.watch("engine 0", server.url, give_up)
    return given_up, reasons


@pytest.mark.parametrize(("status", "delay_s"), [(503, 0.0), (200, 2.0)])
def test_silence_and_refusal_beyond_the_limit_are_given_up_once(
    monitor: HealthMonitor, server: Server, status: int, delay_s: float
) -> None:
    server.status, server.delay_s = status, delay_s
    given_up, reasons = watched(monitor, server)
    assert given_up.wait(10)
    time.sleep(0.5)
    assert len(reasons) == 1
    assert server.url in reasons[0]
    assert ("status 503" if status == 503 else "no answer") in reasons[0]


def test_a_server_that_answers_again_in_time_is_kept(monitor: HealthMonitor, server: Server) -> None:
    server.status = 503
    given_up, _ = watched(monitor, server)
    while server.asked < 2:
        time.sleep(0.01)
    server.status = 200
    asked = server.asked
    while server.asked < asked + 5:
        time.sleep(0.01)
    assert not given_up.is_set()


def test_what_is_forgotten_is_asked_no_more(monitor: HealthMonitor, server: Server) -> None:
    watched(monitor, server)
    while server.asked < 2:
        time.sleep(0.01)
    monitor.forget("engine 0")
    time.sleep(0.2)
    asked = server.asked
    time.sleep(0.3)
    assert server.asked == asked
