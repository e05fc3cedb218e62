"""What every test shares: markers by folder, and few threads."""

import os
import signal
from pathlib import Path

# Before torch is imported: tests run beside each other's processes, and idle OpenMP threads must not spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Iterator

import hypothesis
import pytest

from tests.distributed.pool import RankPool, close_pool, pool

# In the background of a script, and under nohup, these are ignored here and in every program that a test starts. With a
# handler that does nothing they still are here, and a started program has the default.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

# A shared machine is sometimes slow, which says nothing about the code under test.
hypothesis.settings.register_profile("slime", deadline=None)
hypothesis.settings.load_profile("slime")

ROOT = Path(__file__).resolve().parents[1]
MARKER_OF_FOLDER = {"e2e": "e2e", "gpu": "gpu"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever lies in tests/e2e or tests/gpu carries that marker, so that none is forgotten.

    What needs a stock SGLang server carries only `sglang`: it runs where scripts/sglang_cpu/setup.sh was run.
    """
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0] if item.path.is_relative_to(ROOT / "tests") else ""
        if folder in MARKER_OF_FOLDER and item.get_closest_marker("sglang") is None:
            item.add_marker(MARKER_OF_FOLDER[folder])


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout that the tests run in."""
    return ROOT


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """The pool of forked gloo ranks, one a test run."""
    yield pool()
    close_pool()
