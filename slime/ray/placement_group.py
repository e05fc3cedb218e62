"""Reserve devices for trainers and engines, and build the actors that live on them."""

import logging
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from slime.ray import cluster
from slime.ray.actor_group import RayTrainGroup
from slime.ray.rollout import RolloutManager
from slime.ray.waiting import RemoteError, wait_for

logger = logging.getLogger(__name__)

_MANAGER = "the rollout manager"
_PLACEMENT_TIMEOUT_S = 60.0
_DISPOSE_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Devices:
    """Some of the run's devices: bundles of one placement group, in the order in which ranks use them."""

    group: Any
    bundles: tuple[int, ...]
    device_ids: tuple[int, ...]
    """Physical ids on their node, where a device has one (a GPU); -1 on CPU."""
    nodes: tuple[str, ...] = ()
    """Ray's ids of the nodes that they are on."""


def create_placement_groups(args: Namespace) -> dict[str, Devices]:
    """Reserve one bundle a device, and share them out: keys `actor`, `rollout` and, with a critic, `critic`.

    Raises:
        RemoteError: the cluster could not reserve them in time.
    """
    num_devices, rollout_offset = cluster.placement_layout(args)
    if num_devices == 0:
        nothing = Devices(None, (), ())
        return {"actor": nothing, "rollout": nothing}
    resource = cluster.device_resource(args)
    group = placement_group([cluster.bundle(args) for _ in range(num_devices)], strategy="PACK")
    ready, _ = ray.wait([group.ready()], timeout=_PLACEMENT_TIMEOUT_S)
    if not ready:
        remove_placement_group(group)
        raise RemoteError(
            f"The cluster did not reserve {num_devices} x {resource} within {_PLACEMENT_TIMEOUT_S:.0f} s; it has "
            f"{ray.available_resources().get(resource, 0):.0f} free of {ray.cluster_resources().get(resource, 0):.0f}. "
            "End other runs on it, or ask for fewer devices."
        )
    every = _in_device_order(group, num_devices, resource)

    def devices(start: int, count: int) -> Devices:
        part = slice(start, start + count)
        return Devices(group, every.bundles[part], every.device_ids[part], every.nodes[part])

    trainers = 0 if args.debug_rollout_only else args.actor_num_nodes * args.actor_num_gpus_per_node
    groups = {
        "actor": devices(0, trainers),
        "rollout": devices(rollout_offset, 0 if args.debug_train_only else args.rollout_num_gpus or 0),
    }
    if args.use_critic:
        groups["critic"] = groups["actor"]
    return groups


def _in_device_order(group: Any, num_devices: int, resource: str) -> Devices:
    """All bundles, sorted so that consecutive ranks share a node."""
    nodes = placement_group_table(group)["bundles_to_node_id"]
    device_ids = [-1] * num_devices
    if resource == "GPU":
        probes = [
            _gpu_id.options(
                num_gpus=1,
                num_cpus=0,
                placement_group=group,
                placement_group_bundle_index=bundle,
            ).remote()
            for bundle in range(num_devices)
        ]
        device_ids = ray.get(probes, timeout=_PLACEMENT_TIMEOUT_S)
    order = device_order(nodes, device_ids)
    return Devices(group, order, tuple(device_ids[b] for b in order), tuple(nodes[b] for b in order))


def device_order(nodes: Mapping[int, str], device_ids: Sequence[int]) -> tuple[int, ...]:
    """Bundles by node, and on a node by device. Nodes of which the run has most devices come first: engines over whole
    nodes then begin where the plan says.

    Args:
        nodes: bundle -> its node.
        device_ids: of each bundle on its node.
    """
    size = Counter(nodes.values())
    return tuple(sorted(nodes, key=lambda bundle: (-size[nodes[bundle]], nodes[bundle], device_ids[bundle], bundle)))


@ray.remote
def _gpu_id() -> int:
    return int(ray.get_gpu_ids()[0])


def create_rollout_manager(args: Namespace, devices: Devices) -> tuple[Any, Any]:
    """Begin to start engines, router and data source; returns the manager and what `wait_until_started` waits for."""
    # Beside the driver, if there is room: it reads the prompts and writes to the run's folder.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 1, "num_gpus": 0, "max_concurrency": 8, "scheduling_strategy": here}
    manager = RolloutManager.options(**options).remote(args, devices)
    return manager, manager.start.remote()


def wait_until_started(args: Namespace, manager: Any, starting: Any) -> int | None:
    """Wait for engines and prompts; returns the rollouts an epoch.

    Resolves `args.num_rollout` where only --num-epoch was given.
    """
    wait_for({_MANAGER: starting}, "start engines and load prompts")
    (num_rollout_per_epoch,) = wait_for({_MANAGER: manager.get_num_rollout_per_epoch.remote()}, "count its prompts")
    if args.num_rollout is None:
        args.num_rollout = args.num_epoch * num_rollout_per_epoch
        if args.num_rollout <= 0:
            raise ValueError(
                f"--num-epoch {args.num_epoch} gives no rollout: the prompt data has fewer rows than "
                f"--rollout-batch-size {args.rollout_batch_size}. Add rows or lower --rollout-batch-size."
            )
    return num_rollout_per_epoch  # type: ignore[no-any-return]


def dispose(manager: Any) -> None:
    """End the servers of a rollout manager; one that is dead or hangs is left to its servers' own watchdogs."""
    try:
        ray.get(manager.dispose.remote(), timeout=_DISPOSE_TIMEOUT_S)
    except (RayError, TimeoutError) as error:
        logger.warning("the rollout manager did not end its servers: %s", error)


def begin_training_models(args: Namespace, groups: dict[str, Devices]) -> RayTrainGroup:
    """Start the trainers' processes, beside engines that start too; `create_training_models` takes the devices."""
    actor = RayTrainGroup(args, devices=groups["actor"], role="actor")
    actor.begin()
    return actor


def create_training_models(
    args: Namespace, groups: dict[str, Devices], rollout_manager: Any, begun: RayTrainGroup | None = None
) -> tuple[Any, Any]:
    """Build the trainers, or go on with what `begin_training_models` returned; resolves `args.start_rollout_id`.

    Returns:
        (actor group, critic group or None)
    """
    actor = begun or RayTrainGroup(args, devices=groups["actor"], role="actor")
    start_ids = actor.create(rollout_manager)
    if args.start_rollout_id is None:
        args.start_rollout_id = start_ids[0]
    actor.continue_versions(args.start_rollout_id)
    return actor, None
