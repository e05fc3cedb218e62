"""Megatron's distributed checkpoints: model, optimizer, learning-rate schedule, random state; loadable in any layout.

`{folder}/iter_0000012` appears by a rename when it is complete; `latest_checkpointed_iteration.txt` names the newest.
"""

import queue
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from slime.backends.megatron.model import unwrap
from slime.backends.megatron.random_state import random_state, set_random_state

LATEST_FILE = "latest_checkpointed_iteration.txt"
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
"""How optimizer states are cut: so that a checkpoint can be loaded with another number of ranks of any kind."""


def latest_iteration(folder: str | Path | None) -> int | None:
    """The newest complete iteration in a checkpoint folder; None if the folder is none of Megatron's.

    Raises:
        ValueError: the tracker names an iteration that is not there.
    """
    if folder is None or not (Path(folder) / LATEST_FILE).is_file():
        return None
    text = (Path(folder) / LATEST_FILE).read_text().strip()
    if not text.isdigit() or not iteration_path(folder, int(text)).is_dir():
        raise ValueError(
            f"{Path(folder) / LATEST_FILE} names iteration {text!r}, but {folder} holds no complete checkpoint of that "
            f"name (found: {', '.join(sorted(p.name for p in Path(folder).glob('iter_*'))) or 'none'}). "
            "Write the number of one that is there into the file."
        )
    return int(text)


def find_iteration(path: str | Path | None, step: int | None = None) -> tuple[str, int | None]:
    """(checkpoint folder, iteration to load); None as the iteration if `path` is no Megatron checkpoint.

    Args:
        path: the folder that holds iterations, or one `iter_0000012` in it.
        step: the iteration that is wanted (--ckpt-step, --ref-ckpt-step); the newest when None.

    Raises:
        ValueError: the iteration is not there; names those that are.
    """
    if path is None:
        return "", None
    folder, wanted = Path(path), step
    if re.fullmatch(r"iter_\d{7}", folder.name) and folder.is_dir():
        wanted = int(folder.name.removeprefix("iter_")) if step is None else step
        folder = folder.parent
    else:
        newest = latest_iteration(folder)
        if newest is None or wanted is None:
            return str(folder), newest
    assert wanted is not None
    if not iteration_path(folder, wanted).is_dir():
        present = ", ".join(sorted(found.name for found in folder.glob("iter_*"))) or "none"
        raise ValueError(f"{folder} holds no iteration {wanted}; there are: {present}. Give one of them.")
    return str(folder), wanted


def iteration_path(folder: str | Path, iteration: int) -> Path:
    return Path(folder) / f"iter_{iteration:07d}"


def save(
    folder: str | Path,
    iteration: int,
    models: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
) -> Path:
    """Write `{folder}/iter_{iteration:07d}`. Collective.

    Args:
        optimizer, scheduler: None saves the model alone (--no-save-optim).
    """
    final = iteration_path(folder, iteration)
    unfinished = final.with_name(f".unfinished_{final.name}")
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    state = _sharded_state(models, optimizer, scheduler, iteration, is_loading=False)
    filesystem_async._results_queue = queue.Queue()  # its own would be served by a spawned process
    request = dist_checkpointing.save(state, str(unfinished), async_sharded_save=True, content_metadata=dict(_METADATA))
    _write_here(request)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        tracker = Path(folder) / LATEST_FILE
        tracker.with_name(f".{LATEST_FILE}").write_text(f"{iteration}\n")
        tracker.with_name(f".{LATEST_FILE}").rename(tracker)
    dist.barrier()
    return final


