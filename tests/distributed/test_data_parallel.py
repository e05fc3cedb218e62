"""Two data-parallel ranks train what one process trains."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import tiny
from tests.distributed.pool import RankPool


def _train(rank: int, world_size: int, port: int, args: Any, rollouts: Any) -> Any:
    return tiny.train(args, rank, world_size, port, rollouts)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_hf_model(tmp_path_factory.mktemp("qwen3"), "qwen3")


ROLLOUTS = [tiny.rollout(seed=1), tiny.rollout(seed=2)]


@pytest.mark.parametrize("optimizer", ["distributed", "replicated"])
@pytest.mark.parametrize("reduction", ["per sample", "per token"])
def test_two_ranks_make_the_weights_of_one_process(
    ranks: RankPool, model: Path, optimizer: str, reduction: str
) -> None:
    """Two Adam steps, samples of unequal length, dropped tokens: the weights differ by rounding only."""
    args = tiny.training_args(
        model, use_distributed_optimizer=optimizer == "distributed", calculate_per_token_loss=reduction == "per token"
    )
    alone = ranks.run(_train, 1, args, ROLLOUTS)[0]
    together = ranks.run(_train, 2, args, ROLLOUTS)
    assert tiny.largest_difference(alone["weights"], together[0]["weights"]) < 1e-6
    for name in ("train/loss", "train/pg_loss", "train/grad_norm", "train/entropy_loss", "rollout/advantages"):
        for step in range(2):
            expected = alone["metrics"][step][name]
            assert together[0]["metrics"][step][name] == pytest.approx(expected, abs=1e-5), name
            assert together[1]["metrics"][step][name] == together[0]["metrics"][step][name], name
    assert not together[1]["weights"], "buckets of ranks other than 0 are empty"
