"""A parent for a server process that ends it, with all its children, when slime itself is gone.

    python watchdog.py FD -- COMMAND [ARGUMENT ...]

FD is the read end of a pipe whose only writer is the process that wants the server. The kernel closes that end when
its owner ends in any way, SIGKILL included; the watchdog then kills the whole process group. A parent-death signal
alone would not do: it follows the thread that forked, which may end long before its process, and it does not reach the
server's own children. It is set on the watchdog's child all the same, so that nothing is left when the watchdog itself is killed.

Runs as a script, by its path, with the standard library only: it must start in milliseconds and import nothing of
the package.
"""

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
    # The owner's process group signals are for the command, which has its own handlers; the watchdog only waits.
    for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    # preexec_fn is safe here: this process has one thread.
    child = subprocess.Popen(command, preexec_fn=_prepare_child, close_fds=True)  # noqa: PLW1509
    child_ended, wake_up = os.pipe()
    os.set_blocking(wake_up, False)
    signal.set_wakeup_fd(wake_up)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while child.poll() is None:
        readable, _, _ = select.select([owner_alive, child_ended], [], [], 1.0)
        if child_ended in readable:
            os.read(child_ended, 4096)
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
    """The owner is gone: ask the group to end, then kill it, this process included."""
    os.killpg(0, signal.SIGTERM)
    try:
        child.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        pass
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
