"""Nothing of a run outlives its driver, be it stopped, deaf to SIGTERM or adopted; and nothing else is hit."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slime.utils import reaper, run_marker
from tests.run_processes import marked_pids, wait_until

ROOT = Path(__file__).resolve().parents[3]
SLEEPS = "import time; print('up', flush=True); time.sleep(600)"
IGNORES_SIGTERM = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEPS
TAKES_A_TITLE = "import ray, setproctitle; setproctitle.setproctitle('ray::Agent'); " + SLEEPS  # ray brings it along
DOUBLE_FORKS = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
os.wait()
"""
DRIVER = """
import os, signal, subprocess, sys, time
from pathlib import Path
from slime.utils.run_marker import RunMarker, deaf_to_ctrl_c, folder_prefix, leaves_when_told
marker = None
def start():
    global marker
    marker = RunMarker.start(sys.argv[1], grace_s=1.0)
    for code in sys.argv[3:]:
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, start_new_session=True)
    Path(sys.argv[2]).write_text(f"{marker.token} {marker.reaper_pid}")
"""
WAITS = "start(); time.sleep(600)"
ENDS = "start(); marker.leaving(); marker.finish()"
CLEANS_UP = """
try:
    with leaves_when_told():
        start()
        time.sleep(600)
finally:
    with deaf_to_ctrl_c():
        time.sleep(0.5)
        Path(sys.argv[2] + ".cleaned").touch()
        marker.leaving()
        marker.finish()
"""
IS_STUCK = """
signal.signal(signal.SIGINT, lambda *_: None)
with leaves_when_told():
    start()
    while True:
        time.sleep(600)
"""
FORKS = """
start()
if os.fork() == 0:
    time.sleep(20)
    os._exit(0)
time.sleep(600)
"""


class Driver:
    """A process that has begun a run of a few sleepers."""

    def __init__(self, folder: Path, then: str, sleepers: list[str]) -> None:
        self.log, state = folder / "logs" / "reaper.log", folder / "state"
        command = [sys.executable, "-c", DRIVER + then, str(self.log), str(state), *sleepers]
        self.process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True)
        wait_until(lambda: state.exists() and state.read_text(), timeout_s=30)
        self.token, reaper_pid = state.read_text().split()
        self.reaper_pid = int(reaper_pid)

    def marked(self) -> list[int]:
        return marked_pids(self.token)

    def reaper_has_ended(self) -> bool:
        return not Path(f"/proc/{self.reaper_pid}/cmdline").exists() or not _words(self.reaper_pid)


