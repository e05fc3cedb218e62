"""`ranks`: forked processes in which Megatron is imported; see tests/distributed/pool.py."""

from collections.abc import Iterator

import pytest

from tests.distributed.pool import RankPool, close_pool, pool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    yield pool()
    close_pool()
