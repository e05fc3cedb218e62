"""Where two runs first differ: by step, and in it by prompt, sample, metric and weight tensor.

Read are the files of the runs' folders: ledger.jsonl (which prompts), samples/ (tokens, log-probs, rewards, versions),
metrics.jsonl, digests/ (weights). What depends on timing is left out: wall-clock times, perf/*, cache hits.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from slime.observability.digests import read_digests
from slime.observability.ledger import read_ledger
from slime.observability.metric_names import depends_on_timing
from slime.observability.run_files import DIGESTS_DIR, LEDGER_FILE, SAMPLES_DIR
from slime.observability.run_log import read_metrics

Found = tuple[str, Any, Any]
"""(where, value in A, value in B) of one difference."""

ABSENT = "(absent)"
_FIELDS_FIRST = ("index", "group_index", "prompt", "label", "tokens", "response", "log_probs", "reward", "status")
_LEDGER_FIELDS = ("trained", "dropped", "discarded", "outstanding", "position", "rows_per_epoch")
_SHOWN_CHARS = 60


@dataclass(frozen=True)
class Difference:
    """The first difference of one kind in a step."""

    kind: str
    """`prompts`, `samples`, `metrics`, `weights`, `evaluation samples` or `evaluation metrics`."""
    where: str
    a: Any
    b: Any
    more: int
    """How many more of this kind differ in the same step (samples and tensors are counted once each)."""


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side; -1 is what came before the first step."""

    through: int | None
    """The last step that is the same; None when not even the first is."""
    step: int | None
    """The first step that differs; None when none does."""
    differences: tuple[Difference, ...]
    last_steps: tuple[int, int]
    """Last step of A and of B; where they are equal in what both have, the shorter one was compared whole."""
    not_compared: tuple[str, ...]

    @property
    def is_identical(self) -> bool:
        return self.step is None

    def to_json(self) -> str:
        return json.dumps({"is_identical": self.is_identical, **asdict(self)}, indent=2, default=repr)


def compare_runs(run_a: Path | str, run_b: Path | str) -> Comparison:
    """Walk the steps of both runs in order and stop at the first that differs.

    Raises:
        FileNotFoundError: a folder is no run's.
        ValueError: a file of a run cannot be read, or the runs have no step in common.
    """
    a, b = _Run(Path(run_a)), _Run(Path(run_b))
    last_steps = (max(a.metrics), max(b.metrics))
    steps = [step for step in sorted(a.metrics.keys() | b.metrics.keys()) if step <= min(last_steps)]
    if not steps:
        raise ValueError(
            f"{a.folder} (steps from {min(a.metrics)}) and {b.folder} (from {min(b.metrics)}) do not meet."
        )
    not_compared = tuple(_not_compared(a, b))
    through = None
    for step in steps:
        if differences := tuple(_differences(a, b, step)):
            return Comparison(through, step, differences, last_steps, not_compared)
        through = step
    return Comparison(through, None, (), last_steps, not_compared)


def format_comparison(comparison: Comparison, names: tuple[str, str]) -> str:
    """The comparison as a few lines for people."""
    (a, b), lines = names, []
    if comparison.through is not None:
        lines.append(f"identical through {_step(comparison.through)}")
    if comparison.is_identical:
        ends = comparison.last_steps
        if ends[0] != ends[1]:
            short, long = (a, b) if ends[0] < ends[1] else (b, a)
            lines.append(f"{short} ends there; {long} goes on to step {max(ends)}")
    else:
        lines.append(f"{_step(comparison.step)} differs:")
        for difference in comparison.differences:
            more = f"  (and {difference.more} more)" if difference.more else ""
            lines.append(f"  {difference.kind}: {difference.where}{more}")
            lines += [f"    {a}: {_shown(difference.a)}", f"    {b}: {_shown(difference.b)}"]
    lines += [f"not compared: {text}" for text in comparison.not_compared]
    return "\n".join(lines)


class _Run:
    """What a run's folder tells, read when asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder}; give the folder of a run, like outputs/<run name>.")
        self.metrics = {line["step"]: line for line in read_metrics(folder)}
        if not self.metrics:
            raise ValueError(f"{folder}: metrics.jsonl is empty, no step was finished.")

    @cached_property
    def ledger(self) -> dict[int, dict[str, Any]]:
        if not (self.folder / LEDGER_FILE).exists():
            return {}
        return {line["rollout_id"]: line for line in read_ledger(self.folder)}

    @cached_property
    def digests(self) -> dict[int, dict[str, str]]:
        return read_digests(self.folder)

    def sample_files(self, step: int, kind: str) -> dict[str, Path]:
        """Name -> file of a step's samples; `kind` is `rollout` or `eval`."""
        number = "initial" if step < 0 else f"{step:06d}"
        folder = self.folder / SAMPLES_DIR
        return {path.stem: path for path in sorted(folder.glob(f"{kind}_{number}*.jsonl"))}

    @property
    def parts(self) -> dict[str, bool]:
        """What can be compared besides metrics, and whether the run has it."""
        return {
            f"prompts ({LEDGER_FILE})": (self.folder / LEDGER_FILE).exists(),
            f"samples ({SAMPLES_DIR}/)": (self.folder / SAMPLES_DIR).is_dir(),
            f"weights ({DIGESTS_DIR}/)": (self.folder / DIGESTS_DIR).is_dir(),
        }