def _words(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


Begin = Callable[..., Driver]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    drivers = []

    def make(*sleepers: str, then: str = WAITS, expected: int | None = None) -> Driver:
        driver = Driver(tmp_path, then, list(sleepers))
        drivers.append(driver)
        wait_until(lambda: len(driver.marked()) >= (len(sleepers) if expected is None else expected), timeout_s=30)
        return driver

    yield make
    for driver in drivers:
        driver.process.kill()
        driver.process.wait()
        reaper.kill_marked(driver.token)


def test_after_sigkill_of_the_driver_nothing_of_the_run_is_left(begin: Begin, tmp_path: Path) -> None:
    """Also what ignores SIGTERM, was adopted by another process, or is stopped; and the folder in memory."""
    driver = begin(SLEEPS, IGNORES_SIGTERM, DOUBLE_FORKS, expected=3)
    os.kill(driver.marked()[0], signal.SIGSTOP)
    folder = Path("/dev/shm" if os.path.isdir("/dev/shm") else "/tmp") / f"slime-weights-{driver.token}-x"
    folder.mkdir()
    (folder / "bucket").write_bytes(b"\0" * 100)
    driver.process.kill()
    wait_until(lambda: not driver.marked() and not folder.exists(), timeout_s=10)
    wait_until(driver.reaper_has_ended, timeout_s=5)
    assert driver.log.read_text().count("which outlived its run") == 3


def test_a_process_that_takes_a_title_is_still_known_as_the_runs(begin: Begin) -> None:
    """setproctitle writes titles over the environment, unless it is told not to."""
    driver = begin(TAKES_A_TITLE)
    (pid,) = driver.marked()
    wait_until(lambda: _words(pid).startswith(b"ray::Agent"), timeout_s=60)
    assert driver.marked() == [pid]
    driver.process.kill()
    wait_until(lambda: not _words(pid), timeout_s=10)


def test_what_belongs_to_another_run_or_to_none_is_left_alone(begin: Begin) -> None:
    driver = begin(SLEEPS)
    variable, token = reaper.TOKEN_VARIABLE, driver.token
    others = [
        {variable: token[:-1]},
        {variable: token + "0"},
        {f"X{variable}": token},
        {"ABOUT": f"{variable}={token}"},
    ]
    left_alone = [subprocess.Popen([sys.executable, "-c", SLEEPS], env=env) for env in others]
    try:
        driver.process.kill()
        wait_until(driver.reaper_has_ended, timeout_s=10)
        assert not driver.marked()
        assert [process.poll() for process in left_alone] == [None] * 4
    finally:
        for process in left_alone:
            process.kill()
            process.wait()


def test_a_run_that_ends_by_itself_leaves_nothing_and_waits_for_that(begin: Begin) -> None:
    driver = begin(IGNORES_SIGTERM, then=ENDS, expected=0)
    assert driver.process.wait(20) == 0
    assert not driver.marked()
    wait_until(driver.reaper_has_ended, timeout_s=5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_whole_terminal_lets_the_driver_clean_up(begin: Begin, number: int, tmp_path: Path) -> None:
    """The reaper and its driver share the terminal; the driver still cleans up while Ctrl-C is pressed again."""
    driver = begin(SLEEPS, then=CLEANS_UP)
    for _ in range(3):
        os.killpg(driver.process.pid, number)
        time.sleep(0.3)
    driver.process.wait(15)
    assert (tmp_path / "state.cleaned").exists()
    assert not driver.marked()


def test_a_driver_that_cannot_react_to_ctrl_c_is_ended_with_its_run(begin: Begin) -> None:
    """The signal's number reaches the reaper although the handler does nothing of use."""
    driver = begin(SLEEPS, then=IS_STUCK)
    os.kill(driver.process.pid, signal.SIGINT)
    assert driver.process.wait(12) == -signal.SIGKILL
    wait_until(lambda: not driver.marked(), timeout_s=3)
    wait_until(lambda: "killed the driver" in driver.log.read_text(), timeout_s=3)


def test_without_its_reaper_a_run_goes_on(begin: Begin) -> None:
    driver = begin(SLEEPS)
    os.kill(driver.reaper_pid, signal.SIGKILL)
    wait_until(driver.reaper_has_ended, timeout_s=5)
    assert driver.process.poll() is None
    assert len(driver.marked()) == 1


def test_a_forked_child_of_the_driver_does_not_keep_the_run_alive(begin: Begin) -> None:
    driver = begin(SLEEPS, then=FORKS)
    driver.process.kill()
    wait_until(lambda: not driver.marked(), timeout_s=10)


def test_a_process_has_one_run_at_a_time(tmp_path: Path) -> None:
    marker = run_marker.RunMarker.start(tmp_path / "log")
    try:
        assert os.environ[reaper.TOKEN_VARIABLE] == marker.token
        assert run_marker.folder_prefix("weights") == f"slime-weights-{marker.token}-"
        with pytest.raises(RuntimeError, match="already has a run"):
            run_marker.RunMarker.start(tmp_path / "log")
    finally:
        marker.finish()
    assert reaper.TOKEN_VARIABLE not in os.environ
    assert run_marker.folder_prefix("weights") == "slime-weights-"
