"""Whitening over ranks equals whitening in one place."""

from pathlib import Path

import torch
import torch.distributed as dist

from slime.utils.distributed_utils import distributed_masked_whiten
from tests.distributed.pool import RankPool

VALUES = torch.tensor([1.0, 2.0, 50.0, 4.0, 5.0], dtype=torch.float64)
MASK = torch.tensor([1, 1, 0, 1, 1])
PARTS = ((0, 3), (3, 5), (5, 5))


def _one_of_three_ranks(rank: int, world_size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    part = slice(*PARTS[rank])
    torch.save(distributed_masked_whiten(VALUES[part], MASK[part], dist.group.WORLD), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_three_ranks_one_of_them_empty_whiten_as_one(ranks: RankPool, tmp_path: Path) -> None:
    """The trained values 1, 2, 4, 5 have the mean 3 and the unbiased variance 10/3."""
    ranks.run(_one_of_three_ranks, 3, str(tmp_path))
    together = torch.cat([torch.load(tmp_path / f"{rank}.pt") for rank in range(3)])
    torch.testing.assert_close(together, (VALUES - 3) / (10 / 3 + 1e-8) ** 0.5)
    torch.testing.assert_close(together, distributed_masked_whiten(VALUES, MASK))
