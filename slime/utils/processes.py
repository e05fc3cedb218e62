"""Server processes: started in a group of their own, watched until healthy, and never left behind.

Free of Ray and torch, so that tests and small tools can start an engine or a router as the framework does.
"""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from slime.utils import watchdog
from slime.utils.api_key import ADMIN_VARIABLE, KEY_VARIABLE

_POLL_S = 0.2
_PROBE_TIMEOUT_S = 5.0
_KILL_TIMEOUT_S = 5.0
_TAIL_LINES = 30
_ERROR_LINES = 200
_ERROR_CHARS = 400
_ERROR = re.compile(r"[A-Za-z_][\w.]*(Error|Exception)(: .*)?")  # the last line of Python's traceback, or its first

_pipes_of_this_process: set[int] = set()
"""Write ends whose closing ends a server; never to be held open by a forked child."""


def _close_inherited_pipes() -> None:
    for descriptor in _pipes_of_this_process:
        os.close(descriptor)
    _pipes_of_this_process.clear()


os.register_at_fork(after_in_child=_close_inherited_pipes)


class ServerError(RuntimeError):
    """A server process did not start, ended too early, or did not end; the message ends with its last log lines."""


class ServerProcess:
    """One server: a child in its own session that ends when this process ends, however it ends.

    The child runs under `slime.utils.watchdog`, which holds the read end of a pipe whose write end lives here: any
    thread may start a server, and killing this process with SIGKILL still takes the server and its children along.
    A fork of this process does not own the server: it closes its copy of the pipe, and `terminate` there does nothing.
    """

    def __init__(self, name: str, argv: Sequence[str], env: Mapping[str, str], log_path: Path | str):
        """
        Args:
            name: how errors call it, e.g. "engine 0".
            argv: its command line.
            env: its whole environment (start from `os.environ`).
            log_path: receives its standard output and error; appended to, folders made. Only this user may read the
                log of a server that has a key, which SGLang writes into it; what is quoted of it does not have the key.
        """
        self.name = name
        self.argv = list(argv)
        self.env = dict(env)
        self.log_path = Path(log_path)
        self._keys = [key for variable in (KEY_VARIABLE, ADMIN_VARIABLE) if (key := self.env.get(variable))]
        self._process: subprocess.Popen[bytes] | None = None
        self._owner_alive: int | None = None
        self._owner_pid = os.getpid()
        self._log_start = 0
        self._ended_at: str | None = None

    def start(self) -> None:
        """Start the process; it is healthy only after `wait_until_healthy`."""
        if self._process is not None and self._process.poll() is None:
            raise ServerError(f"{self.name} is already running (pid {self._process.pid}).")
        self._close_pipe()
        self._owner_pid, self._ended_at = os.getpid(), None
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        read_end, write_end = os.pipe()
        try:
            with self.log_path.open("ab") as log:
                if self._keys:
                    os.fchmod(log.fileno(), 0o600)
                self._log_start = log.tell()
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", watchdog.__file__, str(read_end), "--", *self.argv],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self.env,
                    pass_fds=(read_end,),
                    start_new_session=True,
                )
        except BaseException:
            os.close(write_end)
            raise
        finally:
            os.close(read_end)
        self._owner_alive = write_end
        _pipes_of_this_process.add(write_end)

    def poll(self) -> int | None:
        """Its exit code (minus the signal's number if a signal ended it), or None while it runs or before `start`."""
        return None if self._process is None else self._process.poll()

    def how_it_ended(self) -> str | None:
        """None while it runs or before `start`; else how, when that was noticed, and its last log lines."""
        code = self.poll()
        if code is None:
            return None
        if self._ended_at is None:
            self._ended_at = time.strftime("%H:%M:%S")
        verb = "was " if code < 0 else "ended with "
        return f"{verb}{_how_it_ended(code)} at {self._ended_at}.{self._quoted_log()}"

    @property
    def pid(self) -> int | None:
        """Leader of the server's process group, or None before `start`."""
        return None if self._process is None else self._process.pid

    @property
    def server_pid(self) -> int | None:
        """The server itself: the watchdog's child where this system tells, else the watchdog; None when not running."""
        if self._process is None or self._process.poll() is not None:
            return None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        with contextlib.suppress(OSError):
            if found := children.read_text().split():
                return int(found[0])
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Started and not ended."""
        return self._process is not None and self._process.poll() is None

    def wait_until_healthy(self, url: str, timeout_s: float) -> None:
        """Poll `url` until it answers 200.

        Raises:
            ServerError: the process ended, or `timeout_s` passed; names it, how it ended, and its last log lines.
        """
        deadline = time.monotonic() + timeout_s
        last_answer = "nothing listened"
        while True:
            if self._process is None:
                raise ServerError(f"{self.name} was never started, so {url} cannot answer: call start() first.")
            if (code := self._process.poll()) is not None:
                raise ServerError(
                    f"{self.name} ended before {url} answered: {_how_it_ended(code)}.{self._quoted_log()}"
                )
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise ServerError(
                    f"{self.name} (pid {self._process.pid}) runs, but {url} did not answer 200 within {timeout_s:g} s "
                    f"(last answer: {last_answer}).{self._quoted_log()}"
                )
            status, last_answer = _probe(url, min(_PROBE_TIMEOUT_S, left_s))
            if status == 200:
                return
            time.sleep(min(_POLL_S, max(0.0, deadline - time.monotonic())))

    def terminate(self, timeout_s: float = 10.0) -> None:
        """End it and everything it started: SIGTERM, then SIGKILL to its group at its end or after `timeout_s`.

        Safe to call again.
        """
        process, pipe = self._process, self._owner_alive
        if process is None or self._owner_pid != os.getpid():
            return
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
        # Also where the server itself ended in time: a child of its own may have outlived it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        try:
            process.wait(_KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise ServerError(f"{self.name} (pid {process.pid}) survived SIGKILL for {error.timeout:g} s.") from error
        if self._owner_alive == pipe:  # else another thread has started it again meanwhile
            self._close_pipe()

    def log_tail(self, n: int = _TAIL_LINES) -> str:
        """The last `n` lines that it wrote since its last start, without its keys."""
        if not self.log_path.exists():
            return ""
        with self.log_path.open("rb") as log:
            tail = "\n".join(_last_lines(log, self._log_start, n))
        for key in self._keys:
            tail = tail.replace(key, "***")
        return tail

    def _last_error(self) -> str:
        """The last exception that it wrote of lately, whatever it wrote after that: many ranks end in many words."""
        errors = [line for line in self.log_tail(_ERROR_LINES).splitlines() if _ERROR.fullmatch(line)]
        return f" The last error in its log: {errors[-1][:_ERROR_CHARS]}" if errors else ""

    def _close_pipe(self) -> None:
        if self._owner_alive is not None and self._owner_alive in _pipes_of_this_process:
            _pipes_of_this_process.remove(self._owner_alive)
            os.close(self._owner_alive)
        self._owner_alive = None

    def _quoted_log(self) -> str:
        tail = self.log_tail()
        if not tail:
            return f" Its log {self.log_path} is empty."
        return f"{self._last_error()}\nLast lines of {self.log_path}:\n{tail}"


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that was free on `host` a moment ago; given once, and to one process of this machine at a time.

    The owners of eight engines that start together draw some thirty ports: one in thirty times two would be the same,
    and both be free until the servers bind them, half a minute later. It lies below the range from which the kernel
    takes ports for outgoing connections: one of those would else have it by then on a busy machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for _ in range(_PORT_TRIES):
        port = _dice.randrange(*_server_ports())
        with socket.socket(family, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            if _claim(port):
                return port
    raise ServerError(f"{_PORT_TRIES} ports of {host} among {_server_ports()} were all taken: end what listens there.")


_PORT_TRIES = 1000
_dice = random.SystemRandom()  # not the seeded one: runs that start together must not draw the same
_claims: dict[int, socket.socket] = {}
"""Port -> what keeps other processes from giving it, for as long as this one lives."""


def _claim(port: int) -> bool:
    """Whether nobody has given this port before: nobody on this machine where the kernel can tell, else not this
    process. A name in Linux's abstract namespace goes with the process that holds it."""
    if port in _claims:
        return False
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if sys.platform == "linux":
            claim.bind(f"\0slime-port-{port}")
    except OSError:
        claim.close()
        return False
    _claims[port] = claim
    return True


def _server_ports() -> tuple[int, int]:
    """First and last + 1 of the ports for servers."""
    try:
        first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first_outgoing = 32768
    return (20000, first_outgoing) if first_outgoing >= 24000 else (61000, 65536)


def _probe(url: str, timeout_s: float) -> tuple[int | None, str]:
    """Status of one GET without proxies, and what happened in words."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout_s) as reply:
            return reply.status, f"status {reply.status}"
    except urllib.error.HTTPError as error:
        return error.code, f"status {error.code}"
    except (OSError, ValueError) as error:
        return None, str(error)


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _last_lines(log: IO[bytes], start: int, n: int) -> list[str]:
    """Decode the last `n` lines of a file, looking at no more than its last 256 KiB and nothing before `start`."""
    size = log.seek(0, os.SEEK_END)
    log.seek(max(start, size - 256 * 1024))
    return log.read().decode("utf-8", "replace").splitlines()[-n:] if n > 0 else []
