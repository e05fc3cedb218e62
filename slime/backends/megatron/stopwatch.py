"""Seconds of the parts of a training step, as `perf/` metrics."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from slime.backends.megatron.accelerator import Accelerator
from slime.backends.megatron.profiling import Profiler


class Stopwatch:
    """Sums the seconds of named parts, of which the profiler hears; the device has finished a part before it ends."""

    def __init__(self, accelerator: Accelerator, profiler: Profiler) -> None:
        self._accelerator, self._profiler = accelerator, profiler
        self._seconds: dict[str, float] = {}

    def reset(self) -> None:
        self._seconds = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        self._accelerator.synchronize()
        start = time.perf_counter()
        with self._profiler.part(name):
            yield
            self._accelerator.synchronize()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def metrics(self, num_tokens: int, ranks_per_replica: int) -> dict[str, float]:
        """`perf/{part}_time` of the slowest rank, and the speed of all ranks together. Collective.

        Args:
            num_tokens: that this rank's data-parallel replica has trained.
            ranks_per_replica: how many ranks count the same tokens.
        """
        names, device = sorted(self._seconds), self._accelerator.device
        seconds = torch.tensor([self._seconds[name] for name in names], dtype=torch.float64, device=device)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        slowest = dict(zip(names, seconds.tolist(), strict=True))
        tokens = torch.tensor(float(num_tokens), dtype=torch.float64, device=device)
        dist.all_reduce(tokens)
        speed = tokens.item() / ranks_per_replica / max(slowest["actor_train"], 1e-9)
        return {f"perf/{name}_time": value for name, value in slowest.items()} | {"perf/actor_train_tok_per_s": speed}
