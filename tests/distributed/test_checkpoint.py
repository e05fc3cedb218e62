"""A checkpoint is not bound to the number of ranks that wrote it."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import tiny
from tests.distributed.pool import RankPool

ROLLOUTS = [tiny.rollout(seed=1), tiny.rollout(seed=2)]


def _train(rank: int, world_size: int, port: int, args: Any, rollouts: Any) -> Any:
    return tiny.train(args, rank, world_size, port, rollouts)


def _train_and_save(rank: int, world_size: int, port: int, args: Any, rollouts: Any) -> Any:
    from slime.backends.megatron.trainer import MegatronTrainer

    trainer = MegatronTrainer(args, rank, world_size, "127.0.0.1", port)
    trainer.init()
    for i, data in enumerate(rollouts):
        trainer.train(i, tiny.shard_of(trainer, data))
    trainer.save(len(rollouts) - 1)
    trainer.save_hf(f"{args.save}/hf")
    return tiny.hf_weights(trainer)


@pytest.mark.parametrize("layout", [{}, {"tensor_model_parallel_size": 2}], ids=["data parallel", "tensor parallel"])
def test_two_ranks_save_and_one_goes_on(ranks: RankPool, tmp_path: Path, layout: dict[str, int]) -> None:
    model = tiny.save_hf_model(tmp_path / "model", "llama")
    save = str(tmp_path / "ckpt")
    saved = ranks.run(_train_and_save, 2, tiny.training_args(model, save=save, **layout), ROLLOUTS[:1])[0]
    resumed = ranks.run(_train, 1, tiny.training_args(model, load=save), ROLLOUTS[1:])[0]
    whole = ranks.run(_train, 1, tiny.training_args(model), ROLLOUTS)[0]
    assert resumed["start"] == 1
    assert tiny.largest_difference(resumed["weights"], whole["weights"]) < 1e-6
    exported = ranks.run(_train, 1, tiny.training_args(tmp_path / "ckpt" / "hf"), [])[0]["weights"]
    assert tiny.largest_difference(exported, saved) == 0
