"""`MegatronTrainer`: one rank of a training job, with the verbs of `slime.backends.base.Trainer`.

This module imports no megatron: torch has to be prepared for the device first. `init` does so and then builds the
`TrainingJob` (job.py) that every other verb is handed to.
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from slime.backends.megatron.accelerator import accelerator_for
from slime.weight_sync.base import WeightSource

if TYPE_CHECKING:
    from slime.backends.megatron.job import TrainingJob


class MegatronTrainer:
    """Trains with Megatron-core on this rank's device. Every method is collective: all ranks call it in one order."""

    def __init__(
        self, args: Namespace, rank: int, world_size: int, master_addr: str, master_port: int, role: str = "actor"
    ) -> None:
        """Keeps what it is told; `init` does the work.

        Args:
            args: the flat, resolved arguments of the run.
            rank, world_size: of this training job.
            master_addr, master_port: where rank 0 listens.
            role: `actor`. (A critic is another model with another loss.)
        """
        if role != "actor":
            raise NotImplementedError(f"The Megatron trainer trains an actor; a {role!r} is not built yet.")
        self.args, self.rank, self.world_size = args, rank, world_size
        self._address = (master_addr, master_port)
        # Whoever starts this process shows it its own device alone.
        self.accelerator = accelerator_for(getattr(args, "device", "cpu"))
        self._job: TrainingJob | None = None

    def init(self) -> int:
        """Join the other ranks, build and load the model; returns the first rollout id to run.

        Raises:
            ValueError: a model that is not supported, or a checkpoint that is not its weights.
            RuntimeError: the ranks did not meet in time.
        """
        threads = getattr(self.args, "train_threads", None)
        if self.accelerator.device.type == "cpu" and threads:
            torch.set_num_threads(threads)
        self.accelerator.install()
        if getattr(self.args, "deterministic_mode", False):
            self.accelerator.make_deterministic()
        from slime.backends.megatron.job import TrainingJob

        self._job = TrainingJob(self.args, self.accelerator, self.rank, self.world_size, *self._address)
        with self._job.roll_call.during("load the model"):
            return self._job.load()

    @property
    def job(self) -> "TrainingJob":
        """Model, optimizer and what trains them."""
        if self._job is None:
            raise RuntimeError(f"Training rank {self.rank} was not initialised: call init() first.")
        return self._job

    def parallel_config(self) -> dict[str, int]:
        """dp_size, cp_size, vpp_size, microbatch_group_size_per_vp_stage: what the division of a rollout must know."""
        return self.job.parallel_config

    @property
    def data_parallel_rank(self) -> int:
        """Which shard of a rollout is this rank's."""
        return self.job.data_parallel_rank

    def train(self, rollout_id: int, shard: dict[str, Any]) -> dict[str, float]:
        """Train on this rank's part of a rollout.

        Args:
            rollout_id: counts rollouts from 0.
            shard: what `slime.data.batch.split_train_data_by_dp` made for this data-parallel rank.

        Returns:
            `train/*`, `rollout/*` and `perf/*` metrics, the same on every rank.

        Raises:
            FloatingPointError: a gradient that is not finite, before it reaches the weights.
            RuntimeError: other ranks did not come; names them. (So does every verb in which ranks wait.)
        """
        with self.job.roll_call.during(f"train on rollout {rollout_id}"), self.job.profiler.rollout(rollout_id):
            metrics = self.job.train(rollout_id, shard)
        self.job.memory_history.trained(rollout_id)
        return metrics

    def weights(self) -> WeightSource:
        """The live weights under HuggingFace names."""
        return self.job.weights

    def save(self, rollout_id: int) -> None:
        """Write `{--save}/iter_{rollout_id:07d}`: model, optimizer, schedule and random state.

        With --async-save it returns when what is to be written is copied; a later verb commits it.

        Raises:
            OSError: the disk has not the room.
            RuntimeError: a rank could not write.
        """
        with self.job.roll_call.during(f"save rollout {rollout_id}"):
            self.job.save(rollout_id)

    def finish_saves(self, timeout_s: float | None = None) -> None:
        """Wait until what was saved counts as the newest checkpoint.

        Raises:
            TimeoutError: a rank was still writing after `timeout_s`.
            RuntimeError: a rank could not write.
        """
        self.job.finish_saves(timeout_s)

    def save_hf(self, path: str) -> None:
        """Write a HuggingFace folder, with the other files of --hf-checkpoint."""
        with self.job.roll_call.during(f"write {path}"):
            self.job.save_hf(path)

    def sleep(self, *, keep_weights: bool = False) -> None:
        """Give back the memory that only training needs; with `keep_weights` all but what a weight sync reads."""
        self.job.memory.release(keep_weights=keep_weights)

    @contextmanager
    def weights_at_hand(self) -> Iterator[None]:
        """`weights` can be read inside the block, also while asleep. Ranks that nothing is read from sleep on."""
        memory = self.job.memory
        wakes = memory.lacks_weights and self.job.weights.are_read_here
        if wakes:
            memory.restore_weights()
        try:
            yield
        finally:
            if wakes:
                memory.release()

    def wake_up(self) -> None:
        """Undo `sleep`, exactly; nothing if awake."""
        self.job.memory.restore()

    def empty_cache(self) -> None:
        """Give back memory that is not in use and that the device's allocator keeps."""
        self.accelerator.empty_cache()

    def close(self) -> None:
        """Leave the process groups."""
        if self._job is not None:
            self._job.close()
            self._job = None
