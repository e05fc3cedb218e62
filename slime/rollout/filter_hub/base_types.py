"""What a dynamic filter says about a group, calling one, and counting what it dropped."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class DynamicFilterOutput:
    """A filter's word on one group."""

    keep: bool
    reason: str | None = None
    """Why it is dropped; part of the metric's name."""
    keep_when_insufficient: bool = False
    """Keep a dropped group all the same when not enough others are left to fill the batch."""


def call_dynamic_filter(fn: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> DynamicFilterOutput:
    """Ask `fn`; no filter keeps everything, and a plain truth value stands for `keep`."""
    if fn is None:
        return DynamicFilterOutput(keep=True)
    output = fn(*args, **kwargs)
    return output if isinstance(output, DynamicFilterOutput) else DynamicFilterOutput(keep=bool(output))


def should_drop_dynamic_filter_output(
    output: DynamicFilterOutput, *, remaining_batch_size: int, target_data_size: int
) -> bool:
    """Whether the group goes.

    Args:
        remaining_batch_size: groups kept or still being made, this one included.
        target_data_size: groups that the rollout needs.
    """
    is_needed = output.keep_when_insufficient and remaining_batch_size <= target_data_size
    return not output.keep and not is_needed


class MetricGatherer:
    """Counts dropped groups by reason."""

    def __init__(self) -> None:
        self._drops: Counter[str] = Counter()

    def on_dynamic_filter_drop(self, reason: str | None) -> None:
        self._drops[reason or "unspecified"] += 1

    def collect(self) -> dict[str, int]:
        return {f"rollout/dynamic_filter/drop_{reason}": count for reason, count in self._drops.items()}
