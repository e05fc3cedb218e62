"""The random states of the process that generates, beside the data source's state of the same checkpoint."""

import logging
from typing import Any

from slime.utils.checkpoint_folder import random_state_path
from slime.utils.durable import partial_path, put_in_place
from slime.utils.random_state import host_random_state, set_host_random_state

logger = logging.getLogger(__name__)


def save_random_state(folder: str, rollout_id: int, state: Any = None) -> None:
    """Write python's, numpy's and torch's to `<folder>/rollout/random_state_<rollout_id>.pt`.

    Args:
        state: what `host_random_state` gave earlier; that of now where it is None.
    """
    import torch

    path = random_state_path(folder, rollout_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(host_random_state() if state is None else state, partial_path(path))
    put_in_place(partial_path(path), path)


def load_random_state(folder: str | None, rollout_id: int) -> None:
    """Continue where `save_random_state` was called; nothing if another program made the checkpoint."""
    import torch

    if folder is None or not (path := random_state_path(folder, rollout_id)).is_file():
        logger.info("no random states of rollout %d to go on with", rollout_id)
        return
    set_host_random_state(torch.load(path, weights_only=True))
