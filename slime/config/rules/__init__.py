"""Rules between flags: each looks at a `Config` and raises a `ConfigError`, or returns; none of them edits anything."""

from collections.abc import Callable
from typing import Any

from slime.config.rules import algorithm, engines, parallel, profiling, ranges, required, servers, weights

RULES: tuple[Callable[[Any], None], ...] = (
    *required.RULES,
    *ranges.RULES,
    *algorithm.RULES,
    *engines.RULES,
    *servers.RULES,
    *parallel.RULES,
    *weights.RULES,
    *profiling.RULES,
)
"""Every rule, in the order in which their errors are shown."""
