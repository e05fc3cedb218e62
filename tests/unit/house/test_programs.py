"""The `slime` command and the scripts' helpers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from slime import cli
from slime.config import Machine

DAEMON_THAT_NOBODY_WAITS_FOR = """
import os, signal, time
def burn(s):
    while time.process_time() < s: pass
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    if os.fork() == 0:
        burn(2.5)
        os._exit(0)
    time.sleep(4)
    os._exit(0)
burn(0.5)
"""


def test_cpu_time_counts_daemons_whose_parents_do_not_wait(repository: Path, tmp_path: Path) -> None:
    """0.5 s in the command and 2.5 s in a daemon's child, of which at most the last second may be missed."""
    command = [sys.executable, "scripts/cpu_time.py", "--write", tmp_path / "cost.json", "--"]
    subprocess.run([*command, sys.executable, "-c", DAEMON_THAT_NOBODY_WAITS_FOR], cwd=repository, check=True)
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert 1.9 <= cost["cpu_s"] <= 3.5


def test_cpu_time_counts_processes_too_short_to_be_seen(repository: Path, tmp_path: Path) -> None:
    """Ten children of 0.1 s each, all between two looks: their parent waited for them and knows."""
    burn = "import time\nwhile time.process_time() < 0.1: pass"
    script = f"import subprocess, sys\nfor _ in range(10): subprocess.run([sys.executable, '-S', '-c', {burn!r}])"
    command = [sys.executable, "scripts/cpu_time.py", "--write", tmp_path / "cost.json", "--"]
    subprocess.run([*command, sys.executable, "-c", script], cwd=repository, check=True)
    assert 0.9 <= json.loads((tmp_path / "cost.json").read_text())["cpu_s"] <= 2.5


@pytest.mark.parametrize("code", [0, 3])
def test_cpu_time_ends_with_the_commands_exit_code(repository: Path, code: int) -> None:
    command = [sys.executable, "scripts/cpu_time.py", "--", sys.executable, "-c", f"raise SystemExit({code})"]
    assert subprocess.run(command, cwd=repository, capture_output=True).returncode == code


def test_report_says_that_a_folder_is_not_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "metrics.jsonl is not there" in capsys.readouterr().err


def test_report_prints_the_gain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"step": step, "rollout/raw_reward": float(step >= 5), "perf/step_time": 2.0} for step in range(10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "+1.000" in capsys.readouterr().out


def test_flags_are_found_by_words_of_their_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["flags", "sampling", "temperature"]) == 0
    assert "--rollout-temperature  (slime, default 1.0)" in capsys.readouterr().out
    assert cli.main(["flags", "no-such-word-anywhere"]) == 1


def test_doctor_names_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "megatron-core" in out and "cores" in out


def test_a_flag_that_is_not_built_is_found_with_that_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["flags", "streaming-data"]) == 0
    assert "Not built yet." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("machine", "code", "words"),
    [
        (Machine(cores=8, num_gpus=1, has_sglang=True), 0, "generates with SGLang"),
        (Machine(cores=8, num_gpus=1), 1, "a run on the GPUs is refused"),
        (Machine(cores=8), 0, "the embedded engine generates"),
    ],
)
def test_doctor_says_what_a_run_would_do(
    machine: Machine, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("slime.config.machine.look_at_machine", lambda: machine)
    assert cli.main(["doctor"]) == code
    assert words in capsys.readouterr().out


def test_the_command_starts_without_large_packages(repository: Path) -> None:
    program = "import sys, slime.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=True)
    assert not {"torch", "ray", "numpy"} & set(done.stdout.split())
