"""A rollout that never ends: it keeps engines and router up for somebody to try them by hand."""

import logging
import time
from argparse import Namespace
from typing import Any

logger = logging.getLogger(__name__)

_REMINDER_S = 600


def sleep(args: Namespace, rollout_id: int, data_source: Any, evaluation: bool = False) -> None:
    """Block until the process is ended."""
    while True:
        logger.info(
            "rollout %d sleeps; engines are served at http://%s:%s",
            rollout_id,
            args.sglang_router_ip,
            args.sglang_router_port,
        )
        time.sleep(_REMINDER_S)