def _not_compared(a: _Run, b: _Run) -> Iterator[str]:
    for part, in_a in a.parts.items():
        missing = [str(run.folder) for run, has in ((a, in_a), (b, b.parts[part])) if not has]
        if missing:
            yield f"{part}, which {' and '.join(missing)} {'has' if len(missing) == 1 else 'have'} not"


def _differences(a: _Run, b: _Run, step: int) -> Iterator[Difference]:
    """At most one of each kind, in the order in which a step comes about."""
    kinds: tuple[tuple[str, Iterable[Found]], ...] = (
        ("prompts", _of_ledgers(a, b, step)),
        ("samples", _of_samples(a, b, step, "rollout")),
        ("metrics", _of_metrics(a, b, step, evaluation=False)),
        ("weights", _of_weights(a, b, step)),
        ("evaluation samples", _of_samples(a, b, step, "eval")),
        ("evaluation metrics", _of_metrics(a, b, step, evaluation=True)),
    )
    for kind, found in kinds:
        if differing := list(found):
            where, in_a, in_b = differing[0]
            yield Difference(kind, where, in_a, in_b, len(differing) - 1)


def _of_ledgers(a: _Run, b: _Run, step: int) -> Iterator[Found]:
    if step < 0 or not (a.ledger and b.ledger):
        return
    in_a, in_b = a.ledger.get(step), b.ledger.get(step)
    if in_a is None or in_b is None:
        yield "the ledger's line", _present(in_a), _present(in_b)
        return
    for field in _LEDGER_FIELDS:
        if in_a.get(field) != in_b.get(field):
            yield _first_of_lists(field, "entry", in_a.get(field), in_b.get(field))


def _of_samples(a: _Run, b: _Run, step: int, kind: str) -> Iterator[Found]:
    if not ((a.folder / SAMPLES_DIR).is_dir() and (b.folder / SAMPLES_DIR).is_dir()):
        return
    files_a, files_b = a.sample_files(step, kind), b.sample_files(step, kind)
    for name in sorted(files_a.keys() | files_b.keys()):
        if name not in files_a or name not in files_b:
            yield f"{name}.jsonl", _present(files_a.get(name)), _present(files_b.get(name))
            continue
        rows_a, rows_b = _rows(files_a[name]), _rows(files_b[name])
        prefix = "" if kind == "rollout" else f"{name}: "
        if len(rows_a) != len(rows_b):
            yield f"{prefix}number of samples", len(rows_a), len(rows_b)
        for number, (row_a, row_b) in enumerate(zip(rows_a, rows_b, strict=False)):
            if (found := _of_rows(row_a, row_b)) is not None:
                field, in_a, in_b = found
                which = f"sample {row_a.get('index')} (line {number + 1}, group {row_a.get('group_index')})"
                yield f"{prefix}{which}: {field}", in_a, in_b


def _of_rows(a: dict[str, Any], b: dict[str, Any]) -> Found | None:
    """The first field that differs; fields that only one of them has come from another version of slime."""
    fields = [*_FIELDS_FIRST, *sorted(a.keys() - set(_FIELDS_FIRST))]
    for field in fields:
        if field in a and field in b and a[field] != b[field]:
            return _first_of_lists(field, field.removesuffix("s"), a[field], b[field])
    return None


def _of_metrics(a: _Run, b: _Run, step: int, *, evaluation: bool) -> Iterator[Found]:
    in_a, in_b = a.metrics.get(step), b.metrics.get(step)
    if in_a is None or in_b is None:
        if not evaluation:
            yield "the line of metrics.jsonl", _present(in_a), _present(in_b)
        return
    for name in dict.fromkeys([*in_a, *in_b]):
        if name == "time" or depends_on_timing(name) or name.startswith("eval/") != evaluation:
            continue
        value_a, value_b = in_a.get(name, ABSENT), in_b.get(name, ABSENT)
        if value_a != value_b:
            yield name, value_a, value_b


def _of_weights(a: _Run, b: _Run, step: int) -> Iterator[Found]:
    """Of syncs that both runs made; how often weights are sent is no difference in the weights."""
    in_a, in_b = a.digests.get(step), b.digests.get(step)
    if in_a is None or in_b is None:
        return
    for name in dict.fromkeys([*in_a, *in_b]):
        digest_a, digest_b = in_a.get(name, ABSENT), in_b.get(name, ABSENT)
        if digest_a != digest_b:
            yield name, digest_a, digest_b


def _first_of_lists(name: str, item: str, a: Any, b: Any) -> Found:
    """Of two lists the first item that differs, of anything else the two values."""
    if not isinstance(a, list) or not isinstance(b, list):
        return name, a, b
    for i, (in_a, in_b) in enumerate(zip(a, b, strict=False)):
        if in_a != in_b:
            return f"{name}, {item} {i} of {len(a)}", in_a, in_b
    return f"{name}, how many", len(a), len(b)


def _rows(path: Path) -> Sequence[dict[str, Any]]:
    rows = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON ({error}).") from None
        rows.append(row)
    return rows


def _present(value: object) -> str:
    return ABSENT if value is None else "(present)"


def _step(number: int | None) -> str:
    return "the start" if number == -1 else f"step {number}"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
