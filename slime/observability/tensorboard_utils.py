"""Writes scalars for TensorBoard with its own event writer, so that neither torch nor TensorFlow is imported."""

import argparse
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def tensorboard_dir(args: argparse.Namespace) -> Path:
    """Where the event files go.

    The run's folder, unless asked otherwise: --tb-project-name and --tb-experiment-name are folders below
    TENSORBOARD_DIR (else below --output-dir), and TENSORBOARD_DIR alone is the folder itself.
    """
    names = [name for key in ("tb_project_name", "tb_experiment_name") if (name := getattr(args, key, None))]
    root = os.environ.get("TENSORBOARD_DIR")
    if root is None:
        root = getattr(args, "output_dir", None) or "outputs" if names else args.run_dir
    return Path(root, *names)


class _TensorboardAdapter:
    """One event file; `log` writes a dict of scalars at a step and flushes."""

    def __init__(self, args: argparse.Namespace, directory: Path | None = None) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise ImportError(
                f"TensorBoard files are written by default but the package is missing ({error}). "
                "Install it with `pip install tensorboard`, or pass --no-tensorboard."
            ) from error
        self.directory = directory or tensorboard_dir(args)
        self._event, self._summary, self._session = event_pb2.Event, summary_pb2.Summary, event_pb2.SessionLog
        self._writer = EventFileWriter(str(self.directory))

    def log(self, data: Mapping[str, float], step: int) -> None:
        """Args: data: finite or not, by name. step: the x-value; may be -1."""
        values = [self._summary.Value(tag=name, simple_value=float(value)) for name, value in data.items()]
        event = self._event(step=step, wall_time=time.time(), summary=self._summary(value=values))
        self._writer.add_event(event)
        self._writer.flush()

    def purge(self, step: int) -> None:
        """Make readers forget what earlier files of the folder have of this step and later ones."""
        start = self._session(status=self._session.START)
        self._writer.add_event(self._event(step=step, wall_time=time.time(), session_log=start))
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


def read_scalars(directory: Path | str) -> dict[str, list[tuple[int, float]]]:
    """Scalars of every event file in a folder: name -> [(step, value), ...] in the order written, less the purged."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto import event_pb2

    scalars: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(Path(directory).glob("events.out.tfevents.*")):
        for raw in RawEventFileLoader(str(path)).Load():
            event: Any = event_pb2.Event.FromString(raw)
            if event.HasField("session_log") and event.session_log.status == event_pb2.SessionLog.START:
                earlier = {tag: [entry for entry in found if entry[0] < event.step] for tag, found in scalars.items()}
                scalars = {tag: found for tag, found in earlier.items() if found}
            for value in event.summary.value:
                scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return scalars
