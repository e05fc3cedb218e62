"""Checkpoints of a training job: model, optimizer, learning-rate schedule, random states; loadable in any layout.

`slime.utils.checkpoint_folder` says what lies where, and by which steps a checkpoint comes to count.
"""

import logging
import shutil
import threading
import time
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from slime.backends.megatron import optimizer_state
from slime.backends.megatron.accelerator import Accelerator
from slime.backends.megatron.checkpoint_format import CheckpointWriter, CommonLoader, TensorLoader, load_common
from slime.backends.megatron.model import unwrap
from slime.backends.megatron.random_state import random_state, set_random_state
from slime.backends.megatron.staging import Staging
from slime.utils.checkpoint_folder import Checkpoint, begin_files, check_space, commit, keep_newest

logger = logging.getLogger(__name__)

_METADATA = {
    "distrib_optim_sharding_type": optimizer_state.SHARDING,
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
"""How optimizer states are cut: so that a checkpoint can be loaded with another number of ranks of any kind."""
_SPACE_MARGIN_BYTES = 64 << 20
"""For what describes the tensors, and for the rollout state."""

optimizer_state.set_states_beside_step()


# --- saving ----------------------------------------------------------------------------------------------------------


class Saver:
    """Writes the checkpoints of a job, one at a time: while training waits, or (--async-save) behind it.

    Every method is collective. With --async-save `save` copies what it writes, so that each rank holds that much more
    memory until its file is written (on a GPU, pinned memory of the host until the process ends); a later verb of the
    trainer finds all ranks done and commits. An error in the background is raised by that verb, on every rank. What
    --keep-last deletes after that goes in the background too, and is gone before anything else is written.
    """

    def __init__(self, args: Namespace, accelerator: Accelerator) -> None:
        self._folder = Path(args.save)
        self._staging = Staging(accelerator) if getattr(args, "async_save", False) else None
        self._keep_last: int | None = getattr(args, "keep_last", None)
        self._pending: _Pending | None = None
        self._deleter, self._deletion = ThreadPoolExecutor(1, "keep last"), Future[None]()
        self._deletion.set_result(None)
        self.protected: set[Path] = set()
        """Checkpoints that the run loads from: --keep-last leaves them."""

    def save(
        self,
        iteration: int,
        models: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer | None = None,
        scheduler: OptimizerParamScheduler | None = None,
    ) -> None:
        """Write `{folder}/iter_{iteration:07d}`, after the save before it.

        Args:
            optimizer, scheduler: None saves the model alone (--no-save-optim).

        Raises:
            MemoryError: the host has not the room for the copy of what is on a GPU.
            OSError: the room on the disk does not suffice; nothing was written.
            RuntimeError: a rank could not write, and why.
        """
        self.finish()
        started = time.monotonic()
        pending = _Pending(self._folder, iteration, _state(models, optimizer, scheduler, iteration, is_loading=False))
        if self._staging is not None:
            planned = time.monotonic()
            pending.start(self._staging)
            if dist.get_rank() == 0:
                logger.info(
                    "rollout %d is saved in the background; training waited %.2f s for the plan, %.2f s for the copy",
                    iteration, planned - started, time.monotonic() - planned,
                )  # fmt: skip
            self._pending = pending
        else:
            pending.write()
            self._commit(pending)
            self.finish_deleting()

    def poll(self) -> None:
        """Commit the save that is under way, if every rank has written its part."""
        if self._pending is not None and _all_say(not self._pending.is_writing):
            pending, self._pending = self._pending, None
            self._commit(pending)

    def finish(self, timeout_s: float | None = None) -> None:
        """Wait for the save that is under way and commit it, and for what --keep-last deletes.

        Raises:
            OSError: --keep-last could not delete.
            TimeoutError: a rank is still writing after `timeout_s`.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            started = time.monotonic()
            pending.wait(timeout_s)
            if dist.get_rank() == 0:
                logger.info("waited %.1f s until rollout %d was written", time.monotonic() - started, pending.iteration)
            self._commit(pending)
        self.finish_deleting()

    def finish_deleting(self) -> None:
        """Wait until the room on the disk of what --keep-last deletes is free."""
        if self._keep_last is not None:
            _from_rank_0(self._deletion.result)

    def _commit(self, pending: "_Pending") -> None:
        path = pending.commit()
        if dist.get_rank() == 0:
            logger.info("saved %s (%.1f s)", path, time.monotonic() - pending.started)
            if self._keep_last is not None:
                self._deletion = self._deleter.submit(self._delete_old, self._keep_last, pending.iteration)
        dist.barrier()

    def _delete_old(self, keep_last: int, newest: int) -> None:
        gone = keep_newest(self._folder, keep_last, newest, self.protected)
        if gone:
            logger.info("--keep-last %d: deleted iterations %s", keep_last, gone)


class _Pending:
    """One checkpoint between its plan and its commit."""

    def __init__(self, folder: Path, iteration: int, state: dict[str, Any]) -> None:
        self.iteration, self.started = iteration, time.monotonic()
        self._folder, self._thread, self._error = folder, None, ""
        self._unfinished = Path(_from_rank_0(lambda: str(begin_files(folder, iteration))))
        self._writer = CheckpointWriter(state, self._unfinished)
        self._size_bytes = self._writer.size_bytes
        needed = _total(self._size_bytes) + _SPACE_MARGIN_BYTES
        try:
            _from_rank_0(lambda: check_space(folder, needed, f"The checkpoint of rollout {iteration}"))
        except OSError:
            self._clean_up()
            raise

    _thread: threading.Thread | None

    def start(self, staging: Staging) -> None:
        """Copy, and write the copy in the background."""
        self._writer.stage(staging)
        self._thread = threading.Thread(target=self.write, name=f"save {self.iteration}", daemon=True)
        self._thread.start()

    def write(self) -> None:
        """Write this rank's part; what goes wrong is told by `commit`, on all ranks."""
        try:
            self._writer.write()
        except Exception as error:
            self._error = f"{type(error).__name__}: {error}"

    @property
    def is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self, timeout_s: float | None) -> None:
        if self._thread is not None:
            self._thread.join(timeout_s)
        late = [rank for rank, is_late in enumerate(_gathered(self.is_writing)) if is_late]
        if late:
            raise TimeoutError(
                f"Training rank {late[0]} was still writing its {self._size_bytes / 2**30:.2f} GiB of the checkpoint "
                f"of rollout {self.iteration} to {self._folder} after {time.monotonic() - self.started:.0f} s. The "
                "checkpoint before it is the newest. A faster disk, or --no-save-optim, makes saving shorter."
            )

    def commit(self) -> Path:
        """Make it the newest checkpoint.

        Raises:
            RuntimeError: a rank could not write.
        """
        errors = [f"rank {rank}: {error}" for rank, error in enumerate(_gathered(self._error)) if error]
        if errors:
            self._clean_up()
            raise RuntimeError(
                f"The checkpoint of rollout {self.iteration} was not saved to {self._folder} ({'; '.join(errors)}). "
                "The one before it is untouched."
            )
        self._writer.finish()
        return Path(_from_rank_0(lambda: str(commit(self._folder, self.iteration, self._unfinished))))

    def _clean_up(self) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(self._unfinished, ignore_errors=True)


