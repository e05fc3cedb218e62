"""Trainers on GPUs, in bf16: what a CPU learns, however prompts are packed and ranks are laid out, and the same bits
again if asked."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import tiny
from tests.gpu.ranks import ROOT, environment_of_rank

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

RANKS_TIMEOUT_S = 200
PROGRAM = """
import json, sys, torch
from pathlib import Path
from tests.distributed import tiny
changes, model, out = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
rollouts = [tiny.rollout(seed=seed, longest_prompt=40, longest_response=60) for seed in (3, 4)]
rank, world_size = int(sys.argv[5]), int(sys.argv[6])
result = tiny.train(tiny.training_args(model, **changes), rank, world_size, int(sys.argv[4]), rollouts)
if rank == 0:
    torch.save({"weights": {n: t.cpu() for n, t in result["weights"].items()}, "metrics": result["metrics"]}, out)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    return tiny.save_hf_model(tmp_path_factory.mktemp("model"), "qwen3", **settings)


def _trained(tmp_path: Path, model: Path, world_size: int = 1, **changes: Any) -> dict[str, Any]:
    """In processes of their own: a device is chosen once. What rank 0 has at the end."""
    from slime.utils.processes import free_port

    sizes = dict(hidden_size=64, num_attention_heads=4, num_query_groups=2, kv_channels=64)
    out = tmp_path / "out.pt"
    words = [json.dumps(sizes | changes), str(model), str(out), str(free_port("127.0.0.1"))]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *words, str(rank), str(world_size)],
            cwd=ROOT, env=os.environ | environment_of_rank(rank),
        )
        for rank in range(world_size)
    ]  # fmt: skip
    try:
        assert [rank.wait(RANKS_TIMEOUT_S) for rank in ranks] == [0] * world_size
    finally:
        for rank in ranks:
            rank.kill()
    result: dict[str, Any] = torch.load(out)
    return result


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, Any]:
    return _trained(tmp_path_factory.mktemp("gpu"), model, device="cuda", bf16=True)


def _metrics_agree(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for mine, other in zip(ours["metrics"], theirs["metrics"], strict=True):
        assert mine["train/entropy_loss"] == pytest.approx(other["train/entropy_loss"], rel=0.01)
        assert mine["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=0.05)


def test_a_gpu_learns_what_a_cpu_learns(tmp_path: Path, model: Path, on_gpu: dict[str, Any]) -> None:
    _metrics_agree(on_gpu, _trained(tmp_path, model, device="cpu"))


def test_shared_prompts_teach_what_whole_sequences_teach(tmp_path: Path, model: Path, on_gpu: dict[str, Any]) -> None:
    _metrics_agree(on_gpu, _trained(tmp_path, model, device="cuda", bf16=True, share_group_prompts=False))


def test_deterministic_mode_repeats_every_bit(tmp_path: Path, model: Path) -> None:
    first, second = (
        _trained(tmp_path, model, device="cuda", bf16=True, deterministic_mode=True)["weights"] for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "flags",
    [
        dict(recompute_granularity="selective", recompute_modules=["core_attn", "mlp"]),
        dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
        dict(overlap_grad_reduce=True, overlap_param_gather=True),
    ],
    ids=str,
)
def test_flags_that_save_memory_or_time_change_nothing(
    tmp_path: Path, model: Path, on_gpu: dict[str, Any], flags: dict[str, Any]
) -> None:
    _metrics_agree(on_gpu, _trained(tmp_path, model, device="cuda", bf16=True, **flags))


@pytest.mark.parametrize(
    "layout",
    [
        dict(tensor_model_parallel_size=2),
        dict(tensor_model_parallel_size=2, sequence_parallel=True),
        dict(pipeline_model_parallel_size=2),
        dict(overlap_grad_reduce=True, overlap_param_gather=True, ddp_bucket_size=5000),
    ],
    ids=["TP2", "TP2 + SP", "PP2", "DP2, overlapped"],
)
def test_two_ranks_over_nccl_learn_what_one_learns(
    tmp_path: Path, model: Path, on_gpu: dict[str, Any], layout: dict[str, Any]
) -> None:
    _metrics_agree(on_gpu, _trained(tmp_path, model, world_size=2, device="cuda", bf16=True, **layout))
