"""SIGTERM is noted, and a second one ends the process."""

import os
import signal
import subprocess
import sys

import pytest

from slime.ray.leaving import Leaving, Preempted


def test_sigterm_is_noted_and_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    leaving = Leaving()
    leaving.install()
    leaving.raise_if_asked()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Preempted):
        leaving.raise_if_asked()
    leaving.restore()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_sigterm_ends_the_process() -> None:
    program = (
        "import os, signal; from slime.ray.leaving import Leaving; leaving = Leaving(); leaving.install()\n"
        "os.kill(os.getpid(), signal.SIGTERM); print(leaving.is_asked, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGTERM); print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGTERM
    assert done.stdout == "True\n"
