"""What slime asks of a trainer and of an engine: Protocols and plain records, no behaviour.

The loop, the weight sync and the process room know trainers and engines only by these names,
so a fake of twenty lines stands in for either in a test.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from slime.weight_sync.base import EngineError, WeightEngine, WeightSource

__all__ = [
    "EngineClient",
    "EngineError",
    "EngineSpec",
    "ParallelConfig",
    "Trainer",
    "WeightEngine",
    "WeightSource",
]

ParallelConfig = Mapping[str, int]
"""dp_size, cp_size, vpp_size, microbatch_group_size_per_vp_stage: what batching must know of a trainer's layout."""


@dataclass(frozen=True)
class EngineSpec:
    """One engine process, as placement decided it; enough to build its command line."""

    index: int
    """Position among the engines of this run, from 0."""
    host: str
    port: int
    num_devices: int
    device: str
    """`cpu` or `cuda`."""
    device_ids: tuple[int, ...]
    """Physical ids of the devices on the engine's node; empty on CPU."""
    model_path: str
    dtype: str
    """`bfloat16`, `float16` or `float32`: what weights and activations are served in."""
    threads: int
    """CPU threads of the engine's model loop."""
    log_path: Path
    weights_dir: Path
    """Folder (mode 0700) through which a trainer on the same host hands over weights."""
    seed: int
    nccl_port: int = 0
    model: str = "default"
    """Name of the model that it serves; each has a router of its own."""
    worker_type: str = "regular"
    """`regular`, `prefill` or `decode`."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """SGLang's server arguments for engines of its group alone, by field name."""
    updates_weights: bool = True
    """Whether the trainer's weights go to it."""
    gives_memory_back: bool = False
    """Whether it shares its devices, so that its memory must be releasable."""
    first_device: int = 0
    """Position of its first device among those of all engines."""
    num_nodes: int = 1
    node_rank: int = 0
    """Which of the engine's nodes this process computes on; requests go to the one of rank 0."""
    dist_address: str = ""
    """host:port at which the nodes of one engine meet; empty for an engine of one node."""
    bootstrap_port: int = 0
    """Where a prefill engine tells decode engines of its caches; 0 for others."""

    @property
    def name(self) -> str:
        """How logs and errors call this engine, or its part on another node than its first."""
        return f"engine {self.index}" + (f" on its node {self.node_rank}" if self.node_rank else "")

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self.host}:{self.port}"


@runtime_checkable
class EngineClient(WeightEngine, Protocol):
    """One engine, spoken to over SGLang's HTTP protocol. Every call has a deadline and raises `EngineError`."""

    def health(self) -> bool: ...

    def release_memory(self, tags: Sequence[str] | None = None) -> None: ...

    def resume_memory(self, tags: Sequence[str] | None = None) -> None: ...

    def abort(self, rid: str | None = None) -> None:
        """End one request, or all of them when `rid` is None."""

    def num_requests(self) -> int:
        """Requests running or waiting."""

    def server_info(self) -> dict[str, Any]: ...


class Trainer(Protocol):
    """One rank of a training job; every method is called on all ranks, and returns on all ranks."""

    def init(self) -> int:
        """Build the model, load it, and return the first rollout id to run (0, or the one after a checkpoint)."""

    def parallel_config(self) -> ParallelConfig: ...

    def train(self, rollout_id: int, shard: dict[str, Any]) -> dict[str, float]:
        """Train on this rank's part of a rollout; the metrics are complete on every rank."""

    def save(self, rollout_id: int) -> None:
        """Write a checkpoint, or (--async-save) begin to: a later verb, or `finish_saves`, makes it count."""

    def finish_saves(self, timeout_s: float | None = None) -> None:
        """Wait until what was saved counts; `TimeoutError` after `timeout_s`."""

    def save_hf(self, path: str) -> None: ...

    def weights(self) -> WeightSource: ...

    def sleep(self, *, keep_weights: bool = False) -> None:
        """Give back the memory that only training needs; with `keep_weights` all but what a weight sync reads."""

    def weights_at_hand(self) -> AbstractContextManager[None]:
        """`weights` can be read inside the block, also while asleep."""

    def wake_up(self) -> None: ...

    def empty_cache(self) -> None:
        """Give back memory that is not in use and that an allocator keeps."""

    def close(self) -> None: ...