# --- loading ---------------------------------------------------------------------------------------------------------


def load(
    checkpoint: Checkpoint,
    models: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    *,
    with_random_state: bool = True,
    allow_pickle: bool = False,
) -> None:
    """Read a checkpoint into the model and, where given, optimizer, schedule and random state. Collective.

    Args:
        allow_pickle: also read what could run code that is in it (--allow-pickle-checkpoints).

    Raises:
        ValueError: the checkpoint was saved without what is asked for, or is not safe to read.
    """
    path = checkpoint.path
    common = load_common(path, allow_pickle=allow_pickle)
    if optimizer is not None:
        if not common.get("has_optimizer", False):
            raise ValueError(f"{path} was saved without the optimizer (--no-save-optim): give --no-load-optim.")
        optimizer_state.make_first_states(optimizer)
    state = _state(models, optimizer, scheduler, checkpoint.iteration or 0, is_loading=True)
    _, state = extract_matching_values(state, lambda value: isinstance(value, ShardedObject))  # pickled, and empty
    loaded = dist_checkpointing.load(
        state,
        str(path),
        TensorLoader(allow_pickle=allow_pickle),
        CommonLoader(allow_pickle=allow_pickle),
        validate_access_integrity=False,  # each rank reads what it holds a part of
    )
    for i, model in enumerate(models):
        unwrap(model).load_state_dict(loaded[f"model{i}"])
    if optimizer is not None:
        own = optimizer_state.hyperparameters(optimizer)
        optimizer.load_state_dict(loaded["optimizer"])
        optimizer_state.separate_step_counters(optimizer)
        if scheduler is None or not scheduler.use_checkpoint_opt_param_scheduler:
            optimizer_state.set_hyperparameters(optimizer, own)
    if scheduler is not None:
        scheduler.load_state_dict(loaded["scheduler"])
    states = common.get("random_states")
    if with_random_state and scheduler is not None and states and common.get("layout") == _layout():
        set_random_state(states[_place()])  # of other layouts each rank's is its own, and starts from --seed


