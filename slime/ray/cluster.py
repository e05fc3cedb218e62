"""Start or join a Ray cluster, and say which resource stands for one device."""

import contextlib
import json
import logging
import os
import secrets
import socket
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import ray

import slime
from slime.config import ConfigError
from slime.utils.api_key import ADMIN_VARIABLE, KEY_VARIABLE, admin_key, api_key, take_api_key

logger = logging.getLogger(__name__)

CPU_DEVICE = "cpu_device"
"""Ray's custom resource that counts devices where the CPU is the device."""

LOOPBACK = "127.0.0.1"
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by `ray job submit`: what the job was given with --runtime-env-json
_ALSO_HANDED_ON = (
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",
    "SPT_NOENV",
)  # slime/ray/__init__.py, slime/utils/run_marker.py
_OBJECT_STORE_BYTES = 512 * 2**20
_ANSWER_TIMEOUT_S = 5.0
_HELPER_CPUS = 64  # Ray's CPU counts only limit admission here: threads are shared out by the plan


def device_resource(args: Namespace) -> str:
    """Name of the Ray resource of which an actor or bundle takes one a device: `GPU` or `cpu_device`."""
    return "GPU" if args.device == "cuda" else CPU_DEVICE


def start(args: Namespace) -> None:
    """Join the cluster named by RAY_ADDRESS (or the Ray job this runs in), else start one on this machine.

    Raises:
        ConfigError: no cluster answers there, or it has fewer devices than the plan needs.
    """
    take_api_key(args)
    if ray.is_initialized():
        return
    if address := os.environ.get("RAY_ADDRESS"):
        _join(args, address)
    else:
        _start_here(args)
    _check_devices(args)


def enter_working_dir(args: Namespace) -> None:
    """Go to where the run was started, from where its relative paths are meant; Ray starts an actor of a cluster that
    it joins where `ray start` ran. A node that has no such folder needs absolute paths."""
    folder = getattr(args, "working_dir", None)
    if folder is not None and os.path.isdir(folder):
        os.chdir(folder)


def _join(args: Namespace, address: str) -> None:
    """Take part in a cluster that others started; its processes inherit nothing from this one's environment."""
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS={address} is where a cluster takes jobs, for `ray job submit -- python3 train.py ...`. To "
            "start the run from here, on a node of the cluster, give the cluster's own address: RAY_ADDRESS=HEAD:6379"
        )
    # Ray shows an environment that is handed on; arguments it does not.
    args.sglang_api_key, args.sglang_admin_api_key = api_key(args), admin_key(args)
    _check_that_it_answers(address)
    ray.init(
        log_to_driver=True,
        logging_level=logging.WARNING,
        runtime_env={"env_vars": environment_of_actors(os.environ)},
    )
    _guard_servers(args)


def _guard_servers(args: Namespace) -> None:
    """Without a key of the user's, servers are not left open to the network: on a cluster of one node they stay on
    loopback, on a larger one the run makes a key of its own."""
    if args.device == "cpu" or args.debug_train_only or api_key(args):
        return
    has_router_elsewhere = bool(getattr(args, "sglang_router_ip", None))  # which has to reach the engines
    if sum(node["Alive"] for node in ray.nodes()) == 1 and not has_router_elsewhere:
        args.stays_on_loopback = True
        return
    args.sglang_api_key = secrets.token_urlsafe(32)
    take_api_key(args)
    logger.info(
        "Router and engines listen on their nodes' addresses: they ask for a key that this run made. Give one "
        f"({KEY_VARIABLE}) to send requests of your own."
    )


def own_host(args: Namespace) -> str:
    """The address of this node on which what runs here listens for other processes of the run."""
    is_alone = args.device == "cpu" or getattr(args, "stays_on_loopback", False)
    return LOOPBACK if is_alone else str(ray.util.get_node_ip_address())


def _check_that_it_answers(address: str) -> None:
    """In seconds: Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        return  # `auto`
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(
            f"No Ray cluster answers at RAY_ADDRESS={address} ({error}). Is this a node of it (`ray status`)? Unset "
            "RAY_ADDRESS to run on this machine alone."
        ) from error


def environment_of_actors(environ: Mapping[str, str]) -> dict[str, str]:
    """What actors on a cluster that runs already need of the driver's environment: slime itself, and its variables.

    What a Ray job was given for all of its processes is left to it.
    """
    handed_on = {
        name: value
        for name, value in environ.items()
        if name.startswith("SLIME_") and name not in (KEY_VARIABLE, ADMIN_VARIABLE, "SLIME_HOST_IP")
    }
    root = str(Path(slime.__file__).resolve().parents[1])
    handed_on["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [environ.get("PYTHONPATH")])])
    handed_on |= {name: environ[name] for name in _ALSO_HANDED_ON if name in environ}
    job = json.loads(environ.get(_JOB_CONFIG) or "{}")
    of_the_job = (job.get("runtime_env") or {}).get("env_vars") or {}
    return {name: value for name, value in handed_on.items() if name not in of_the_job}


def _start_here(args: Namespace) -> None:
    if not any(name.startswith("RAY_AUTH_") for name in os.environ):
        # Who may talk to Ray may run code here: other users of the machine must not. Ray's own token would be a file
        # in the home folder that they can often read; the environment is this user's.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    resources = {CPU_DEVICE: args.cpu_devices} if args.device == "cpu" else {}
    ray.init(
        address="local",
        _node_ip_address=LOOPBACK,
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
    if resource == "GPU":
        found, where, more = int(ray.cluster_resources().get(resource, 0)), "", "add nodes"
    else:
        found, where = _devices_here(), " on this host (without a GPU a run stays on one)"
        more = f"start its nodes with more: ray start --resources '{{\"{CPU_DEVICE}\": N}}'"
    if found < needed:
        kind = "GPUs" if resource == "GPU" else "CPU devices"
        raise ConfigError(
            f"This run needs {needed} {kind} and the Ray cluster has {found}{where}. Lower --actor-num-nodes, "
            f"--actor-num-gpus-per-node or --rollout-num-gpus, share devices with --colocate, or {more}."
        )


def _devices_here() -> int:
    """CPU devices of the cluster's nodes that have this host's address."""
    here = ray.util.get_node_ip_address()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeManagerAddress"] == here]
    return int(sum(node["Resources"].get(CPU_DEVICE, 0) for node in nodes))


def bundle(args: Namespace) -> dict[str, float]:
    """Resources of one device and of the processes on it.

    CPU devices are all of the driver's host: engines there are on loopback and take weights out of its memory.
    """
    resource = device_resource(args)
    here = {f"node:{ray.util.get_node_ip_address()}": 0.001} if resource == CPU_DEVICE else {}
    return {resource: 1, "CPU": 1, **here}


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
