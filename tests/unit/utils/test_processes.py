"""Servers are watched while they start, end with their whole family, and never outlive their owner."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from slime.utils import processes
from slime.utils.processes import ServerError, ServerProcess, free_port

SERVE = """
import http.server, sys
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 503); self.end_headers()
    def log_message(self, *a): pass
print("serving", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), H).serve_forever()
"""
HAS_CHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
time.sleep(600)
"""
IGNORES_SIGTERM = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, timeout_s: float = 60.0):
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)
    return value


def word_after(log_path: Path, word: str) -> int | None:
    words = log_path.read_text().split() if log_path.exists() else []
    return int(words[words.index(word) + 1]) if word in words[:-1] else None


@pytest.fixture
def launch(tmp_path):
    servers = []

    def make(code: str, *arguments: str, name: str = "engine 3") -> ServerProcess:
        server = ServerProcess(name, python(code, *arguments), dict(os.environ), tmp_path / "logs" / "server.log")
        servers.append(server)
        server.start()
        return server

    yield make
    for server in servers:
        server.terminate(1.0)


def test_a_server_is_healthy_once_its_url_answers_200(launch):
    port = free_port()
    server = launch(SERVE, str(port))
    server.wait_until_healthy(f"http://127.0.0.1:{port}/health", 20)
    assert server.is_running and server.poll() is None
    server.terminate(5)
    assert not server.is_running
    assert server.poll() == -signal.SIGTERM


def test_a_death_at_start_is_reported_at_once_with_name_exit_code_and_last_log_lines(launch):
    server = launch("import sys\nfor i in range(99): print('line', i, flush=True)\nsys.exit('no such model')")
    started = time.monotonic()
    with pytest.raises(ServerError) as caught:
        server.wait_until_healthy("http://127.0.0.1:1/health", 60)
    assert time.monotonic() - started < 20
    message = str(caught.value)
    assert "engine 3" in message and "exit code 1" in message and "server.log" in message
    assert message.endswith("line 98\nno such model")
    assert "line 1\n" not in message


