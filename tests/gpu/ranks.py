"""Which GPU a rank of a test gets, and what its process needs to share one where there are fewer than ranks."""

import os
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
_A_HOST_EACH = Path(__file__).parent / "a_host_each"


def share_one() -> bool:
    """Whether ranks have to share a GPU, each as a host of its own."""
    return torch.cuda.device_count() < 2


def environment_of_rank(rank: int) -> dict[str, str]:
    """For a process of its own: its GPU, and the folder that lets several ranks have the same one."""
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or "").split(",")
    gpus = [gpu for gpu in visible if gpu] or [str(gpu) for gpu in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": gpus[rank % len(gpus)], "PYTHONPATH": python_path()}


def python_path() -> str:
    """The checkout, and what makes each process a host of its own where there is one GPU."""
    folders = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    if share_one():
        folders.insert(0, str(_A_HOST_EACH))
    return os.pathsep.join(filter(None, folders))