def load(
    folder: str | Path,
    iteration: int,
    models: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    with_random_state: bool = True,
) -> None:
    """Read an iteration into the model and, where given, optimizer, schedule and random state. Collective.

    Raises:
        ValueError: the checkpoint was saved without what is asked for.
    """
    path = iteration_path(folder, iteration)
    common = dist_checkpointing.load_common_state_dict(str(path))
    if optimizer is not None:
        if not common.get("has_optimizer", False):
            raise ValueError(f"{path} was saved without the optimizer (--no-save-optim): give --no-load-optim.")
        _make_first_states(optimizer)
    state = _sharded_state(models, optimizer, scheduler, iteration, is_loading=True)
    if not with_random_state or common.get("layout") != _layout():
        state.pop("random_state", None)  # each rank's is its own; other ranks start from --seed
    loaded = dist_checkpointing.load(state, str(path))
    for i, model in enumerate(models):
        unwrap(model).load_state_dict(loaded[f"model{i}"])
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
        _separate_step_counters(optimizer)
    if scheduler is not None:
        scheduler.load_state_dict(loaded["scheduler"])
    if "random_state" in loaded:
        set_random_state(loaded["random_state"])


def _sharded_state(
    models: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
    iteration: int,
    *,
    is_loading: bool,
) -> dict[str, Any]:
    state: dict[str, Any] = {"iteration": iteration, "has_optimizer": optimizer is not None, "layout": _layout()}
    for i, model in enumerate(models):
        state[f"model{i}"] = unwrap(model).sharded_state_dict(metadata=dict(_METADATA))
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=dict(_METADATA))
    if scheduler is not None:
        state["scheduler"] = scheduler.state_dict()
        state["random_state"] = _sharded_random_state()
    return state


def _sharded_random_state() -> ShardedObject:
    """One state a pipeline stage and tensor-parallel rank; data-parallel ranks share theirs."""
    pp, tp = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject("random_state", random_state(), _layout(), (pp, tp), replica_id=replica)


def _layout() -> tuple[int, int]:
    """Pipeline stages and tensor-parallel ranks."""
    return (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )


def _write_here(request: AsyncRequest) -> None:
    """Write the files in this process. (Megatron's synchronous save forks writers, from a process full of threads.)"""
    results: dict[int, Any] = {}
    if request.async_fn is not None:
        _, buckets, global_results = request.async_fn_args
        transforms = request.async_fn.args[0]
        for i, bucket in enumerate(buckets):
            answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
            count: queue.Queue[int] = queue.Queue()
            count.put(i)
            filesystem_async.FileSystemWriterAsync.write_preloaded_data(
                transforms, i, bucket, answers, count, use_fsync=True
            )
            _, results[i] = answers.get()
        errors = [result for result in results.values() if isinstance(result, Exception)]
        global_results.put(errors[0] if errors else results)
    for finalize in request.finalize_fns:
        finalize()


def _make_first_states(optimizer: MegatronOptimizer) -> None:
    """Give each parameter the state of an Adam that has made no step: Megatron loads into states that exist."""
    for part in optimizer.chained_optimizers:
        if part.optimizer is None:
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                if not part.optimizer.state[parameter]:
                    part.optimizer.state[parameter] = {
                        "step": torch.tensor(0.0, device=parameter.device),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def _separate_step_counters(optimizer: MegatronOptimizer) -> None:
    """torch's Adam counts steps in one tensor a parameter. Loading gave all of them the same one, which each step would
    then have increased once for every parameter."""
    for part in optimizer.chained_optimizers:
        if part.optimizer is None:
            continue
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


def _set_states_beside_step() -> None:
    """Megatron 0.16 sets every state of a loaded parameter from the checkpoint and fails on `step`, which torch's Adam
    has and Transformer Engine's has not. (It can go when Megatron skips states that it did not save.)"""
    original = DistributedOptimizer._set_main_param_and_optimizer_states

    def set_states(self: DistributedOptimizer, model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state and "step" not in tensors:
            tensors = {"step": state["step"], **tensors}
        original(self, model_param, tensors)

    if not getattr(original, "knows_step", False):
        set_states.knows_step = True  # type: ignore[attr-defined]
        DistributedOptimizer._set_main_param_and_optimizer_states = set_states


_set_states_beside_step()
