"""Which transport and which digests a run's weight sync uses; the one place that knows both ends."""

import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import ray

from slime.backends.sglang.checksum import FusedTensorDigests, TensorParallel, algorithm_of
from slime.ray.cluster import LOOPBACK
from slime.ray.engines import EngineRecord
from slime.utils.http_utils import get_host_info
from slime.utils.processes import free_port
from slime.utils.rendezvous import is_loopback
from slime.weight_sync.base import WeightSource
from slime.weight_sync.digest import ExpectedDigests, TensorDigests
from slime.weight_sync.ipc import IpcTransport
from slime.weight_sync.process_group import DistributedTransport
from slime.weight_sync.sync import Transport, WeightSync
from slime.weight_sync.transports import DiskTransport, SharedMemoryTransport


def make_weight_sync(
    args: Namespace,
    source: WeightSource,
    engines: Sequence[EngineRecord],
    *,
    rank: int,
) -> WeightSync:
    """The sync between one trainer, of which this is `rank`, and engines of one kind."""
    return WeightSync(
        source,
        transport=_transport(args, engines, rank),
        expected_digests=_expected_digests(args, engines),
        bucket_size_bytes=args.update_weight_buffer_size,
        is_sender=rank == 0,
        pause_mode=args.pause_generation_mode,
    )


def _transport(args: Namespace, engines: Sequence[EngineRecord], rank: int) -> Transport:
    if args.update_weight_transport == "disk":
        return DiskTransport(
            Path(args.update_weight_disk_dir),
            model_path=args.hf_checkpoint,
            keep_files=args.update_weight_disk_keep_files,
        )
    if engines[0].kind == "embedded":
        return SharedMemoryTransport(Path(engines[0].weights_dir))
    if args.colocate and args.device == "cuda":
        return _ipc_transport(engines, rank, args.num_gpus_per_node)
    host = _meeting_host(engines)
    # By name: an engine that was started again has another address.
    num_ranks = {engine.name: engine.num_devices for engine in engines}
    return DistributedTransport(
        backend="nccl" if args.device == "cuda" else "gloo",
        master_address=host,
        free_port=lambda: free_port(host),
        num_ranks=lambda engine: num_ranks[engine.name],
        device=args.device,
    )


def _meeting_host(engines: Sequence[EngineRecord]) -> str:
    """Where this process listens for engines that join its group: they may run elsewhere, though Ray does not."""
    if all(is_loopback(urlsplit(engine.url).hostname or "") for engine in engines):
        return LOOPBACK
    own = str(ray.util.get_node_ip_address())
    return get_host_info()[1] if is_loopback(own) else own


def _ipc_transport(engines: Sequence[EngineRecord], rank: int, devices_per_node: int) -> IpcTransport:
    """Trainer rank r computes on the r-th of the shared devices, and engines take theirs in the same order.

    A server on several nodes counts the devices of each node from 0.
    """
    places = {engine.name: range(engine.first_device, engine.first_device + engine.num_devices) for engine in engines}
    own = next((devices for devices in places.values() if rank in devices), None)
    index = None if own is None else (rank - own.start) % min(len(own), devices_per_node)
    return IpcTransport(lambda engine: places[engine.name], device_index=index)


def _expected_digests(args: Namespace, engines: Sequence[EngineRecord]) -> Callable[[], ExpectedDigests]:
    if engines[0].kind == "embedded":
        return TensorDigests
    config = json.loads((Path(args.hf_checkpoint) / "config.json").read_text())
    parallel = TensorParallel(engines[0].num_devices, config.get("num_key_value_heads"))
    algorithm = algorithm_of(args.device)
    return lambda: FusedTensorDigests(config["model_type"], parallel, algorithm=algorithm)
