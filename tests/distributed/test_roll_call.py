"""A rank that waits in vain for others says for which."""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import tiny
from tests.distributed.pool import RankPool

ROLLOUT = tiny.rollout(seed=1, num_groups=6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_hf_model(tmp_path_factory.mktemp("llama"), "llama")


def _train_without(rank: int, world_size: int, port: int, args: Any, rollout: Any, missing: int, heard: Path) -> str:
    """One rank stops itself before it trains; what the others say of it. Rank 2 lets it go on in the end."""
    import torch.distributed as dist

    from slime.backends.megatron.trainer import MegatronTrainer

    trainer = MegatronTrainer(args, rank, world_size, "127.0.0.1", port)
    trainer.init()
    shard = tiny.shard_of(trainer, rollout)
    pids: list[int] = [0] * world_size
    dist.all_gather_object(pids, os.getpid())
    if rank == missing:
        os.kill(os.getpid(), signal.SIGSTOP)
        return ""
    try:
        trainer.train(0, shard)
    except RuntimeError as error:
        return str(error)
    finally:
        if rank == 2:
            heard.touch()
            os.kill(pids[missing], signal.SIGCONT)
        while not heard.exists():  # a trainer's process outlives its error; the others may ask it
            time.sleep(0.1)
    return "trained"


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        (1, "could not go on .* to train on rollout 0: rank 1 of them does not answer: stopped or ended"),
        (0, "rank 0, where the ranks meet, does not answer: it is stopped or has ended"),
    ],
    ids=["rank 1", "rank 0, where they meet"],
)
def test_a_rank_that_stopped_is_named_by_those_who_waited(
    ranks: RankPool, model: Path, tmp_path: Path, missing: int, named: str
) -> None:
    args = tiny.training_args(model, global_batch_size=12, distributed_timeout_minutes=0.2)
    said = ranks.run(_train_without, 3, args, ROLLOUT, missing, tmp_path / "heard")
    for rank in {0, 1, 2} - {missing}:
        assert f"Training rank {rank} of 3" in said[rank]
    assert re.search(named, said[2]), said[2]
