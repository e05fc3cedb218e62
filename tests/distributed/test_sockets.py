"""Training ranks on one machine listen to that machine only."""

import socket
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.distributed import tiny
from tests.distributed.pool import RankError, RankPool


def _listening(rank: int, world_size: int, port: int, args: Any) -> list[str]:
    """Addresses that this rank listens on once all of Megatron's groups are there."""
    from slime.backends.megatron.trainer import MegatronTrainer

    trainer = MegatronTrainer(args, rank, world_size, "127.0.0.1", port)
    trainer.init()
    sockets = psutil.Process().net_connections()  # /proc/net/tcp and tcp6, those of this process
    trainer.close()
    return [f"{s.laddr.ip}:{s.laddr.port}" for s in sockets if s.status == psutil.CONN_LISTEN]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_hf_model(tmp_path_factory.mktemp("llama"), "llama")


def test_nothing_listens_beyond_loopback(ranks: RankPool, model: Path) -> None:
    everyones = ranks.run(_listening, 2, tiny.training_args(model, pipeline_model_parallel_size=2))
    for addresses in everyones:
        assert addresses, "gloo listens for its peers: if nothing is found, this test looks in the wrong place"
        assert {address.rsplit(":", 1)[0] for address in addresses} == {"127.0.0.1"}


def _come_to_a_taken_port(rank: int, world_size: int, port: int, args: Any) -> None:
    from slime.backends.megatron.trainer import MegatronTrainer

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        MegatronTrainer(args, 0, 1, "127.0.0.1", port).init()


def test_a_port_that_is_taken_is_said_to_be(ranks: RankPool, model: Path) -> None:
    with pytest.raises(RankError, match=r"rank 0 cannot listen at 127\.0\.0\.1:\d+: .*in use"):
        ranks.run(_come_to_a_taken_port, 1, tiny.training_args(model))
