"""Runs of train.py with two devices on GPUs and stock SGLang: apart, at the same time, and two pairs that share.

Where there is one GPU, Ray is told that it is two, and every process calls itself a host of its own to NCCL.
"""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slime.observability.run_log import read_metrics
from tests.contracts.engine.conftest import HEADS_FOR_GPUS
from tests.contracts.engine.tiny_model import save_tiny_model
from tests.gpu.ranks import ROOT, python_path, share_one
from tests.ray_nodes import ray_cluster

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

RUN_TIMEOUT_S = 400
APART = ["--actor-num-gpus-per-node", "1", "--rollout-num-gpus", "1"]
SHARED = ["--colocate", "--actor-num-gpus-per-node", "2", "--rollout-num-gpus-per-engine", "1"]


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Of a run that has two devices."""
    environ = {**os.environ, "PYTHONPATH": python_path()}
    if not share_one():
        yield environ
        return
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "CUDA_VISIBLE_DEVICES": f"{gpu},{gpu}",
    }
    environ.pop("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", None)
    with ray_cluster(environ, ["--num-gpus", "2"]) as address:
        yield environ | {"RAY_ADDRESS": address, "CUDA_VISIBLE_DEVICES": gpu}


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tiny")
    model = save_tiny_model(folder / "qwen3", "qwen3", **HEADS_FOR_GPUS, dtype="bfloat16")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{a} + {a} =", "label": str(2 * a)}) + "\n" for a in range(24)))
    return [
        *("--hf-checkpoint", str(model), "--prompt-data", str(prompts), "--rm-type", "random", "--num-rollout", "4"),
        *("--rollout-batch-size", "4", "--n-samples-per-prompt", "4", "--num-steps-per-rollout", "1"),
        *("--rollout-max-response-len", "32", "--lr", "1e-4", "--lr-decay-style", "constant"),
        *("--num-gpus-per-node", "2", "--sglang-mem-fraction-static", "0.3", "--sglang-max-total-tokens", "20000"),
        *("--sglang-cuda-graph-backend-decode", "disabled", "--sglang-cuda-graph-backend-prefill", "disabled"),
    ]


@pytest.mark.parametrize(
    ("program", "layout", "num_engines"),
    [
        ("train.py", APART, 1),
        ("train_async.py", [*APART, "--update-weights-interval", "1"], 1),
        ("train.py", SHARED, 2),
        ("train.py", [*SHARED, "--tensor-model-parallel-size", "2", "--sequence-parallel", "--offload"], 2),
    ],
    ids=["apart", "at the same time", "two pairs that share", "two pairs that take turns, TP2"],
)
def test_a_run_on_two_devices(
    environment: dict[str, str], flags: list[str], tmp_path: Path, program: str, layout: list[str], num_engines: int
) -> None:
    """Every sync proves that the engines have the trainer's weights; log-probs of both sides say so as well."""
    words = [*flags, *layout, "--output-dir", str(tmp_path), "--run-name", "run"]
    done = subprocess.run(
        [sys.executable, program, *words],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=RUN_TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    steps = [line for line in read_metrics(tmp_path / "run") if line["step"] >= 0]
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    assert f"on {num_engines} engine(s)" in done.stdout
    fresh = [step for step in steps if step["rollout/staleness/max"] == 0]  # older samples are of older weights
    assert len(fresh) == (1 if program == "train_async.py" else 4)
    assert max(step["train/train_rollout_logprob_abs_diff"] for step in fresh) < 0.03
    assert all(step["perf/update_weights_bytes"] > 0 for step in steps)
