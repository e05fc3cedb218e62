"""The random state of a training rank, to save and to set."""

import random
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel


def random_state() -> dict[str, Any]:
    """python, numpy, torch and Megatron's forks for parallel regions."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "regions": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["regions"])
