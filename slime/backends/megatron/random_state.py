"""The random state of a training rank, to save and to set."""

from typing import Any

import torch
from megatron.core import tensor_parallel

from slime.utils.random_state import host_random_state, set_host_random_state


def random_state() -> dict[str, Any]:
    """python, numpy, torch and Megatron's forks for parallel regions, as plain data."""
    return host_random_state() | {
        "cuda": torch.cuda.get_rng_state(),
        "regions": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
    }


def set_random_state(state: dict[str, Any]) -> None:
    set_host_random_state(state)
    torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["regions"])
