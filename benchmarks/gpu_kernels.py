"""What a GPU does while functions run: time and launches by kind of kernel, and the gaps between them."""

from collections.abc import Callable
from typing import Any

import torch


def profiled(*functions: Callable[[], Any]) -> dict[str, tuple[float, int]]:
    """Milliseconds and launches of each group of kernels while the functions run."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for function in functions:
            function()
        torch.cuda.synchronize()
    groups: dict[str, tuple[float, int]] = {}
    spans: list[tuple[float, float]] = []
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA and not event.name.startswith(("gpu_user_annotation", "ProfilerStep")):
            if getattr(event, "is_user_annotation", False):
                continue
            name = group_of(event.name)
            milliseconds, count = groups.get(name, (0.0, 0))
            groups[name] = (milliseconds + event.time_range.elapsed_us() / 1e3, count + 1)
            spans.append((event.time_range.start, event.time_range.end))
    for gap, at in idle(spans)[:3]:
        groups[f"nothing, from {at / 1e3:.1f} ms on"] = (gap / 1e3, 1)
    groups["nothing, in all"] = (sum(gap for gap, _ in idle(spans)) / 1e3, len(idle(spans)))
    return groups


def idle(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Microseconds in which no kernel runs, and when they begin after the first kernel; the longest first."""
    gaps, begin = [], min((start for start, _ in spans), default=0.0)
    end = begin
    for start, stop in sorted(spans):
        if start > end:
            gaps.append((start - end, end - begin))
        end = max(end, stop)
    return sorted(gaps, reverse=True)


def group_of(kernel: str) -> str:
    """A short name that kernels of one kind share."""
    for word in ("flash_fwd", "flash_bwd", "sdpa", "fmha", "nvjet", "gemm", "cutlass", "Memcpy", "Memset"):
        if word in kernel:
            return word
    short = kernel.removeprefix("void ").replace("at::native::", "").replace("(anonymous namespace)::", "")
    return short[:100]
