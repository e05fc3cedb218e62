"""Runs of `train.py` as a user starts them: another process, its own folder, judged by the files it leaves."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slime.observability.run_log import read_metrics
from slime.utils.reaper import kill_marked
from tests.contracts.engine.tiny_model import save_tiny_model
from tests.run_processes import marked_pids, token_of, wait_until

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

    def start(words: list[str], *, expect_exit_code: int = 0, program: str = "train.py") -> FinishedRun:
        cost_file = tmp_path / "cost.json"
        wrapper = [sys.executable, "scripts/cpu_time.py", "--write", str(cost_file), "--"]
        done = subprocess.run(
            [*wrapper, sys.executable, program, *words, "--output-dir", str(tmp_path), "--run-name", "run"],
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
def stock_python(repository: Path) -> Path:
    """An interpreter that has stock SGLang: the environment's, or what scripts/sglang_cpu/setup.sh makes."""
    folder = Path(os.environ.get("SLIME_SGLANG_VENV", repository / ".venv-sglang"))
    python = Path(os.environ.get("SLIME_SGLANG_PYTHON", folder / "bin" / "python"))
    assert python.exists(), f"no stock SGLang at {python}: run `bash scripts/sglang_cpu/setup.sh` first"
    return python


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


@pytest.fixture(scope="session")
def tiny_flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command line for a two-layer llama on one CPU device, in fp32."""
    folder = tmp_path_factory.mktemp("tiny")
    model = save_tiny_model(folder / "llama")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{a} + {a} =", "label": str(2 * a)}) + "\n" for a in range(24)))
    return [
        *("--hf-checkpoint", str(model), "--prompt-data", str(prompts), "--rm-type", "random", "--no-bf16"),
        *("--rollout-batch-size", "4", "--n-samples-per-prompt", "4", "--num-steps-per-rollout", "1"),
        *("--rollout-max-response-len", "8", "--lr", "1e-3", "--lr-decay-style", "constant"),
        *("--actor-num-gpus-per-node", "1", "--rollout-num-gpus", "1"),
    ]


class LiveRun:
    """A run that goes on while a test looks at it. Its process group is its own, as a terminal would make it."""

    def __init__(self, repository: Path, folder: Path, words: list[str], program: str = "train.py") -> None:
        self.folder, self.log_path = folder / "run", folder / "output.txt"
        command = [sys.executable, program, *words, "--output-dir", str(folder), "--run-name", "run"]
        environment = {**os.environ, "PYTHONPATH": str(repository)}
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=repository, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        self._token: str | None = None

    @property
    def output(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    @property
    def token(self) -> str:
        """The marker of its processes; waits until the driver has given it to one."""
        if self._token is None:
            self._token = wait_until(self._look_for_token, timeout_s=60)
        return self._token

    def _look_for_token(self) -> str | None:
        assert self.process.poll() is None, self.output[-6000:]
        return token_of(self.process.pid)

    def status(self) -> dict[str, Any]:
        """status.json; empty before the run has begun to write it."""
        try:
            return dict(json.loads((self.folder / "status.json").read_text()))
        except FileNotFoundError:
            return {}

    def wait_for_phase(self, phase: str, rollout_id: int | None = None, timeout_s: float = 240) -> None:
        """Return within milliseconds of the phase's begin (in that rollout or a later one, if one is named)."""

        def is_there() -> bool:
            assert self.process.poll() is None, self.output[-6000:]
            status = self.status()
            reached = rollout_id is None or (
                status.get("rollout_id") is not None and status["rollout_id"] >= rollout_id
            )
            return status.get("phase") == phase and reached

        wait_until(is_there, timeout_s, interval_s=0.005)

    def pids(self) -> list[int]:
        """All its living processes."""
        own = [self.process.pid] if self.process.poll() is None else []
        return own + marked_pids(self.token)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self._token is not None:
            kill_marked(self._token)


@pytest.fixture
def begin(repository: Path, tmp_path: Path) -> Iterator[Callable[..., LiveRun]]:
    """`begin(words)`: starts train.py with these flags and returns at once; whatever is left is killed at the end."""
    runs = []

    def start(words: list[str], program: str = "train.py") -> LiveRun:
        runs.append(LiveRun(repository, tmp_path, words, program))
        return runs[-1]

    yield start
    for run in runs:
        run.close()
