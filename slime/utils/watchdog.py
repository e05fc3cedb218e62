"""A parent for a server process that ends it, with all its children, when slime itself is gone.

    python watchdog.py FD -- COMMAND [ARGUMENT ...]

FD is the read end of a pipe whose only writer is the process that wants the server. The kernel closes that end when
its owner ends in any way, SIGKILL included; the watchdog then kills the whole process group. A parent-death signal
alone would not do: it follows the thread that forked, which may end long before its process, and it does not reach the
server's own children. The server gets one all the same, so that it does not survive the watchdog.

Runs as a script, by its path, with the standard library only: it must start in milliseconds and import nothing of
the package.
"""

import contextlib
import ctypes
import os
import resource
import select
import signal
import subprocess
import sys
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
_GRACE_S = 5.0  # between SIGTERM and SIGKILL of a server whose owner is gone


def main(arguments: list[str]) -> NoReturn:
    """Run the command and end as it ends: with its exit code, or by the signal that killed it."""
    descriptor, separator, *command = arguments
    assert separator == "--" and command, f"usage: watchdog.py FD -- COMMAND, got {arguments}"
    owner_alive = int(descriptor)
    for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    # preexec_fn is safe here: this process has one thread.
    child = subprocess.Popen(command, preexec_fn=_prepare_child, close_fds=True)
    # To the server alone: it ends its own children in order, and takes a child that ends by itself for a crash.
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    wake_up_reader, wake_up_writer = os.pipe()
    os.set_blocking(wake_up_writer, False)
    signal.set_wakeup_fd(wake_up_writer)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while child.poll() is None:
        readable, _, _ = select.select([owner_alive, wake_up_reader], [], [], 1.0)
        if wake_up_reader in readable:
            os.read(wake_up_reader, 4096)
        if owner_alive in readable:
            _end_group(child)
    _exit_like(child.returncode)


def _prepare_child() -> None:
    """In the child, before exec: default signals, and SIGKILL when the watchdog dies."""
    for restored in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(restored, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_group(child: "subprocess.Popen[bytes]") -> NoReturn:
    """The owner is gone: ask the server to end, then kill the group, this process included."""
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_GRACE_S)
    os.killpg(0, signal.SIGKILL)
    raise AssertionError("unreachable: SIGKILL reached this process too")


def _exit_like(returncode: int) -> NoReturn:
    if returncode < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the server's core dump is the one worth having
        if -returncode != signal.SIGKILL:
            signal.signal(-returncode, signal.SIG_DFL)
        os.kill(os.getpid(), -returncode)
    sys.exit(returncode)


if __name__ == "__main__":
    main(sys.argv[1:])
