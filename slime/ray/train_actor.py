"""One rank of a trainer as a Ray actor: it carries the trainer's verbs and the engines' addresses, no training code."""

import logging
import os
import socket
import warnings
from argparse import Namespace
from typing import Any

import ray

from slime.backends.base import Trainer
from slime.data.shards import separated
from slime.observability.logging_utils import configure_logger
from slime.ray import cluster
from slime.ray.engines import EngineRecord
from slime.ray.liveness import Pulse
from slime.utils.api_key import take_api_key
from slime.utils.memory_utils import settle_objects
from slime.utils.processes import free_port
from slime.weight_sync.sync import SyncReport, WeightSync


class TrainRayActor(Pulse):
    """Built by `RayTrainGroup`, one a device; all ranks get the same calls in the same order."""

    def __init__(self, args: Namespace, rank: int, world_size: int, role: str = "actor") -> None:
        configure_logger(prefix=f"{role} {rank}")
        cluster.enter_working_dir(args)
        take_api_key(args)
        _quiet_megatron()
        self._args, self._rank, self._world_size, self._role = (
            args,
            rank,
            world_size,
            role,
        )
        self._trainer: Trainer | None = None
        self._sync: WeightSync | None = None

    def prepare(self) -> None:
        """Import what `init` needs, which takes seconds and no device."""
        import slime.backends.megatron.trainer  # noqa: F401

    def get_master_addr_and_port(self) -> tuple[str, int]:
        """Where rank 0 will listen for the other ranks."""
        host = cluster.own_host(self._args)
        return host, free_port(host)

    def pid_and_host(self) -> tuple[int, str]:
        return os.getpid(), socket.gethostname()

    def init(self, master_addr: str, master_port: int) -> int:
        """Build and load the model; returns the first rollout id to run."""
        from slime.backends.megatron.trainer import MegatronTrainer

        self._trainer = MegatronTrainer(
            self._args,
            self._rank,
            self._world_size,
            master_addr,
            master_port,
            role=self._role,
        )
        first_rollout_id = self._trainer.init()
        settle_objects()
        return first_rollout_id

    def parallel_config(self) -> dict[str, int]:
        return dict(self.trainer.parallel_config())

    @property
    def trainer(self) -> Trainer:
        if self._trainer is None:
            raise RuntimeError(f"{self._role} rank {self._rank} was not initialised: call init() first.")
        return self._trainer

    def train(self, rollout_id: int, shards: list[Any]) -> dict[str, float]:
        """Train on this rank's shard (one `Box(ObjectRef)` a data-parallel rank)."""
        shard = ray.get(shards[self._data_parallel_rank()].inner)
        return self.trainer.train(rollout_id, separated(shard))

    def _data_parallel_rank(self) -> int:
        return int(getattr(self.trainer, "data_parallel_rank", self._rank))

    def connect_engines(self, engines: list[EngineRecord]) -> None:
        """Learn which engines the next weight syncs must reach; called again after a restart of engines."""
        from slime.ray.weights import make_weight_sync

        if self._sync is None:
            self._sync = make_weight_sync(self._args, self.trainer.weights(), engines, rank=self._rank)
        self._sync.connect([engine.client() for engine in engines] if self._rank == 0 else [])

    def update_weights(self, version: int) -> SyncReport:
        """Bring the engines to `version` and prove it; what was done on rank 0."""
        if self._sync is None:
            raise RuntimeError("update_weights() before connect_engines().")
        with self.trainer.weights_at_hand():
            return self._sync.sync(version)

    def save_model(self, rollout_id: int) -> None:
        self.trainer.save(rollout_id)

    def finish_saves(self, timeout_s: float | None = None) -> None:
        self.trainer.finish_saves(timeout_s)

    def save_hf(self, path: str) -> None:
        with self.trainer.weights_at_hand():
            self.trainer.save_hf(path)

    def sleep(self, keep_weights: bool = False) -> None:
        self.trainer.sleep(keep_weights=keep_weights)

    def wake_up(self) -> None:
        self.trainer.wake_up()

    def empty_cache(self) -> None:
        self.trainer.empty_cache()

    def close(self) -> None:
        if self._sync is not None:
            self._sync.close()
        if self._trainer is not None:
            self._trainer.close()


def _quiet_megatron() -> None:
    """Drop what Megatron says of itself: its whole configuration, and which optional packages it does without."""
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        return
    logging.getLogger("megatron").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.")
