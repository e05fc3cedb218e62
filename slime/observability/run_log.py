"""The record of a run: a line of metrics and one of the ledger, TensorBoard scalars and a printed line a step.

W&B gets the metrics on request.

Only the driver writes. Every metric has a declared name (metric_names); an undeclared one is warned about once,
and is an error under --ci-test.
"""

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from slime.observability import metric_names
from slime.observability.digests import version_files
from slime.observability.metric_utils import compute_rollout_step
from slime.observability.resume import cut_back, read_unfinished, remove_finished
from slime.observability.run_files import DIGESTS_DIR, LEDGER_FILE, METRICS_FILE, UNFINISHED_FILE, write_whole
from slime.observability.step_line import format_step
from slime.observability.tensorboard_utils import _TensorboardAdapter
from slime.observability.wandb_utils import WandbAdapter
from slime.utils.durable import sync_file, sync_folder

logger = logging.getLogger(__name__)


class RunLog:
    """Writes what a run has to show into its folder.

    Args:
        run_dir: the run's folder; made when missing. An existing metrics.jsonl is continued (a resumed run); `begin`
            cuts it back to the checkpoint.
        args: reads `no_tensorboard`, the `tb_*`, `use_wandb` and `wandb_*` names, `ci_test`; all
            may be missing.
        stream: where the step line is printed.
    """

    def __init__(self, run_dir: Path | str, args: argparse.Namespace, stream: TextIO | None = None) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._args = args
        self._stream = stream
        self._warned: set[str] = set()
        self._trackers: list[_TensorboardAdapter | WandbAdapter] = []
        if uses_tensorboard(args):
            self._trackers.append(_TensorboardAdapter(argparse.Namespace(**(vars(args) | {"run_dir": str(run_dir)}))))
        if getattr(args, "use_wandb", False):
            self._trackers.append(WandbAdapter(args, self.run_dir))
        self._accounted_for: int | None = None
        self._on_disk: set[Path] = set()
        self._file = self._open()

    def _open(self) -> TextIO:
        path = self.run_dir / METRICS_FILE
        is_torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        file = path.open("a", encoding="utf-8")
        if is_torn:
            file.write("\n")
        return file

    def begin(self, start: int) -> dict[str, Any] | None:
        """Makes the record that of the steps before `start`, the first step to come; see `resume.cut_back`.

        TensorBoard is told to forget the later steps, too.

        Returns:
            the metrics of step `start - 1` if the run was killed after its checkpoint and before its line; they are
            still to be written.
        """
        had_steps = self._file.tell() > 0
        self._file.close()
        cut_back(self.run_dir, start)
        unfinished = read_unfinished(self.run_dir, start - 1)
        self._file = self._open()
        if had_steps:
            first = compute_rollout_step(self._args, start) if start > 0 else -1
            for tracker in self._trackers:
                if isinstance(tracker, _TensorboardAdapter):
                    tracker.purge(first)
        return unfinished

    def prepare(self, rollout_id: int, metrics: Mapping[str, Any], ledger: Mapping[str, Any] | None = None) -> None:
        """Write down what is known of a step before its checkpoint is committed.

        A run that is killed between its checkpoint and `step` so loses neither the line nor the rows of the ledger.
        """
        self._write_ledger(rollout_id, ledger)
        values = {name: to_number(name, value) for name, value in metrics.items()}
        write_whole(self.run_dir / UNFINISHED_FILE, json.dumps({"step": rollout_id, "metrics": values}))

    def put_to_disk(self) -> None:
        """What is written so far outlasts the machine's end: metrics, ledger and digests.

        For the moment before a checkpoint, which goes on from them, and not for every step: whatever waits for the
        disk also waits for a checkpoint that is on its way to it.
        """
        digests = [path for path in version_files(self.run_dir / DIGESTS_DIR) if path not in self._on_disk]
        for path in (self.run_dir / METRICS_FILE, self.run_dir / LEDGER_FILE, *digests):
            if path.exists():
                sync_file(path)
        if digests:
            sync_folder(self.run_dir / DIGESTS_DIR)
            self._on_disk.update(digests)
        sync_folder(self.run_dir)

    def step(self, rollout_id: int, metrics: Mapping[str, Any], ledger: Mapping[str, Any] | None = None) -> None:
        """Writes one step, whole, before it returns.

        Args:
            rollout_id: the step's number; -1 for what is known before the first step.
            metrics: numbers (or tensors of one number) by declared name.
            ledger: the rollout's line of the ledger, unless `prepare` wrote it.

        Raises:
            TypeError: a value is not a number.
            ValueError: a name is not declared, under --ci-test.
        """
        self._check_names(metrics)
        values = {name: to_number(name, value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        for name in sorted(name for name, value in finite.items() if value is None):
            logger.warning("Step %d: %s is %s; metrics.jsonl gets null.", rollout_id, name, values[name])
        self._write_ledger(rollout_id, ledger)
        line = {"step": rollout_id, "time": round(time.time(), 3), **finite}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.log(values, compute_rollout_step(self._args, rollout_id))
        print(format_step(rollout_id, finite), file=self._stream or sys.stdout, flush=True)

    def close(self) -> None:
        """Finishes the trackers and the file; a second call does nothing."""
        for tracker in self._trackers:
            tracker.finish()
        self._trackers = []
        if self._file.closed:
            return
        self._file.close()
        try:
            self.put_to_disk()
            remove_finished(self.run_dir)
        except OSError as error:
            logger.warning("The end of the run's record may not be on the disk: %s", error)

    def _write_ledger(self, rollout_id: int, ledger: Mapping[str, Any] | None) -> None:
        if ledger is None or self._accounted_for == rollout_id:
            return
        with (self.run_dir / LEDGER_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(ledger) + "\n")
        self._accounted_for = rollout_id

    def _check_names(self, metrics: Mapping[str, Any]) -> None:
        if getattr(self._args, "ci_test", False):
            metric_names.require_declared(metrics)
        for name in metric_names.undeclared(set(metrics) - self._warned):
            self._warned.add(name)
            logger.warning(
                "The metric %s is not declared: nobody can look up its unit. From a plug-in, call "
                "slime.observability.metric_names.declare(name, unit, description).",
                name,
            )


def uses_tensorboard(args: argparse.Namespace) -> bool:
    """TensorBoard files are written unless --no-tensorboard; --use-tensorboard changes nothing."""
    return not getattr(args, "no_tensorboard", False)


def to_number(name: str, value: Any) -> int | float:
    """A metric's value as a Python number; takes anything with `.item()`, such as a 0-dim tensor."""
    if hasattr(value, "item") and getattr(value, "size", None) != 0:
        try:
            value = value.item()
        except (ValueError, RuntimeError) as error:
            raise TypeError(f"The metric {name} must be one number: {error}") from error
    if isinstance(value, bool):
        return int(value)
    if not isinstance(value, int | float):
        raise TypeError(f"The metric {name} must be one number, got {type(value).__name__}: {value!r:.80}")
    return value


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """The steps of a run by number; where a resumed run repeats a step, each metric's last value counts."""
    steps: dict[int, dict[str, Any]] = {}
    for line in read_lines(run_dir):
        steps.setdefault(line["step"], {}).update(line)
    return [steps[number] for number in sorted(steps)]


def read_lines(run_dir: Path | str) -> Iterator[dict[str, Any]]:
    """The lines of a run as they were written; one that a crash tore is left out with a warning."""
    path = Path(run_dir) / METRICS_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: either this is not a run's folder, or no step was finished.")
    with path.open(encoding="utf-8") as lines:
        for number, text in enumerate(lines, start=1):
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                if text.strip():
                    logger.warning("%s:%d is not a whole line (a crash?) and is left out.", path, number)
                continue
            yield line
