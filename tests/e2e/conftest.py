"""Runs of `train.py` as a user starts them: another process, its own folder, judged by the files it leaves."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slime.observability.run_log import read_metrics

RUN_TIMEOUT_S = 900


@dataclass(frozen=True)
class FinishedRun:
    """A run that ended, and what it left."""

    folder: Path
    exit_code: int
    output: str
    cost: dict[str, Any]

    @property
    def lines(self) -> list[dict[str, Any]]:
        """metrics.jsonl, the evaluation before the first step included (step -1)."""
        return read_metrics(self.folder)

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["step"] >= 0]

    def column(self, metric: str) -> list[float]:
        """The metric's value at every step that has one."""
        return [step[metric] for step in self.steps if step.get(metric) is not None]


Train = Callable[..., FinishedRun]


@pytest.fixture
def train(repository: Path, tmp_path: Path) -> Train:
    """`train(words)`: runs train.py with these flags; fails with the end of its output unless it exits with 0."""

    def start(words: list[str], *, expect_exit_code: int = 0) -> FinishedRun:
        cost_file = tmp_path / "cost.json"
        wrapper = [sys.executable, "scripts/cpu_time.py", "--write", str(cost_file), "--"]
        done = subprocess.run(
            [*wrapper, sys.executable, "train.py", *words, "--output-dir", str(tmp_path), "--run-name", "run"],
            cwd=repository,
            env={**os.environ, "PYTHONPATH": str(repository)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=RUN_TIMEOUT_S,
        )
        assert done.returncode == expect_exit_code, done.stdout[-6000:]
        return FinishedRun(tmp_path / "run", done.returncode, done.stdout, json.loads(cost_file.read_text()))

    return start


@pytest.fixture(scope="session")
def quickstart_data(repository: Path) -> Path:
    """The quick start's model and prompts; kept in the checkout's .cache, so made once."""
    folder = repository / ".cache" / "quickstart"
    command = [sys.executable, "examples/quickstart/prepare.py", "--out", str(folder)]
    subprocess.run(command, cwd=repository, check=True)
    return folder


@pytest.fixture(scope="session")
def quickstart_flags(repository: Path, quickstart_data: Path) -> list[str]:
    """The quick start's command line, without the flags that say where it writes."""
    script = 'DATA="$1" RUN_NAME=run; source examples/quickstart/args.sh; printf "%s\\0" "${ARGS[@]}"'
    words = subprocess.run(
        ["bash", "-c", script, "bash", str(quickstart_data)], cwd=repository, check=True, capture_output=True, text=True
    ).stdout.split("\0")[:-1]
    for flag in ("--run-name", "--save-hf"):
        at = words.index(flag)
        del words[at : at + 2]
    return words
