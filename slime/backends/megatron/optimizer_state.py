"""The optimizer's state as sharded tensors over the memory that the optimizer works in, for saving and for loading.

Megatron's own way to a checkpoint that any layout can load (`fully_reshardable`) gathers all states of all
data-parallel ranks on each of them, in three copies. Here each rank gives out what it holds, as it lies there. Only a
parameter that two ranks divide travels, to the one with its first element. Names and shapes in the checkpoint are
Megatron's, so either way reads what the other wrote.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

_STATES = ("param", "exp_avg", "exp_avg_sq")
SHARDING = "fully_reshardable"
"""How Megatron calls the form that is written."""


def sharded_optimizer_state(
    optimizer: MegatronOptimizer, model_state: ShardedStateDict, metadata: dict[str, Any], *, is_loading: bool
) -> Any:
    """What `optimizer.sharded_state_dict` gives, without the copies. Collective when saving.

    Args:
        optimizer: states must exist (`make_first_states`).
        model_state: sharded states of all model chunks, whose tensors are the parameters themselves.
        is_loading: tensors are there to be loaded into, those of parameters that ranks divide being new and whole.
    """
    parts = optimizer.chained_optimizers
    if not all(isinstance(part, DistributedOptimizer) for part in parts):
        return optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=dict(metadata))
    found, _ = extract_sharded_tensors_and_factories(model_state)
    sharded_by_parameter = {sharded.data: sharded for sharded in nested_values(found)}
    states = []
    for part in parts:
        state = part.state_dict()
        state["param_state"] = dict(_parameter_states(part, sharded_by_parameter, is_loading=is_loading))
        state["param_state_sharding_type"] = SHARDING
        states.append(state)
    return states[0] if len(states) == 1 else dict(enumerate(states))


def make_first_states(optimizer: MegatronOptimizer) -> None:
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


def separate_step_counters(optimizer: MegatronOptimizer) -> None:
    """torch's Adam counts steps in one tensor a parameter. Loading gave all of them the same one, which each step would
    then have increased once for every parameter."""
    for part in optimizer.chained_optimizers:
        if part.optimizer is None:
            continue
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


def hyperparameters(optimizer: MegatronOptimizer) -> list[dict[str, Any]]:
    """What the command line says of each parameter group: bounds of the learning rate, betas, weight decay."""
    return [
        {name: value for name, value in group.items() if name not in ("params", "step")}
        for group in optimizer.param_groups
    ]


def set_hyperparameters(optimizer: MegatronOptimizer, values: list[dict[str, Any]]) -> None:
    """Undo what loading did to `hyperparameters`: a checkpoint brings its own, which would outlive a new --lr."""
    for group, own in zip(optimizer.param_groups, values, strict=True):
        group.update(own)


def set_states_beside_step() -> None:
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


@dataclass(frozen=True)
class _Holder:
    """A data-parallel rank's part of a parameter: elements [start, stop) of it, flattened."""

    rank: int
    start: int
    stop: int


def _parameter_states(
    part: DistributedOptimizer, sharded_by_parameter: dict[Tensor, Any], *, is_loading: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(position in Megatron's order, state name -> sharded tensor) of the parameters that this rank saves or loads."""
    rank = part.data_parallel_group.rank()
    position = -1
    for parameter, holders in _parameters(part):
        position += 1
        mine = next((holder for holder in holders if holder.rank == rank), None)
        if mine is None:
            continue
        held = part._get_main_param_and_optimizer_states(parameter)
        is_owner = holders[0].rank == rank
        states = {}
        for name in _STATES:
            if len(holders) == 1:
                whole = held[name].detach().view(parameter.shape)
            elif is_loading:
                whole = torch.empty(parameter.shape, dtype=held[name].dtype, device=held[name].device)
            else:
                whole = _gathered(held[name].detach(), parameter, holders, part.data_parallel_group)
            if is_loading or is_owner:
                states[name] = _sharded(sharded_by_parameter[parameter], name, whole)
        if states:
            yield position, states


def _parameters(part: DistributedOptimizer) -> Iterator[tuple[Tensor, list[_Holder]]]:
    """Parameters in the order in which Megatron numbers their states, and who holds them; the same on all ranks."""
    size = part.data_parallel_group.size()
    for buffer in part.buffers:
        for parameter, (start, stop, _) in buffer.param_index_map.items():
            holders = []
            for bucket in buffer.buckets:
                share = bucket.grad_data.numel() // size
                for rank in range(size):
                    first = max(start, bucket.offset + rank * share)
                    last = min(stop, bucket.offset + (rank + 1) * share)
                    if first < last:
                        holders.append(_Holder(rank, first - start, last - start))
            yield parameter, holders


def _gathered(part_of_it: Tensor, parameter: Tensor, holders: list[_Holder], group: dist.ProcessGroup) -> Tensor | None:
    """A divided state, whole, on the first of its holders; None on the others. All holders call it in one order."""
    owner = holders[0]
    if group.rank() != owner.rank:
        dist.send(part_of_it.contiguous(), dst=dist.get_global_rank(group, owner.rank), group=group)
        return None
    whole = torch.empty(parameter.numel(), dtype=part_of_it.dtype, device=part_of_it.device)
    whole[owner.start : owner.stop] = part_of_it
    for holder in holders[1:]:
        received = torch.empty(holder.stop - holder.start, dtype=whole.dtype, device=whole.device)
        dist.recv(received, src=dist.get_global_rank(group, holder.rank), group=group)
        whole[holder.start : holder.stop] = received
    return whole.view(parameter.shape)


def _sharded(of_parameter: Any, name: str, whole: Tensor | None) -> Any:
    """A state as the part of the whole model's that its parameter is; of which there is one, not one a replica."""
    assert whole is not None
    changes: dict[str, Any] = {
        "key": f"optimizer.state.{name}.{of_parameter.key}",
        "data": whole,
        "replica_id": (*of_parameter.replica_id[:-1], 0),
    }
    if not isinstance(of_parameter, ShardedTensorFactory):
        changes["dtype"] = whole.dtype
    return replace(of_parameter, **changes)
