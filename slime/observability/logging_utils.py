"""Logging inside a process: log lines with a rank prefix, and metrics collected until the driver takes them.

Only the driver writes metrics (`RunLog`). Any other process collects with `log` and hands over with `take_pending`.
"""

import argparse
import logging
import os
import threading
from collections.abc import Mapping
from typing import Any

from slime.observability.run_log import RunLog

logger = logging.getLogger(__name__)

_lock = threading.Lock()
_pending: dict[str, Any] = {}
_run_log: RunLog | None = None


def configure_logger(prefix: str = "") -> None:
    """Sends log lines to stderr as `[time prefix] file:line - LEVEL - text`; SLIME_LOG_LEVEL sets the level (INFO).

    Args:
        prefix: who speaks, e.g. `actor rank 3`.
    """
    level = os.environ.get("SLIME_LOG_LEVEL", "INFO").upper()
    if level not in logging.getLevelNamesMapping():
        raise ValueError(f"SLIME_LOG_LEVEL is {level!r}; use one of DEBUG, INFO, WARNING, ERROR, CRITICAL.")
    who = f" {prefix}".replace("%", "%%") if prefix else ""
    logging.basicConfig(
        level=level,
        format=f"[%(asctime)s{who}] %(filename)s:%(lineno)d - %(levelname)s - %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        force=True,
    )
    for chatty in ("httpx", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def init_tracking(args: argparse.Namespace, primary: bool = True) -> RunLog | None:
    """Opens the run's log in the driver (primary); elsewhere only forgets what was collected."""
    global _run_log
    take_pending()
    if not primary:
        return None
    if _run_log is None:
        _run_log = RunLog(args.run_dir, args)
    return _run_log


def finish_tracking(args: argparse.Namespace | None = None) -> None:
    """Closes the run's log; says so when collected metrics were never taken."""
    global _run_log
    if left := take_pending():
        logger.warning("%d metrics were collected but never written: %s", len(left), ", ".join(sorted(left)))
    if _run_log is not None:
        _run_log.close()
        _run_log = None


def log(args: argparse.Namespace, metrics: Mapping[str, Any], step_key: str) -> None:
    """Collects metrics for the driver's next line; a name that comes twice keeps the last value.

    Args:
        metrics: values by declared name, and the step itself under step_key.
        step_key: which step they belong to: `rollout/step`, `train/step` or `eval/step`.
    """
    if step_key not in metrics:
        raise ValueError(f"The metrics lack their step {step_key!r}; got {', '.join(sorted(metrics)) or 'nothing'}.")
    with _lock:
        _pending.update(metrics)


def take_pending() -> dict[str, Any]:
    """What was collected since the last call, by name; after it nothing is pending."""
    with _lock:
        taken = dict(_pending)
        _pending.clear()
    return taken
