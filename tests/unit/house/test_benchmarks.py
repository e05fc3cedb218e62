"""The benchmarks measure what they say; how fast anything is, no test asks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import tiny
from tests.unit.house.conftest import Programs


@pytest.fixture
def cpu_step(program: Programs) -> dict[str, Any]:
    return program("benchmarks/cpu_step.py")


def test_the_trainer_and_transformers_agree_on_the_loss_that_is_timed(repository: Path, tmp_path: Path) -> None:
    model = tiny.save_hf_model(tmp_path / "model", "llama")
    words = ["--model-path", str(model), "--dtype", "fp32", "--repeats", "1", "--positions", "64"]
    done = subprocess.run(
        [sys.executable, "benchmarks/cpu_trainer.py", *words],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| fp32")]
    assert [row[1] for row in rows] == ["all", "half"]
    for row in rows:
        ours, theirs = float(row[-2]), float(row[-1])
        assert ours == pytest.approx(theirs, abs=2e-4)


def test_the_gpu_benchmark_runs_whole_on_a_cpu(repository: Path) -> None:
    """With a tiny model; both sides see the same loss before the first step."""
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_trainer.py", "--tiny", "--repeats", "1"],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [
        line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith(("| 4x32", "| 1x128"))
    ]
    assert [row[0] for row in rows] == ["4x32", "4x32", "1x128", "1x128"]
    for theirs, ours in zip(rows[::2], rows[1::2], strict=True):
        assert theirs[1] == "transformers, sdpa" and ours[1].startswith("slime: ")
        assert float(ours[-2]) == pytest.approx(float(theirs[-2]), abs=2e-3)


def test_the_gpu_benchmark_says_what_is_reached(program: Programs) -> None:
    """More is wanted of long sequences where cuDNN runs; a ratio without transformers' figure is not reached."""
    trainer = program("benchmarks/gpu_trainer.py")
    figures, wanted, verdict = trainer["Figures"], trainer["WANTED"], trainer["verdict"]
    long = [verdict(figures("slime", "1x16384", attention=taken), wanted["1x16384"], 40_000.0, 1.2)
            for taken in ("", "cuDNN refused", "cuDNN")]  # fmt: skip
    assert [line.rpartition(": ")[2] for line in long] == ["met", "met", "NOT met"]
    short = [verdict(figures("slime", "16x1024"), wanted["16x1024"], 81_000.0, ratio)
             for ratio in (1.6, 1.4, float("nan"))]  # fmt: skip
    assert [line.rpartition(": ")[2] for line in short] == ["met", "NOT met", "NOT met"]


def test_a_steps_costs_go_to_the_phase_and_process_that_had_them(cpu_step: dict[str, Any]) -> None:
    """Step 0 is not counted; 0.5 s of step 1 were used by a process too short to be seen."""
    edge, engine, trainer = cpu_step["Edge"], (10, 1), (11, 1)
    edges = [
        edge("start", None, {engine: 1.0}, 1.0),
        edge("generate", 0, {engine: 5.0, trainer: 7.0}, 12.0),
        edge("generate", 1, {engine: 10.0, trainer: 8.0}, 18.0),
        edge("train", 1, {engine: 16.0, trainer: 8.0}, 24.0),
        edge("sync", 1, {engine: 16.0, trainer: 10.0}, 26.5),
        edge("done", 1, {engine: 17.0, trainer: 10.5}, 28.0),
        edge("done", 1, {engine: 99.0, trainer: 99.0}, 198.0),
    ]
    costs = cpu_step["breakdown"](edges, {engine: "engine 0", trainer: "actor rank 0"}, 1)
    assert costs.num_steps == 1
    assert costs.cells == {
        ("generate", "engine 0"): 6.0,
        ("train", "actor rank 0"): 2.0,
        ("sync", "engine 0"): 1.0,
        ("sync", "actor rank 0"): 0.5,
    }
    assert costs.total_s == 10.0
    assert costs.working == pytest.approx(0.8)
    assert costs.accounted == pytest.approx(0.95)


def test_the_watch_sees_each_phase_once(cpu_step: dict[str, Any], tmp_path: Path) -> None:
    class Family:
        def __init__(self) -> None:
            self.members: dict[Any, Any] = {}

        def look(self) -> None: ...

        def total_s(self) -> float:
            return 0.0

    watch = cpu_step["PhaseWatch"](tmp_path)
    for mtime_s, (phase, rollout_id, pid) in enumerate([("start", None, 1), ("train", 0, 1), ("train", 0, 2)], 1):
        processes = [{"pid": pid, "name": f"process {pid}"}]
        status = {"phase": phase, "rollout_id": rollout_id, "since": 0, "processes": processes}
        (tmp_path / "status.json").write_text(json.dumps(status))
        os.utime(tmp_path / "status.json", (mtime_s, mtime_s))
        for _ in range(2):
            watch.look(Family())
    assert [(edge.phase, edge.rollout_id) for edge in watch.edges] == [("start", None), ("train", 0)]
    assert watch.names == {1: "process 1", 2: "process 2"}
