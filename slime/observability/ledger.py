"""The ledger of a run: what became of each row of the prompt file that left the data source, and its check.

`<run_dir>/ledger.jsonl` has one line a committed rollout, written with the rollout's line of metrics.jsonl:

    rollout_id      the rollout
    trained         [[epoch, row], ...] in the order in which they were started
    dropped         those that the dynamic filter dropped
    discarded       those that were started and thrown away, because the batch was full
    outstanding     all that were handed out and not accounted for after this rollout: the data source's buffer
    position        [epoch, prompts of it that were handed out], after this rollout
    rows_per_epoch  prompts in an epoch

`row` is 0-based and counts rows of the prompt file after an `@[a:b]` slice; shuffling does not change it. An entry
[null, group_index] stands for a group of a data source that does not tell rows; `position` and `rows_per_epoch` are
missing then.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from slime.observability.run_files import LEDGER_FILE

FATES = ("trained", "dropped", "discarded")

Entry = list[int | None]
"""[epoch, row], or [None, group index]."""

_NAMED = 5  # entries spelled out in an error; the rest are counted


class LedgerError(ValueError):
    """A ledger with a gap, a double, or lines that do not belong together."""


@dataclass(frozen=True)
class LedgerSummary:
    """What a ledger that is in order accounts for, in groups."""

    num_rollouts: int
    trained: int
    dropped: int
    discarded: int
    outstanding: int
    unknown: int
    """Entries of which only the group is known; where there are any, gaps were not looked for."""

    def __str__(self) -> str:
        text = (
            f"{self.num_rollouts} rollouts: {self.trained} prompts trained, {self.dropped} dropped, "
            f"{self.discarded} discarded, {self.outstanding} in the buffer; none twice"
        )
        return f"{text}, none missing" if not self.unknown else f"{text} ({self.unknown} of unknown rows: gaps unknown)"


def read_ledger(run_dir: Path | str) -> list[dict[str, Any]]:
    """The lines of a run's ledger.

    Raises:
        FileNotFoundError: there is none.
        LedgerError: a line is not whole.
    """
    path = Path(run_dir) / LEDGER_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: either this is not a run's folder, or no step was finished.")
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise LedgerError(f"{path}:{number} is not a whole line ({error}).") from None
    return lines


def check_ledger(run_dir: Path | str) -> LedgerSummary:
    """Check that the rollouts follow each other and that every row that left the data source is there exactly once.

    Where the first line is not that of rollout 0 (a run that goes on from another folder's checkpoint), epochs that
    had begun before are not searched for gaps.

    Raises:
        FileNotFoundError: the run has no ledger.
        LedgerError: names the first rollouts and rows that are wrong.
    """
    lines = read_ledger(run_dir)
    path = Path(run_dir) / LEDGER_FILE
    if not lines:
        raise LedgerError(f"{path} is empty: no rollout was committed.")
    problems = [*_not_consecutive(lines), *_doubles(lines), *_gaps(lines)]
    if problems:
        raise LedgerError(f"{path}: {'; '.join(problems)}.")
    counts = {fate: sum(len(line[fate]) for line in lines) for fate in FATES}
    unknown = sum(entry[0] is None for _, entry in _entries(lines))
    return LedgerSummary(len(lines), **counts, outstanding=len(lines[-1]["outstanding"]), unknown=unknown)


def _entries(lines: Iterable[dict[str, Any]]) -> Iterator[tuple[int, Entry]]:
    """(rollout, entry) of everything that is accounted for."""
    for line in lines:
        for fate in FATES:
            for entry in line[fate]:
                yield line["rollout_id"], entry


def _not_consecutive(lines: list[dict[str, Any]]) -> Iterator[str]:
    ids = [line["rollout_id"] for line in lines]
    for before, after in pairwise(ids):
        if after != before + 1:
            yield f"rollout {before} is followed by rollout {after}"


def _doubles(lines: list[dict[str, Any]]) -> Iterator[str]:
    seen: dict[tuple[int | None, ...], list[int]] = {}
    for rollout_id, entry in _entries(lines):
        if entry[1] is not None:
            seen.setdefault(tuple(entry), []).append(rollout_id)
    for entry in lines[-1]["outstanding"]:
        if tuple(entry) in seen:
            yield f"{_name(entry)} is in the buffer and in rollout {seen[tuple(entry)][0]}"
    doubles = [
        f"{_name(entry)} is there {len(rollouts)} times (rollouts {', '.join(map(str, rollouts))})"
        for entry, rollouts in seen.items()
        if len(rollouts) > 1
    ]
    yield from _shortened(doubles)


def _gaps(lines: list[dict[str, Any]]) -> Iterator[str]:
    """Epochs of which fewer or other rows are there than the data source handed out."""
    last = lines[-1]
    entries = [entry for _, entry in _entries(lines)]
    if "position" not in last or any(entry[0] is None for entry in entries):
        return
    rows = _rows_by_epoch([*entries, *last["outstanding"]])
    epoch, offset = last["position"]
    first = 0 if lines[0]["rollout_id"] == 0 else lines[0]["position"][0] + 1
    size = last["rows_per_epoch"]
    everything = next((found for e, found in rows.items() if first <= e < epoch and len(found) == size), None)
    for e in range(first, epoch + 1):
        expected, found = (offset if e == epoch else size), rows.get(e, set())
        if len(found) != expected:
            missing = _missing(everything, found) if e < epoch else ""
            yield f"epoch {e} has {len(found)} rows where {expected} were handed out{missing}"
        elif everything is not None and not found <= everything:
            strange = sorted(found - everything)
            yield f"epoch {e} has rows that other epochs do not have ({', '.join(map(str, strange[:_NAMED]))})"
    if late := sorted(e for e in rows if e > epoch):
        yield f"epoch {late[0]} has rows, but the data source stands in epoch {epoch}"


def _missing(everything: set[int] | None, found: set[int]) -> str:
    if everything is None or not everything - found:
        return ""
    missing = sorted(everything - found)
    more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
    return f" (missing: {', '.join(map(str, missing[:_NAMED]))}{more})"


def _rows_by_epoch(entries: Iterable[Entry]) -> dict[int, set[int]]:
    rows: dict[int, set[int]] = {}
    for epoch, row in entries:
        assert epoch is not None and row is not None
        rows.setdefault(epoch, set()).add(row)
    return rows


def _name(entry: Iterable[int | None]) -> str:
    epoch, row = entry
    return f"group {row}" if epoch is None else f"row {row} of epoch {epoch}"


def _shortened(problems: list[str]) -> Iterator[str]:
    yield from problems[:_NAMED]
    if len(problems) > _NAMED:
        yield f"and {len(problems) - _NAMED} more such rows"
