"""The random states of this process (python, numpy, torch) as plain data that a file can hold."""

import random
from typing import Any


def host_random_state() -> dict[str, Any]:
    """What `torch.load(weights_only=True)` reads back: tensors, tuples, numbers, text."""
    import numpy as np
    import torch

    kind, keys, position, has_gauss, gaussian = np.random.get_state(legacy=True)
    numbers = torch.from_numpy(np.asarray(keys).astype("int64"))
    return {
        "python": random.getstate(),
        "numpy": (str(kind), numbers, int(position), int(has_gauss), float(gaussian)),
        "torch": torch.get_rng_state(),
    }


def set_host_random_state(state: dict[str, Any]) -> None:
    """Continue where `host_random_state` was taken."""
    import numpy as np
    import torch

    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"])
