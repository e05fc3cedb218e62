"""Start or join a Ray cluster, and say which resource stands for one device."""

import contextlib
import logging
import os
import secrets
from argparse import Namespace

import ray

from slime.config import ConfigError
from slime.utils.api_key import take_api_key

logger = logging.getLogger(__name__)

CPU_DEVICE = "cpu_device"
"""Ray's custom resource that counts devices where the CPU is the device."""

_OBJECT_STORE_BYTES = 512 * 2**20
_HELPER_CPUS = 64  # Ray's CPU counts only limit admission here: threads are shared out by the plan


def device_resource(args: Namespace) -> str:
    """Name of the Ray resource of which an actor or bundle takes one a device: `GPU` or `cpu_device`."""
    return "GPU" if args.device == "cuda" else CPU_DEVICE


def start(args: Namespace) -> None:
    """Join the cluster named by RAY_ADDRESS (or the Ray job this runs in), else start one on this machine.

    Raises:
        ConfigError: the cluster has fewer devices than the plan needs.
    """
    take_api_key(args)
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=True, logging_level=logging.WARNING)
    else:
        _start_here(args)
    _check_devices(args)


def _start_here(args: Namespace) -> None:
    if not any(name.startswith("RAY_AUTH_") for name in os.environ):
        # Who may talk to Ray may run code here: other users of the machine must not. Ray's own token would be a file
        # in the home folder that they can often read; the environment is this user's.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    resources = {CPU_DEVICE: args.cpu_devices} if args.device == "cpu" else {}
    ray.init(
        address="local",
        _node_ip_address="127.0.0.1",
        include_dashboard=False,
        num_cpus=_HELPER_CPUS,
        num_gpus=None if args.device == "cuda" else 0,
        resources=resources,
        object_store_memory=_OBJECT_STORE_BYTES,
        log_to_driver=True,
        logging_level=logging.WARNING,
        configure_logging=True,
    )


def _check_devices(args: Namespace) -> None:
    resource, needed = device_resource(args), devices_needed(args)
    found = int(ray.cluster_resources().get(resource, 0))
    if found < needed:
        kind = "GPUs" if resource == "GPU" else "CPU devices (--cpu-devices)"
        raise ConfigError(
            f"This run needs {needed} {kind} and the Ray cluster has {found}. Lower --actor-num-nodes, "
            "--actor-num-gpus-per-node or --rollout-num-gpus, share devices with --colocate, or add nodes."
        )


def devices_needed(args: Namespace) -> int:
    """Devices that placement will reserve, over all nodes."""
    return placement_layout(args)[0]


def placement_layout(args: Namespace) -> tuple[int, int]:
    """(devices in all, first device of the engines); trainers take the first devices."""
    trainers = args.actor_num_nodes * args.actor_num_gpus_per_node
    engines = args.rollout_num_gpus or 0
    if args.debug_train_only:
        return trainers, 0
    if getattr(args, "rollout_external", False):
        return trainers, 0 if args.debug_rollout_only else trainers
    if args.debug_rollout_only:
        return engines, 0
    if args.colocate:
        return max(trainers, engines), 0
    return trainers + engines, trainers


def stop() -> None:
    """Leave the cluster; one that was started here ends."""
    with contextlib.suppress(Exception):
        ray.shutdown()
