"""Worker processes of the graders have little time here, and end with this folder's tests."""

from collections.abc import Iterator

import pytest

from slime.rollout.rm_hub import grading_worker


@pytest.fixture(scope="session", autouse=True)
def short_lived_workers() -> Iterator[None]:
    grading_worker.CPU_LIMIT_S = 1.0
    yield
    grading_worker.stop_workers()
