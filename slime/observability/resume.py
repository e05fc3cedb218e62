"""A run that is started again goes on from a checkpoint: what its folder tells of later steps is taken out first."""

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from slime.observability.digests import rollout_id_of, version_files
from slime.observability.run_files import (
    DIGESTS_DIR,
    LEDGER_FILE,
    METRICS_FILE,
    SAMPLES_DIR,
    UNFINISHED_FILE,
    write_whole,
)

logger = logging.getLogger(__name__)

_SAMPLES_OF = re.compile(r"(?:rollout|eval)_(\d{6,}|initial)(?:_.*)?\.jsonl$")


def cut_back(run_dir: Path | str, start: int) -> None:
    """Take what a run's folder tells of rollouts from `start` on out of it: they will be made again.

    Metrics, ledger, sample files and weight digests of earlier rollouts stay, with the evaluation before the first;
    with `start` 0 nothing stays, because that evaluation is made again too. Each file is replaced whole or not at all.
    """
    folder = Path(run_dir)
    first = start if start > 0 else -1
    steps = _cut_lines(folder / METRICS_FILE, lambda line: int(line["step"]) < first)
    _cut_lines(folder / LEDGER_FILE, lambda line: int(line["rollout_id"]) < first)
    for path, rollout_id in (*_sample_files(folder / SAMPLES_DIR), *_digest_files(folder / DIGESTS_DIR)):
        if rollout_id >= first:
            path.unlink()
    if (_unfinished(folder) or {"step": -1})["step"] >= first:
        (folder / UNFINISHED_FILE).unlink(missing_ok=True)
    if steps and start > 0:
        logger.info("%s goes on at step %d: %d later line(s) of %s were cut off", folder, start, steps, METRICS_FILE)
    elif steps:
        logger.info("%s has no checkpoint to go on from: its %d line(s) of %s make way", folder, steps, METRICS_FILE)


def read_unfinished(run_dir: Path | str, rollout_id: int) -> dict[str, Any] | None:
    """The metrics of `rollout_id` from a run that ended after it saved that step and before its line was on the disk.

    Returns:
        None when there are none, or when metrics.jsonl has the line.
    """
    found = _unfinished(Path(run_dir))
    if found is None or found["step"] != rollout_id:
        return None
    has_line = any(line["step"] == rollout_id for _, line in _whole_lines(Path(run_dir) / METRICS_FILE))
    metrics: dict[str, Any] = found["metrics"]
    return None if has_line else metrics


def remove_finished(run_dir: Path | str) -> None:
    """Remove the metrics that `read_unfinished` reads if metrics.jsonl has them, and is on the disk."""
    found = _unfinished(Path(run_dir))
    if found is not None and read_unfinished(run_dir, found["step"]) is None:
        (Path(run_dir) / UNFINISHED_FILE).unlink()


def _unfinished(folder: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((folder / UNFINISHED_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return found


def _digest_files(folder: Path) -> Iterator[tuple[Path, int]]:
    """As `digest_files`. A machine that lost power leaves torn files of what came after the last checkpoint."""
    for path in version_files(folder):
        try:
            yield path, rollout_id_of(path)
        except ValueError as error:
            logger.warning("Removed, because the machine stopped before it was on the disk: %s", error)
            path.unlink()


def _cut_lines(path: Path, stays: Callable[[dict[str, Any]], bool]) -> int:
    """Keep the lines that stay; torn ones go. Returns how many whole lines went."""
    if not path.exists():
        return 0
    lines = list(_whole_lines(path))
    kept = [text for text, line in lines if stays(line)]
    text = "".join(f"{line}\n" for line in kept)
    if text != path.read_text(encoding="utf-8"):
        write_whole(path, text)
    return len(lines) - len(kept)


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.exists():
        return
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict):
            yield text, line


def _sample_files(folder: Path) -> Iterator[tuple[Path, int]]:
    for path in folder.glob("*.jsonl"):
        if match := _SAMPLES_OF.match(path.name):
            yield path, -1 if match[1] == "initial" else int(match[1])
