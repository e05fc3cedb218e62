"""What the machine offers (cores, instructions, GPUs, SGLang), found without importing torch or any large package."""

import importlib.machinery
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Machine:
    """Facts that the plan depends on; tests write their own."""

    cores: int
    """CPU cores that this process may use."""
    num_gpus: int = 0
    """NVIDIA GPUs on this machine."""
    gpu_memory_bytes: int | None = None
    """Of its smallest GPU; None where nvidia-smi does not tell."""
    cpu_instructions: tuple[str, ...] = ()
    """Those of `BF16_INSTRUCTIONS` that the CPU has."""
    has_sglang: bool = False
    """Whether the package sglang is installed (or another interpreter that has it is named)."""
    joins_cluster: bool = False
    """Whether a Ray cluster already runs that the run will join, so that its devices are not known here."""
    expandable_segments: bool = False
    """Whether the environment gives torch's CUDA allocator segments that grow."""
    started: str = "run"
    """Time of the start, for the run's default name."""
    working_dir: str = "."
    """Absolute path that relative paths start from."""

    @property
    def has_bf16(self) -> bool:
        """Whether the CPU multiplies bf16 matrices itself."""
        return bool(self.cpu_instructions)


def look_at_machine(environ: Mapping[str, str] = os.environ) -> Machine:
    """Look at the machine that this process runs on."""
    num_gpus = _num_gpus(environ)
    return Machine(
        cores=_cores(),
        num_gpus=num_gpus,
        gpu_memory_bytes=_gpu_memory_bytes() if num_gpus else None,
        cpu_instructions=_cpu_instructions(Path("/proc/cpuinfo")),
        has_sglang=bool(environ.get("SLIME_SGLANG_PYTHON")) or _is_installed("sglang"),
        joins_cluster=bool(environ.get("RAY_ADDRESS")),
        expandable_segments=_has_expandable_segments(environ),
        started=time.strftime("%Y%m%d-%H%M%S"),
        working_dir=os.getcwd(),
    )


def _cores() -> int:
    """Cores of this process: its affinity, and a container's quota if that is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return max(1, cores)


def _cpu_instructions(cpuinfo: Path) -> tuple[str, ...]:
    try:
        text = cpuinfo.read_text()
    except OSError:
        return ()
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return tuple(name for name in BF16_INSTRUCTIONS if name in flags)


def _has_expandable_segments(environ: Mapping[str, str]) -> bool:
    settings = ",".join(environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    return "expandable_segments:true" in settings.replace(" ", "").lower()


def _num_gpus(environ: Mapping[str, str]) -> int:
    """GPUs by the driver's files, else by nvidia-smi; CUDA_VISIBLE_DEVICES limits them."""
    found = len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) or len(list(Path("/dev").glob("nvidia[0-9]*")))
    if not found and (command := shutil.which("nvidia-smi")):
        try:
            reply = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=10, check=False)
            found = reply.stdout.count("GPU ") if reply.returncode == 0 else 0
        except (OSError, subprocess.TimeoutExpired):
            found = 0
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    return min(found, len([v for v in visible.split(",") if v.strip() not in ("", "-1")]))


def _gpu_memory_bytes() -> int | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        reply = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    mib = [int(line) for line in reply.stdout.split() if line.isdigit()]
    return min(mib) << 20 if mib else None


def _is_installed(package: str) -> bool:
    """Whether a package with its source is on the path; nothing is imported."""
    spec = importlib.machinery.PathFinder.find_spec(package, sys.path)
    return spec is not None and spec.origin is not None
