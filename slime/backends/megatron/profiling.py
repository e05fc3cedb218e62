"""What a training rank spends time and GPU memory on, as files: traces of torch's profiler, snapshots of memory."""

import logging
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from slime.backends.megatron.accelerator import Accelerator

logger = logging.getLogger(__name__)

_TARGET_OF_PART = {"actor_train": "train_actor", "log_probs": "train_log_probs", "ref_log_probs": "train_log_probs"}
"""Part of a training step, as `perf/{part}_time` names it -> the --profile-target to which it belongs."""
_MAX_ALLOCATIONS = 1_000_000  # that the allocator's history keeps: about 1 GB of the host's memory
_KEEPS_HISTORY_OF = "python"  # stacks; C++ frames cost ten times as much


class Profiler:
    """Writes `<run_dir>/profile/rollout_{N}_{what}_rank_{r}.json.gz` for the rollouts and ranks that were asked for.

    Chrome's trace format: chrome://tracing, ui.perfetto.dev. Parts carry their names in it.
    """

    def __init__(self, args: Namespace, rank: int, accelerator: Accelerator) -> None:
        """
        Args:
            args: reads `use_pytorch_profiler`, `profile_target`, `profile_step_start`, `profile_step_end`,
                `profile_ranks` and `run_dir`.
            rank: of this process among the trainer's.
            accelerator: whose device is recorded beside the CPU.
        """
        self._is_on = bool(getattr(args, "use_pytorch_profiler", False)) and rank in args.profile_ranks
        self._rank = rank
        self._activities = [ProfilerActivity.CPU]
        if accelerator.device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        if self._is_on:
            self._targets = frozenset(args.profile_target)
            self._rollouts = range(args.profile_step_start, args.profile_step_end)
            self._folder = Path(args.run_dir) / "profile"
        self._rollout_id: int | None = None
        """The rollout that is trained on now, if parts of it are recorded."""

    @contextmanager
    def rollout(self, rollout_id: int) -> Iterator[None]:
        """Around all training on a rollout."""
        if not self._is_on or rollout_id not in self._rollouts:
            yield
            return
        self._rollout_id = rollout_id
        try:
            if "train_overall" in self._targets:
                with self._recorded("train_overall"):
                    yield
            else:
                yield
        finally:
            self._rollout_id = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Around a part of a training step; recorded by itself only where the whole is not."""
        if self._rollout_id is None:
            yield
        elif "train_overall" in self._targets:
            with record_function(name):
                yield
        elif _TARGET_OF_PART.get(name) in self._targets:
            with self._recorded(name):
                yield
        else:
            yield

    @contextmanager
    def _recorded(self, what: str) -> Iterator[None]:
        path = self._folder / f"rollout_{self._rollout_id:06d}_{what}_rank_{self._rank}.json.gz"
        with profile(activities=self._activities, record_shapes=True) as profiled, record_function(what):
            yield
        path.parent.mkdir(parents=True, exist_ok=True)
        profiled.export_chrome_trace(str(path))
        logger.info("wrote %s", path)


class MemoryHistory:
    """Records what the CUDA allocator does (--record-memory-history), and writes it down for pytorch.org/memory_viz.

    A snapshot is written once, after --memory-snapshot-num-steps rollouts, and at the first allocation that fails.
    """

    def __init__(self, args: Namespace, rank: int) -> None:
        """
        Args:
            args: reads `record_memory_history`, `memory_snapshot_num_steps` and `memory_snapshot_dir`.
            rank: of this process among the trainer's.
        """
        self._is_on = bool(getattr(args, "record_memory_history", False))
        self._rank, self._num_trained = rank, 0
        if not self._is_on:
            return
        self._num_rollouts: int | None = args.memory_snapshot_num_steps
        self._folder = Path(args.memory_snapshot_dir)
        torch.cuda.memory._record_memory_history(enabled="all", max_entries=_MAX_ALLOCATIONS, stacks=_KEEPS_HISTORY_OF)
        torch._C._cuda_attach_out_of_memory_observer(self._out_of_memory)

    def trained(self, rollout_id: int) -> None:
        """Training on a rollout is done."""
        self._num_trained += 1
        if self._is_on and self._num_trained == self._num_rollouts:
            self._write(f"rollout_{rollout_id:06d}")
            torch.cuda.memory._record_memory_history(enabled=None)
            self._is_on = False

    def _out_of_memory(self, device: int, asked_bytes: int, total_bytes: int, free_bytes: int) -> None:
        """Called by the allocator before it raises."""
        if self._is_on:
            self._is_on = False
            self._write("out_of_memory")

    def _write(self, what: str) -> None:
        path = self._folder / f"memory_{what}_rank_{self._rank}.pickle"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
        logger.info("wrote %s; open it at https://pytorch.org/memory_viz", path)
