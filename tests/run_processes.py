"""What a run has on this machine, read from /proc: its processes, by the marker in their environment, and sockets."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil

from slime.utils.reaper import TOKEN_VARIABLE, marked_processes

LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")


@dataclass(frozen=True)
class OpenSocket:
    """A TCP socket that listens, or a UDP socket that is bound and takes from anybody."""

    pid: int
    command: str
    kind: str
    address: str
    port: int

    @property
    def is_on_loopback(self) -> bool:
        return self.address in LOOPBACK


def marked_pids(token: str) -> list[int]:
    """Processes that carry this run's marker, whoever their parent is now; the driver itself does not."""
    return sorted(marked_processes(token))


def token_of(driver_pid: int) -> str | None:
    """The marker that a driver gave its children; None while it has none."""
    for process in psutil.Process(driver_pid).children(recursive=True):
        try:
            token = process.environ().get(TOKEN_VARIABLE)
        except (psutil.Error, OSError):
            continue
        if token is not None and token != os.environ.get(TOKEN_VARIABLE):
            return token
    return None


def open_sockets(pids: list[int]) -> list[OpenSocket]:
    """Every socket of these processes at which somebody could knock; processes that have just ended have none."""
    found = []
    for pid in pids:
        try:
            process = psutil.Process(pid)
            command = " ".join(process.cmdline())[:120].strip()
            connections = process.net_connections("inet")
        except psutil.Error:
            continue
        for connection in connections:
            is_tcp = connection.type == psutil.socket.SOCK_STREAM
            if connection.laddr and (connection.status == psutil.CONN_LISTEN if is_tcp else not connection.raddr):
                kind = "tcp" if is_tcp else "udp"
                found.append(OpenSocket(pid, command, kind, connection.laddr.ip, connection.laddr.port))
    return found


def wait_until(condition: Callable[[], Any], timeout_s: float, interval_s: float = 0.05) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not true within {timeout_s:g} s: {getattr(condition, '__name__', '')}"
        time.sleep(interval_s)
    return value
