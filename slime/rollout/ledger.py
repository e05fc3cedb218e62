"""One line of a run's ledger: which rows of the prompt file a rollout trained on, dropped and threw away."""

import logging
from typing import Any

from slime.observability.ledger import Entry
from slime.rollout.base_types import GroupFates, RolloutFnTrainOutput, flatten_samples
from slime.rollout.data_source import exclusive

logger = logging.getLogger(__name__)

_warned: set[str] = set()


def take_ledger_line(source: Any, rollout_id: int, output: RolloutFnTrainOutput) -> dict[str, Any]:
    """Account for what a rollout drew; see `slime.observability.ledger` for the line's fields.

    The data source forgets where the groups came from that the line names. A source that keeps no `outstanding`
    (a user's own class) is accounted for by group index.

    Args:
        source: the run's data source.
        output: of the rollout function; where it does not say what became of its groups, those in `samples` were
            trained and all others may still come back.
    """
    fates = output.fates
    if fates is None:
        indices = (sample.group_index for sample in flatten_samples(output.samples))
        fates = GroupFates(trained=tuple(dict.fromkeys(indices)))
    with exclusive(source):
        return _line(source, rollout_id, fates)


def _line(source: Any, rollout_id: int, fates: GroupFates) -> dict[str, Any]:
    outstanding = getattr(source, "outstanding", {})

    def entries(indices: tuple[int | None, ...]) -> list[Entry]:
        return [_entry(outstanding, index) for index in indices]

    line: dict[str, Any] = {
        "rollout_id": rollout_id,
        "trained": entries(fates.trained),
        "dropped": entries(fates.dropped),
        "discarded": entries(fates.discarded),
        "outstanding": [list(origin) for origin in outstanding.values()],
    }
    position = getattr(source, "position", None)
    if position is not None:
        line |= {"position": list(position), "rows_per_epoch": len(source)}
    return line


def _entry(outstanding: dict[int, tuple[int, int]], group_index: int | None) -> Entry:
    origin = None if group_index is None else outstanding.pop(group_index, None)
    if origin is None:
        _warn_once()
        return [None, group_index]
    return list(origin)


def _warn_once() -> None:
    if "unknown" not in _warned:
        _warned.add("unknown")
        logger.warning(
            "The data source does not tell which rows its groups come from: ledger.jsonl names groups ([null, group "
            "index]), and `slime ledger` cannot look for gaps."
        )