def _state(
    models: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
    iteration: int,
    *,
    is_loading: bool,
) -> dict[str, Any]:
    """Sharded tensors of everything, and plain data that is the same on all ranks."""
    state = model_state(models)
    if optimizer is not None:
        if not is_loading:
            optimizer_state.make_first_states(optimizer)
        chunks = {key: value for key, value in state.items() if key.startswith("model")}
        state["optimizer"] = optimizer_state.sharded_optimizer_state(
            optimizer, chunks, _METADATA, is_loading=is_loading
        )
    if scheduler is not None:
        state["scheduler"] = scheduler.state_dict()
    if not is_loading:
        state |= {"iteration": iteration, "has_optimizer": optimizer is not None, "layout": _layout()}
        if scheduler is not None:
            state["random_states"] = _random_states()
    return state


def model_state(models: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """The model alone, as sharded tensors over its parameters."""
    state: dict[str, Any] = {"content_metadata": dict(_METADATA)}
    for i, model in enumerate(models):
        state[f"model{i}"] = unwrap(model).sharded_state_dict(metadata=dict(_METADATA))
    return state


def _random_states() -> dict[tuple[int, int], Any]:
    """One a pipeline stage and tensor-parallel rank, by `_place`; data-parallel ranks share theirs. Collective."""
    is_first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    everyones = _gathered((_place(), random_state()) if is_first else None)
    return dict(entry for entry in everyones if entry is not None)


def _place() -> tuple[int, int]:
    """Pipeline stage and tensor-parallel rank of this rank."""
    return parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()


def _layout() -> tuple[int, int]:
    """Pipeline stages and tensor-parallel ranks."""
    return (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )


# --- between ranks ---------------------------------------------------------------------------------------------------


def _gathered(value: Any) -> list[Any]:
    everyones: list[Any] = [value] * dist.get_world_size()
    if len(everyones) > 1:
        dist.all_gather_object(everyones, value)
    return everyones


def _from_rank_0(work: Any) -> Any:
    """What `work` returns on rank 0, on every rank; its error likewise. The other ranks wait for it."""
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [work()]
        except (OSError, ValueError) as error:
            outcome = [error]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _total(size_bytes: int) -> int:
    return sum(_gathered(size_bytes))


def _all_say(fact: bool) -> bool:
    return all(_gathered(fact))
