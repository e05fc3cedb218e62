"""In --deterministic-mode two runs of one layout end with the same bits, whatever the timing."""

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import tiny
from tests.distributed.pool import RankPool

ROLLOUTS = [tiny.rollout(seed=1, longest_prompt=40), tiny.rollout(seed=2, longest_response=60)]
TENSOR = dict(tensor_model_parallel_size=2)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2 x DP2": (4, TENSOR),
    "TP2 + SP x DP2, overlapped, bf16": (
        4,
        TENSOR
        | dict(sequence_parallel=True, bf16=True, overlap_grad_reduce=True, overlap_param_gather=True)
        | dict(ddp_bucket_size=5000),
    ),
    "two threads": (1, dict(train_threads=2)),
}


def _train(rank: int, world_size: int, port: int, args: Any, rollouts: Any, timing: int) -> Any:
    """Each micro-batch starts a random while late, so that ranks meet in another order in every run."""
    from slime.backends.megatron.model import PolicyModel

    delays, forward = random.Random(100 * timing + rank), PolicyModel.forward

    def late(self: Any, *inputs: Any, **options: Any) -> Any:
        time.sleep(delays.random() * 0.005)
        return forward(self, *inputs, **options)

    PolicyModel.forward = late
    result = tiny.train(args, rank, world_size, port, rollouts)
    return result | {"is_deterministic": torch.are_deterministic_algorithms_enabled()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_hf_model(tmp_path_factory.mktemp("qwen3"), "qwen3")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_runs_end_with_the_same_bits(ranks: RankPool, model: Path, layout: str) -> None:
    world_size, changes = LAYOUTS[layout]
    args = tiny.training_args(
        model, deterministic_mode=True, use_kl_loss=True, kl_loss_coef=0.1, entropy_coef=0.01, **changes
    )
    first, second = (ranks.run(_train, world_size, args, ROLLOUTS, timing)[0] for timing in (1, 2))
    assert first["is_deterministic"], "torch was not told"
    assert first["weights"] and first["weights"].keys() == second["weights"].keys()
    for name, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][name]), name
    for ours, theirs in zip(first["metrics"], second["metrics"], strict=True):
        assert _of_the_work(ours) == _of_the_work(theirs)


def _of_the_work(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("perf/")}


def test_the_mode_trains_what_is_trained_without_it(ranks: RankPool, model: Path) -> None:
    usual, exact = (
        ranks.run(_train, 1, tiny.training_args(model, deterministic_mode=mode), ROLLOUTS, 0)[0]
        for mode in (False, True)
    )
    assert not usual["is_deterministic"]
    assert tiny.largest_difference(usual["weights"], exact["weights"]) < 1e-6
