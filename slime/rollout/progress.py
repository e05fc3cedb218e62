"""The bar that shows how far a rollout or an evaluation is."""

import os
import sys
from collections.abc import Callable
from typing import Any

ENVIRONMENT_VARIABLE = "SLIME_PROGRESS"
"""1 shows bars also where the output is no terminal, 0 never."""


def _tqdm_bar(total: int, description: str, unit: str) -> Any:
    from tqdm import tqdm

    asked = os.environ.get(ENVIRONMENT_VARIABLE)
    is_shown = sys.stderr.isatty() if asked is None else asked != "0"
    return tqdm(total=total, desc=description, unit=unit, file=sys.stderr, disable=not is_shown, leave=False)


_make_bar: Callable[[int, str, str], Any] = _tqdm_bar


def set_bar_factory(factory: Callable[[int, str, str], Any] | None) -> None:
    """Use `factory(total, description, unit)` in place of tqdm; None goes back to it.

    What it returns is a context manager with `update(n)`.
    """
    global _make_bar
    _make_bar = factory or _tqdm_bar


def progress_bar(total: int, description: str, unit: str = "group") -> Any:
    """A context manager with `update(n)`."""
    return _make_bar(total, description, unit)
