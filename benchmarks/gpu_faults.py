"""Processes of a run on GPUs are killed or stopped in mid-rollout: who is named, how soon, and how the run goes on.

    python benchmarks/gpu_faults.py --model MODEL --prompts data/gsm8k/train.jsonl -- [flags of train.py]

One run with --use-fault-tolerance and deadlines of 15 s: the engine gets SIGKILL, then the router, then the engine
SIGSTOP, and at last a trainer rank SIGKILL, which ends the run; the same command line then has to go on from the last
checkpoint. Exits with 1 where one of these did not happen.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ATTACKS = [
    ("engine", signal.SIGKILL),
    ("router", signal.SIGKILL),
    ("engine", signal.SIGSTOP),
    ("trainer", signal.SIGKILL),
]
DEADLINE_S = 15.0
RECOVERY_S = 240.0
START_S = 400.0


class Run:
    """One `train.py` and what its folder says of it."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.folder, self._log = folder, folder.parent / "driver.log"
        self._start = len(self.text) if self._log.exists() else 0
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)

    @property
    def text(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def own_text(self) -> str:
        return self.text[self._start :]

    def status(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.folder / "status.json").read_text()))
        except (OSError, ValueError):
            return {}

    def steps(self) -> list[int]:
        try:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        except OSError:
            return []
        return [step for step in (json.loads(line)["step"] for line in lines) if step >= 0]

    def wait(self, what: str, is_there: Any, timeout_s: float) -> float:
        """Seconds until it was; the run's end before that is an error with its last words."""
        started = time.monotonic()
        while not is_there():
            if self.process.poll() is not None:
                raise SystemExit(f"the run ended while waiting for {what}:\n{self.own_text[-3000:]}")
            if time.monotonic() - started > timeout_s:
                raise SystemExit(f"no {what} within {timeout_s:.0f} s:\n{self.own_text[-3000:]}")
            time.sleep(0.1)
        return time.monotonic() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="HuggingFace folder")
    parser.add_argument("--prompts", required=True, help="JSON lines with `prompt` and `label`")
    parser.add_argument("flags", nargs="*", help="more flags of train.py, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as parent:
        command = [
            sys.executable, "train.py", "--hf-checkpoint", options.model, "--prompt-data", options.prompts,
            "--input-key", "prompt", "--label-key", "label", "--apply-chat-template", "--rm-type", "random",
            "--num-rollout", "200", "--rollout-batch-size", "32", "--n-samples-per-prompt", "8",
            "--rollout-max-response-len", "400", "--num-steps-per-rollout", "1", "--use-dynamic-batch-size",
            "--max-tokens-per-gpu", "16384", "--advantage-estimator", "grpo", "--lr", "1e-6", "--save-interval", "1",
            "--keep-last", "1", "--use-fault-tolerance", "--rollout-health-check-timeout", str(DEADLINE_S),
            "--rollout-health-check-interval", "2", "--liveness-timeout", str(DEADLINE_S), "--output-dir", parent,
            "--run-name", "faults", *options.flags,
        ]  # fmt: skip
        return attack_all(command, Path(parent) / "faults")


def attack_all(command: list[str], folder: Path) -> int:
    rows: list[tuple[str, float, str]] = []
    run = Run(command, folder)
    try:
        rows.append(("start", run.wait("first step", lambda: len(run.steps()) >= 1, START_S), ""))
        for role, number in ATTACKS:
            rows.append(attack(run, role, number))
            print(rows[-1], flush=True)
        done = run.steps()[-1]
        run = Run(command, folder)
        seconds = run.wait("step after the resume", lambda: run.steps()[-1] > done, START_S)
        rows.append(("the same command line again", seconds, f"went on after step {done}"))
    finally:
        if run.process.poll() is None:
            run.process.terminate()
            run.process.wait(120)
    print("\n| attack | seconds until the next step (or the end) | what the run said |\n|---|---|---|")
    for name, seconds, words in rows:
        print(f"| {name} | {seconds:.1f} | {words} |")
    return 0


def attack(run: Run, role: str, number: signal.Signals) -> tuple[str, float, str]:
    """Hit a process in mid-rollout; returns what was done, the seconds until the run went on or ended, its words."""
    before = len(run.own_text)
    steps = run.steps()[-1]
    run.wait("rollout", lambda: run.steps()[-1] > steps and run.status().get("phase") == "generate", RECOVERY_S)
    time.sleep(0.7)
    process = next(p for p in run.status()["processes"] if p["role"] == role)
    steps = run.steps()[-1]
    os.kill(process["pid"], number)
    name = f"{number.name} of {process['name']}"
    if role == "trainer":
        started = time.monotonic()
        run.process.wait(RECOVERY_S)
        words = run.own_text[before:].strip().splitlines()
        error = next((line for line in words if line.startswith("train.py: error:")), words[-1])
        if process["name"] not in error:
            raise SystemExit(f"{name}: the run ended without naming it:\n{run.own_text[-3000:]}")
        return name, time.monotonic() - started, f"exit code {run.process.returncode}: {error}"
    seconds = run.wait("next step", lambda: run.steps()[-1] > steps, RECOVERY_S)
    words = [line for line in run.own_text[before:].splitlines() if process["name"] in line and "started again" in line]
    if not words:
        raise SystemExit(f"{name}: nothing was said of {process['name']}:\n{run.own_text[before:][-3000:]}")
    return name, seconds, words[0].split(" - ")[-1]


if __name__ == "__main__":
    sys.exit(main())
