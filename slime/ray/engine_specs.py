"""Which engine computes where: the groups of engines laid out over devices and nodes. Pure arithmetic."""

from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slime.backends.base import EngineSpec
from slime.config import ConfigError
from slime.config.engine_groups import EngineGroup

_RESTART_FRACTION = 0.9
"""Of what is free beside a resident trainer: a bound that does not bind, with a tenth left for graphs."""


def keeps_its_size(args: Namespace) -> bool:
    """Whether an engine that is started again finds a trainer on its GPU that stays there.

    SGLang's share (`--mem-fraction-static`) is of what is free when it starts, which was the whole GPU the first time.
    """
    shares = args.device == "cuda" and args.rollout_engine == "sglang" and bool(args.colocate)
    return shares and not args.offload_train


def same_size(cache_tokens: int) -> dict[str, Any]:
    """SGLang's server arguments for an engine with room for as many tokens, however much of its GPU is taken."""
    return {"max_total_tokens": cache_tokens, "mem_fraction_static": _RESTART_FRACTION}


def engine_specs(args: Namespace, device_ids: Sequence[int], weights_dir: Path) -> list[list[EngineSpec]]:
    """Every engine of the run as one spec a node, in the order of the devices; addresses come when they start.

    Args:
        args: reads `engine_groups`, `num_gpus_per_node`, the model's folder, number format and seed.
        device_ids: physical ids of all devices for generation on their nodes, nodes one after another.
        weights_dir: folder through which a trainer on the same host hands over weights.
    """
    trained_on = args.actor_num_nodes * args.actor_num_gpus_per_node if args.colocate else 0
    engines: list[list[EngineSpec]] = []
    first = 0
    for group in args.engine_groups:
        for position in range(group.num_engines):
            place = range(
                first + position * group.num_gpus_per_engine, first + (position + 1) * group.num_gpus_per_engine
            )
            shares = bool(args.offload_rollout) and (place.start < trained_on or not args.colocate)
            engines.append(_engine(args, group, len(engines), place, device_ids, weights_dir, shares))
        first += group.num_gpus
    return engines


def check_nodes(engines: Sequence[Sequence[EngineSpec]], nodes: Sequence[str]) -> None:
    """Refuse what the plan could not foresee: a cluster whose nodes have other numbers of devices than it was told.

    Args:
        engines: what `engine_specs` gave.
        nodes: the node of each device, in the order of the devices.

    Raises:
        ConfigError: the devices of an engine, or of one node's part of it, are not on one node.
    """
    for parts in engines:
        for part in parts:
            start = part.first_device + part.node_rank * len(part.device_ids)
            found = Counter(nodes[start : start + len(part.device_ids)])
            if len(found) > 1:
                counts = " and ".join(map(str, found.values()))
                raise ConfigError(
                    f"{part.name} has to lie on {len(part.device_ids)} devices of one node, but the cluster gave this "
                    f"run {counts} on {len(found)} nodes for it. Say with --num-gpus-per-node how many GPUs each node "
                    "has, choose numbers of trainer ranks and engines that fill nodes, or free nodes that other runs "
                    "hold in part."
                )


def _engine(
    args: Namespace,
    group: EngineGroup,
    index: int,
    place: range,
    device_ids: Sequence[int],
    weights_dir: Path,
    shares_devices: bool,
) -> list[EngineSpec]:
    per_node = min(group.num_gpus_per_engine, args.num_gpus_per_node)
    num_nodes = group.num_gpus_per_engine // per_node
    dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    return [
        EngineSpec(
            index=index,
            host="127.0.0.1",
            port=0,
            num_devices=group.num_gpus_per_engine,
            device=args.device,
            device_ids=tuple(device_ids[place.start + node * per_node : place.start + (node + 1) * per_node]),
            model_path=group.model_path or args.hf_checkpoint,
            dtype=dtype,
            threads=args.rollout_threads,
            log_path=Path(args.run_dir) / "logs" / f"engine_{index}{f'_node_{node}' if node else ''}.log",
            weights_dir=weights_dir,
            seed=args.seed + index,
            model=group.model,
            worker_type=group.worker_type,
            overrides=group.overrides,
            updates_weights=group.updates_weights,
            gives_memory_back=shares_devices,
            first_device=place.start,
            num_nodes=num_nodes,
            node_rank=node,
        )
        for node in range(num_nodes)
    ]
