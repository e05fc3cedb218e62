"""Whole-stack runs of a tiny model: the modes and ends of a run that the quick start does not show."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from .conftest import Train

pytestmark = pytest.mark.timeout(600)


def prompts_of(folder: Path, rollout_id: int) -> list[str]:
    rows = (folder / "samples" / f"rollout_{rollout_id:06d}.jsonl").read_text().splitlines()
    return [json.loads(row)["prompt"] for row in rows]


def test_samples_made_without_a_trainer_train_without_an_engine(
    train: Train, tiny_flags: list[str], tmp_path: Path
) -> None:
    dump, trained = str(tmp_path / "dump_{rollout_id}.pt"), str(tmp_path / "train_{rollout_id}_{rank}.pt")
    made = train([*tiny_flags, "--num-rollout", "2", "--debug-rollout-only", "--save-debug-rollout-data", dump])
    assert "ray::TrainRayActor" not in made.cost["by_name_s"]
    assert (tmp_path / "dump_1.pt").exists()

    replay = ["--num-rollout", "2", "--load-debug-rollout-data", dump, "--save-debug-train-data", trained]
    run = train([*tiny_flags, *replay, "--save-hf", str(tmp_path / "hf")])
    assert not any("embedded" in name for name in run.cost["by_name_s"])
    assert len(run.column("train/grad_norm")) == 2
    assert (tmp_path / "hf" / "config.json").exists()
    assert_train_dump(tmp_path / "train_1_0.pt")


def assert_train_dump(path: Path) -> None:
    import torch

    dump = torch.load(path, weights_only=True)
    assert dump["format_version"] == 2
    assert [row["rollout_position"] for row in dump["samples"]] == list(range(16))
    for row in dump["samples"]:
        assert len(row["advantages"]) == row["response_lengths"]


def test_a_run_that_is_started_again_goes_on_where_it_was(train: Train, tiny_flags: list[str], tmp_path: Path) -> None:
    """Model, optimizer, step count and position in the prompts come back; the same command line does it."""
    words = [*tiny_flags, "--save-interval", "2", "--rollout-shuffle"]
    train([*words, "--num-rollout", "2"])
    first_two = [prompts_of(tmp_path / "run", i) for i in range(2)]
    run = train([*words, "--num-rollout", "4"])
    assert [step["step"] for step in run.steps] == [0, 1, 2, 3]
    assert (run.folder / "checkpoints" / "iter_0000003").is_dir()
    seen = first_two + [prompts_of(run.folder, i) for i in (2, 3)]
    assert len({prompt for prompts in seen for prompt in prompts}) == 16, "no prompt of the epoch comes twice"


def test_over_sampling_with_partial_rollouts_and_a_filter(train: Train, tiny_flags: list[str]) -> None:
    """Tokens of an older version are masked, so what is trained agrees with the weights that made it."""
    filter_path = "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
    run = train(
        [
            *(*tiny_flags, "--num-rollout", "3", "--rollout-max-response-len", "64"),
            *("--over-sampling-batch-size", "8", "--partial-rollout", "--mask-offpolicy-in-partial-rollout"),
            *("--dynamic-sampling-filter-path", filter_path),
        ]
    )
    assert run.column("rollout/num_samples") == [16, 16, 16]
    assert max(run.column("train/train_rollout_logprob_abs_diff")) < 1e-4


def test_an_engine_that_dies_ends_the_run_with_its_name(
    repository: Path, tiny_flags: list[str], tmp_path: Path
) -> None:
    words = [*tiny_flags, "--num-rollout", "1000", "--rollout-max-response-len", "8000", "--rollout-batch-size", "8"]
    log = (tmp_path / "output.txt").open("w+")
    run = subprocess.Popen(
        [sys.executable, "train.py", *words, "--output-dir", str(tmp_path), "--run-name", "run"],
        cwd=repository, env={**os.environ, "PYTHONPATH": str(repository)}, stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        engine = wait_for_engine_at_work(run, tmp_path / "run" / "logs" / "engine_0.log")
        family = psutil.Process(run.pid).children(recursive=True)
        os.kill(engine.pid, signal.SIGKILL)
        assert run.wait(120) == 1
    finally:
        run.kill()
    log.seek(0)
    message = log.read().split("train.py: error:")[-1]
    assert "engine 0" in message
    assert "was killed by SIGKILL" in message
    _, left = psutil.wait_procs(family, timeout=10)
    assert not left, f"still running: {left}"


def wait_for_engine_at_work(run: "subprocess.Popen[bytes]", engine_log: Path) -> psutil.Process:
    """The engine's process, once it generates."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and run.poll() is None:
        for process in psutil.Process(run.pid).children(recursive=True):
            try:
                words = process.cmdline()
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            is_engine = words[1:3] == ["-m", "slime.backends.embedded.server"]
            if is_engine and num_running_requests(words[words.index("--port") + 1]) > 0:
                return process
        time.sleep(0.5)
    raise AssertionError(f"no engine at work; its log: {engine_log.read_text() if engine_log.exists() else 'none'}")


def num_running_requests(port: str) -> int:
    try:
        load = httpx.get(f"http://127.0.0.1:{port}/v1/loads", timeout=5, trust_env=False).json()
    except (httpx.HTTPError, ValueError):
        return 0
    return int(load["loads"][0]["num_running_reqs"])
