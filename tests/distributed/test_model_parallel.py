"""Ranks that share one copy of the model train what one process trains, and give out the same whole weights."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import tiny
from tests.distributed.pool import RankPool

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": dict(tensor_model_parallel_size=2),
    "tensor and sequence": dict(tensor_model_parallel_size=2, sequence_parallel=True),
    "pipeline": dict(pipeline_model_parallel_size=2),
}
ROLLOUTS = [tiny.rollout(seed=1), tiny.rollout(seed=2)]


def _train(rank: int, world_size: int, port: int, args: Any, rollouts: Any) -> Any:
    return tiny.train(args, rank, world_size, port, rollouts)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An odd vocabulary: two ranks hold 66 and 65 ids and one row of padding."""
    folder = tmp_path_factory.mktemp("model")
    return tiny.save_hf_model(folder, "qwen3" if request.param else "qwen2", tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def alone(ranks: RankPool, model: Path) -> dict[str, Any]:
    result: dict[str, Any] = ranks.run(_train, 1, _args(model), ROLLOUTS)[0]
    return result


def _args(model: Path, **layout: Any) -> Any:
    """Two steps a rollout and a KL term, so that the log-prob passes take part."""
    return tiny.training_args(
        model, global_batch_size=4, num_steps_per_rollout=2, use_kl_loss=True, kl_loss_coef=0.1, entropy_coef=0.01,
        **layout,
    )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_divided_model_trains_like_a_whole_one(
    ranks: RankPool, model: Path, alone: dict[str, Any], layout: str
) -> None:
    together = ranks.run(_train, 2, _args(model, **LAYOUTS[layout]), ROLLOUTS)
    assert tiny.largest_difference(alone["weights"], together[0]["weights"]) < 1e-6
    for name in ("train/loss", "train/kl_loss", "train/entropy_loss", "train/grad_norm", "rollout/ref_log_probs"):
        expected = [metrics[name] for metrics in alone["metrics"]]
        for rank in range(2):
            assert [m[name] for m in together[rank]["metrics"]] == pytest.approx(expected, abs=1e-5), name
