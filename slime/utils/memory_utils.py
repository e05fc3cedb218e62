"""How much memory is in use, and giving back what is not needed. Works with and without a GPU."""

import contextlib
import ctypes
import gc
import logging
import sys
from pathlib import Path

logger = logging.getLogger(__name__)

_GIB = 1024**3


def available_memory() -> dict[str, float]:
    """Memory of this process and its device in GiB, under names that say which."""
    info = {"process_resident_gib": _resident_bytes() / _GIB}
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        info |= {
            "device_free_gib": free / _GIB,
            "device_total_gib": total / _GIB,
            "torch_allocated_gib": torch.cuda.memory_allocated() / _GIB,
            "torch_reserved_gib": torch.cuda.memory_reserved() / _GIB,
        }
    return info


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm") as statm:
            pages = int(statm.read().split()[1])
    except OSError:  # not Linux
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    import os

    return pages * os.sysconf("SC_PAGE_SIZE")


_CGROUPS = (  # limit, use, and which part of its use could be given up; version 2, then 1
    ("memory.max", "memory.current", "memory.stat", ("inactive_file", "active_file")),
    (
        "memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat",
        ("total_inactive_file", "total_active_file"),
    ),
)  # fmt: skip


def host_memory_left(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this process may still take: what the machine has, and what a container's limit leaves of it.

    None where the system does not tell.
    """
    found = []
    with contextlib.suppress(OSError, KeyError):
        found.append(_figures(proc / "meminfo")["MemAvailable:"] * 1024)
    for limit, use, stat, reclaimable in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the limit is "max"
            figures = _figures(cgroup / stat)
            in_use = int((cgroup / use).read_text()) - sum(figures.get(name, 0) for name in reclaimable)
            found.append(max(0, int((cgroup / limit).read_text()) - in_use))
    return min(found, default=None)


def _figures(path: Path) -> dict[str, int]:
    """First word -> the number after it, of each line."""
    return {words[0]: int(words[1]) for words in map(str.split, path.read_text().splitlines()) if len(words) > 1}


def print_memory(msg: str, clear_before_print: bool = False) -> dict[str, float]:
    """Log one line with the memory in use, headed by `msg`; returns the figures in GiB."""
    if clear_before_print:
        clear_memory()
    info = available_memory()
    logger.info("memory %s: %s", msg, "  ".join(f"{name} {value:.2f}" for name, value in info.items()))
    return info


def clear_memory(clear_host_memory: bool = False) -> None:
    """Collect garbage and hand cached memory back: the device's, and with `clear_host_memory` the heap's too."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    if clear_host_memory and sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)


def settle_objects() -> None:
    """To be called when a long-lived process has started: the garbage collector leaves alone what exists by then.

    Walking the objects of torch, transformers and a model takes 0.2 s, and the collector would do it again and again.
    """
    gc.collect()
    gc.freeze()
