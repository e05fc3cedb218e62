"""What the trainer made of a rollout, written for debugging (--save-debug-train-data)."""

from argparse import Namespace
from typing import Any

from megatron.core import parallel_state
from torch import Tensor

from slime.backends.megatron import parallel
from slime.observability.debug_dumps import build_train_dump, save_debug_train_data


def save_train_dump(args: Namespace, rollout_id: int, rank: int, data: dict[str, Any]) -> None:
    """Gather every data-parallel rank's samples and write them on the first. Collective over the last stage.

    Args:
        rank: of this process, which fills `{rank}` in the path.
        data: this rank's rollout after training: per-sample lists, `partition` and the schedule.
    """
    if not parallel.is_last_stage() or parallel_state.get_tensor_model_parallel_rank() != 0:
        return
    data_parallel_rank = int(parallel_state.get_data_parallel_rank())
    on_host = {
        key: [_on_host(value) for value in values] if isinstance(values, list) else values
        for key, values in data.items()
    }
    mine = {"rank": rank, "data_parallel_rank": data_parallel_rank, "rollout_data": on_host}
    shards = parallel.gather_over_data_parallel(mine)
    if data_parallel_rank == 0:
        save_debug_train_data(args.save_debug_train_data, build_train_dump(rollout_id, rank, shards))


def _on_host(value: Any) -> Any:
    """Samples are views of one tensor: sent as such, each would carry all of it."""
    return value.detach().clone().cpu() if isinstance(value, Tensor) else value
