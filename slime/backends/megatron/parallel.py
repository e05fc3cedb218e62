"""Process groups of one training rank: set up, asked for sizes, torn down."""

import random
from argparse import Namespace
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from slime.backends.megatron.accelerator import Accelerator
from slime.utils.rendezvous import keep_gloo_on, tcp_store

T = TypeVar("T")


def initialize(
    args: Namespace, accelerator: Accelerator, rank: int, world_size: int, master_addr: str, master_port: int
) -> None:
    """Join the other ranks and divide them into Megatron's groups.

    Raises:
        RuntimeError: the ranks did not meet within --distributed-timeout-minutes, or rank 0 cannot listen.
    """
    minutes = getattr(args, "distributed_timeout_minutes", 10)
    timeout = timedelta(minutes=minutes)
    keep_gloo_on(master_addr)
    try:
        store = tcp_store(master_addr, master_port, rank=rank, world_size=world_size, timeout=timeout)
        dist.init_process_group(accelerator.backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except OSError as error:
        raise RuntimeError(
            f"Training rank {rank} cannot listen at {master_addr}:{master_port}: {error}. If the address is in use, "
            "another program took the port a moment ago: start again."
        ) from error
    except Exception as error:
        raise RuntimeError(
            f"Training rank {rank} of {world_size} did not meet the others at {master_addr}:{master_port} within "
            f"{minutes} min (--distributed-timeout-minutes): {error}"
        ) from error
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=getattr(args, "tensor_model_parallel_size", 1),
        pipeline_model_parallel_size=getattr(args, "pipeline_model_parallel_size", 1),
        virtual_pipeline_model_parallel_size=getattr(args, "virtual_pipeline_model_parallel_size", None),
        context_parallel_size=getattr(args, "context_parallel_size", 1),
        expert_model_parallel_size=getattr(args, "expert_model_parallel_size", 1),
        expert_tensor_parallel_size=getattr(args, "expert_tensor_parallel_size", None),
        distributed_timeout_minutes=minutes,
    )
    seed_everything(getattr(args, "seed", 1234))


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch; pipeline stages differ, tensor-parallel ranks only inside their regions."""
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def close() -> None:
    """Leave all groups."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def is_last_stage() -> bool:
    """Whether this rank is in the last pipeline stage, where log-probs and losses are."""
    return bool(parallel_state.is_pipeline_last_stage(ignore_virtual=True))


def from_last_stage(metrics: dict[str, float]) -> dict[str, float]:
    """What the last pipeline stage has, on every stage."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return metrics
    box = [metrics]
    dist.broadcast_object_list(box, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return box[0]


def gather_over_data_parallel(mine: T) -> list[T]:
    """Everyone's, of the data- and context-parallel ranks of this stage."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    everyones: list[T] = [mine] * group.size()
    if group.size() > 1:
        dist.all_gather_object(everyones, mine, group=group)
    return everyones