def test_a_death_by_signal_is_reported_by_the_signals_name(launch):
    server = launch("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(ServerError, match=r"killed by SIGKILL.*log .* is empty"):
        server.wait_until_healthy("http://127.0.0.1:1/health", 60)
    assert server.poll() == -signal.SIGKILL


def test_waiting_has_a_deadline_and_tells_the_last_answer(launch):
    port = free_port()
    server = launch(SERVE, str(port))
    with pytest.raises(ServerError, match=r"engine 3 .*did not answer 200 within 3 s \(last answer: status 503\)"):
        server.wait_until_healthy(f"http://127.0.0.1:{port}/busy", 3)
    assert server.is_running


def test_terminate_takes_the_servers_children_along(launch):
    server = launch(HAS_CHILD)
    child = wait_for(lambda: word_after(server.log_path, "child"))
    server.terminate(5)
    wait_for(lambda: not alive(child))


def test_a_server_that_ignores_sigterm_is_killed_after_the_timeout(launch):
    server = launch(IGNORES_SIGTERM)
    wait_for(lambda: server.log_tail() == "up")
    started = time.monotonic()
    server.terminate(0.5)
    assert 0.4 < time.monotonic() - started < 10
    assert not server.is_running


OWNER = """
import os, sys, time
from slime.utils.processes import ServerProcess
server = ServerProcess("engine 0", [sys.executable, "-c", sys.argv[1]], dict(os.environ), sys.argv[2])
server.start()
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_and_its_children_do_not_outlive_the_process_that_started_it(tmp_path, ending):
    log_path = tmp_path / "server.log"
    owner = subprocess.Popen(python(OWNER, HAS_CHILD, str(log_path)), stdout=subprocess.PIPE)
    try:
        assert owner.stdout is not None and owner.stdout.readline() == b"ready\n"
        child = wait_for(lambda: word_after(log_path, "child"))
        server_group = os.getpgid(child)
    finally:
        owner.send_signal(ending)
        owner.wait(10)
    wait_for(lambda: not alive(child) and not alive(server_group))


def test_a_server_started_by_a_thread_outlives_that_thread(launch):
    """The parent-death signal follows the forking thread; ours follows the process."""
    servers = []
    thread = threading.Thread(target=lambda: servers.append(launch(IGNORES_SIGTERM)))
    thread.start()
    thread.join()
    wait_for(lambda: servers[0].log_tail() == "up")
    time.sleep(0.3)
    assert servers[0].is_running


def test_a_fork_of_the_owner_neither_keeps_the_server_alive_nor_ends_it(tmp_path):
    """The fork calls terminate (nothing happens) and stays; then the owner is killed and the server goes."""
    forking_owner = OWNER.replace(
        'print("ready", flush=True)',
        'print("ready", flush=True)\nif os.fork() == 0:\n    server.terminate()\n    print(os.getpid(), flush=True)',
    )
    log_path = tmp_path / "server.log"
    owner = subprocess.Popen(python(forking_owner, HAS_CHILD, str(log_path)), stdout=subprocess.PIPE)
    assert owner.stdout is not None and owner.stdout.readline() == b"ready\n"
    fork = int(owner.stdout.readline())
    try:
        child = wait_for(lambda: word_after(log_path, "child"))
        time.sleep(0.3)
        assert alive(child)
        owner.kill()
        owner.wait(10)
        wait_for(lambda: not alive(child))
        assert alive(fork)
    finally:
        os.kill(fork, signal.SIGKILL)


def test_a_restart_shows_only_the_new_runs_log(launch):
    server = launch("print('first'); raise SystemExit(3)")
    wait_for(lambda: server.poll() is not None)
    assert server.log_tail() == "first"
    server.argv = python("print('second'); raise SystemExit(3)")
    server.start()
    wait_for(lambda: server.poll() is not None)
    assert server.log_tail() == "second"


def test_starting_twice_is_refused(launch):
    server = launch(IGNORES_SIGTERM)
    with pytest.raises(ServerError, match="engine 3 is already running"):
        server.start()


def test_a_missing_program_is_an_error_that_names_it(tmp_path):
    server = ServerProcess("router", ["/no/such/program"], {}, tmp_path / "router.log")
    server.start()
    with pytest.raises(ServerError, match=r"(?s)router ended before .*/no/such/program"):
        server.wait_until_healthy("http://127.0.0.1:1/", 20)


def test_free_ports_can_be_bound():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))


def test_a_free_port_is_never_one_that_an_outgoing_connection_could_take():
    first_outgoing, last_outgoing = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) == 50
    assert not [port for port in ports if first_outgoing <= port <= last_outgoing]


def test_a_port_that_is_taken_is_not_free(monkeypatch):
    taken, free = free_port(), free_port()
    draws = iter([taken, free])
    monkeypatch.setattr(processes, "_claim", lambda port: True)
    monkeypatch.setattr(processes._dice, "randrange", lambda *_: next(draws))
    with socket.create_server(("127.0.0.1", taken)):
        assert free_port() == free


def test_a_port_that_another_process_was_given_is_not_given_while_it_lives(monkeypatch):
    """Neither has bound it yet: what owns an engine takes a port, and the server binds it half a minute later."""
    code = "from slime.utils.processes import free_port; print(free_port(), flush=True); input()"
    with subprocess.Popen(python(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        taken = int(other.stdout.readline())
        draws = [taken]
        monkeypatch.setattr(processes._dice, "randrange", lambda *_: draws[-1])
        with pytest.raises(ServerError, match="were all taken"):
            free_port()
        other.communicate("\n")
    assert free_port() == taken
    with pytest.raises(ServerError, match="were all taken"):
        free_port()


def test_the_log_of_a_server_with_a_key_is_its_users_and_quoted_without_the_key(tmp_path):
    """SGLang writes all of its arguments into its log."""
    env = {**os.environ, "SLIME_API_KEY": "secret", "SLIME_ADMIN_API_KEY": "more"}
    code = "print(\"ServerArgs(api_key='secret', admin_api_key='more')\"); raise SystemExit(1)"
    server = ServerProcess("engine 3", python(code), env, tmp_path / "server.log")
    server.start()
    with pytest.raises(ServerError) as failure:
        server.wait_until_healthy(f"http://127.0.0.1:{free_port()}/health", 60)
    assert str(failure.value).endswith("ServerArgs(api_key='***', admin_api_key='***')")
    assert (tmp_path / "server.log").stat().st_mode & 0o777 == 0o600


def test_the_error_of_a_server_that_ends_is_told_first_whatever_it_wrote_after_it(launch):
    code = """
print("Traceback (most recent call last):\\n  File ...\\ntorch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB")
for line in range(60): print(f"[rank {line}] frame #{line}: c10d::TCPStore::get")
raise SystemExit(3)
"""
    server = launch(code)
    with pytest.raises(ServerError) as failure:
        server.wait_until_healthy("http://127.0.0.1:1/health", 60)
    for text in (str(failure.value), server.how_it_ended()):
        assert "torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB" in text.splitlines()[0]
        assert text.endswith("[rank 59] frame #59: c10d::TCPStore::get")
