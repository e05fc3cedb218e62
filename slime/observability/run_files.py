"""Names of what lies in a run's folder, and writing a file of it whole."""

import os
from pathlib import Path

METRICS_FILE = "metrics.jsonl"
LEDGER_FILE = "ledger.jsonl"
SAMPLES_DIR = "samples"
DIGESTS_DIR = "digests"
UNFINISHED_FILE = "unfinished_step.json"
"""The metrics of a step whose checkpoint is being written; its line of metrics.jsonl comes after the checkpoint."""


def write_whole(path: Path, text: str, *, survives_power_loss: bool = True) -> None:
    """Write a file so that a reader finds the old or the new contents, and never a part, however the process ends.

    Args:
        survives_power_loss: the machine's end too. It waits for the disk, which may be at work on a checkpoint.
    """
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        if survives_power_loss:
            file.flush()
            os.fsync(file.fileno())
    partial.replace(path)
