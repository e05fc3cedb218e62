"""The finished groups of one rollout: which are kept, which were dropped or too old, and the counts of each."""

import logging
from argparse import Namespace
from collections.abc import Callable
from enum import Enum
from typing import Any

from slime.rollout.base_types import GroupFates, flatten_samples
from slime.rollout.custom_generate import RETOKENIZED
from slime.rollout.filter_hub.base_types import (
    MetricGatherer,
    call_dynamic_filter,
    should_drop_dynamic_filter_output,
)
from slime.rollout.staleness import StalenessCheck

logger = logging.getLogger(__name__)

_WARN_AFTER_DROPPING = 10  # times the groups that are needed


class Outcome(Enum):
    """What became of a finished group."""

    KEPT = "kept"
    DROPPED = "dropped"  # by the dynamic filter
    STALE = "stale"  # made by weights that are too old to be trained on
    SURPLUS = "surplus"  # the batch was full

    @property
    def is_replaced(self) -> bool:
        """Whether another group takes its place in the batch."""
        return self in (Outcome.DROPPED, Outcome.STALE)


class Collection:
    """Takes finished groups in until `--rollout-batch-size` are kept, and knows what became of every group."""

    def __init__(self, args: Namespace, rollout_id: int, dynamic_filter: Callable[..., Any] | None) -> None:
        self.args, self.rollout_id, self.target = args, rollout_id, args.rollout_batch_size
        self.dynamic_filter = dynamic_filter
        self.kept: list[list[Any]] = []
        self.finished: list[list[Any]] = []
        self.drops = MetricGatherer()
        self.staleness = StalenessCheck(args, rollout_id)
        self.num_dropped = 0
        self._drawn: list[int | None] = []
        self._outcomes: dict[int, Outcome] = {}

    @property
    def is_full(self) -> bool:
        return len(self.kept) >= int(self.target)

    @property
    def num_drawn(self) -> int:
        return len(self._drawn)

    def note_drawn(self, groups: list[list[Any]]) -> None:
        """Groups that the data source gave, in the order in which they are started."""
        self._drawn += [group_index(group) for group in groups]

    def give_up(self, group: list[Any]) -> None:
        """Note a group that is thrown away unfinished, because it will be too old when it is done."""
        self._outcomes[len(self._drawn)] = Outcome.STALE
        self._drawn.append(group_index(group))
        self.staleness.num_discarded += 1

    def take(self, number: int, group: list[Any], remaining_batch_size: int) -> Outcome:
        """Filter a finished group and keep it while there is room.

        Args:
            number: which of the drawn groups it is, from 0.
            remaining_batch_size: groups kept or still in flight, this one included.
        """
        self._outcomes[number] = outcome = self._judge(group, remaining_batch_size)
        return outcome

    def _judge(self, group: list[Any], remaining_batch_size: int) -> Outcome:
        size = self.args.n_samples_per_prompt
        assert len(group) == size, f"A group came back with {len(group)} members; --n-samples-per-prompt is {size}."
        self.finished.append(group)
        if not self.staleness.admits(group):
            return Outcome.STALE
        output = call_dynamic_filter(self.dynamic_filter, self.args, group)
        if should_drop_dynamic_filter_output(
            output, remaining_batch_size=remaining_batch_size, target_data_size=self.target
        ):
            self.drops.on_dynamic_filter_drop(output.reason)
            self.num_dropped += 1
            if self.num_dropped % (_WARN_AFTER_DROPPING * self.target) == 0:
                logger.warning(
                    "rollout %d: the dynamic filter has dropped %d groups and kept %d of the %d that are needed",
                    self.rollout_id,
                    self.num_dropped,
                    len(self.kept),
                    self.target,
                )
            return Outcome.DROPPED
        if self.is_full:
            return Outcome.SURPLUS
        self.kept.append(group)
        return Outcome.KEPT

    def fates(self, *, keeps_unfinished: bool) -> GroupFates:
        """What became of each drawn group; those without an outcome were aborted.

        Args:
            keeps_unfinished: aborted groups go back to the data source instead of being thrown away.
        """
        fates: dict[Outcome, list[int | None]] = {outcome: [] for outcome in Outcome}
        for number, index in enumerate(self._drawn):
            outcome = self._outcomes.get(number, None if keeps_unfinished else Outcome.SURPLUS)
            if outcome is not None:
                fates[outcome].append(index)
        discarded = fates[Outcome.STALE] + fates[Outcome.SURPLUS]
        return GroupFates(
            trained=tuple(fates[Outcome.KEPT]), dropped=tuple(fates[Outcome.DROPPED]), discarded=tuple(discarded)
        )

    def metrics(self, fates: GroupFates) -> dict[str, Any]:
        """Counts for the metrics of the rollout."""
        metrics: dict[str, Any] = {**self.drops.collect(), **self.staleness.metrics()}
        if fates.discarded:
            metrics["rollout/discarded_groups"] = len(fates.discarded)
        retokenized = sum(bool((sample.metadata or {}).get(RETOKENIZED)) for sample in flatten_samples(self.kept))
        if retokenized:
            metrics["rollout/retokenized"] = retokenized
        return metrics


def first_index(group: list[Any]) -> tuple[bool, int]:
    """Sorts groups by the index of their first sample; those without one come first."""
    index = _first_sample(group).index
    return index is not None, index or 0


def group_index(group: list[Any]) -> int | None:
    """The number that the data source gave a group; None where it gave none."""
    index: int | None = getattr(_first_sample(group), "group_index", None)
    return index


def _first_sample(group: list[Any]) -> Any:
    first = group[0] if group else None
    while isinstance(first, list):
        first = first[0]
    return first
