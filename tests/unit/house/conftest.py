"""The quick start's scripts are programs, not a package: tests run them by path and take functions out of them."""

import runpy
from pathlib import Path
from typing import Any

import pytest


class Programs:
    """Loads a program's functions without running its main."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository

    def __call__(self, path: str) -> dict[str, Any]:
        return runpy.run_path(str(self.repository / path), run_name="loaded")


@pytest.fixture
def program(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """`program("scripts/x.py")["function"]`."""
    monkeypatch.syspath_prepend(str(repository / "examples" / "quickstart"))
    return Programs(repository)
