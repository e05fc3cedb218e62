"""Engine processes on their devices and the router before them."""

import logging
import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from slime.backends.base import EngineClient, EngineSpec
from slime.backends.sglang.client import SGLangClient
from slime.backends.sglang.router import RouterClient, router_command
from slime.observability.run_status import ProcessInfo
from slime.ray import cluster
from slime.ray.waiting import wait_for
from slime.utils.processes import ServerProcess, free_port
from slime.weight_sync.sync import on_each
from slime.weight_sync.transports import shared_memory_folder

logger = logging.getLogger(__name__)

_DEVICE_SHARE = 0.2  # of a device; a trainer on the same device takes more
_START_TIMEOUT_S = {"embedded": 300.0, "sglang": 900.0}
_ROUTER_TIMEOUT_S = 60.0
_REGISTER_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class EngineRecord:
    """How other processes reach one engine."""

    name: str
    url: str
    kind: str
    """`embedded` or `sglang`."""
    num_devices: int
    weights_dir: str
    """Folder through which a trainer on the same host hands over weights."""

    def client(self) -> EngineClient:
        return SGLangClient(self.url, name=self.name)


class EngineActor:
    """Owns one engine process on the node where its devices are; carries no request."""

    def __init__(self, args: Namespace, spec: EngineSpec) -> None:
        self._args, self._spec = args, spec
        self._process: ServerProcess | None = None

    def start(self) -> EngineSpec:
        """Start the server; returns the spec with the host and port it was given. Does not wait."""
        host = "127.0.0.1" if self._spec.device == "cpu" else ray.util.get_node_ip_address()
        self._spec = replace(self._spec, host=host, port=free_port(host), nccl_port=free_port(host))
        argv, env = _server_command(self._args)(self._args, self._spec)
        self._process = ServerProcess(self._spec.name, argv, env, self._spec.log_path)
        self._process.start()
        return self._spec

    def wait_until_healthy(self, timeout_s: float) -> None:
        """Block until the server answers; its death or silence is an error with its last log lines."""
        self._started().wait_until_healthy(f"{self._spec.url}/health", timeout_s)

    def how_it_ended(self) -> str | None:
        """None while the server runs; else its exit code and its last log lines."""
        process = self._started()
        code = process.poll()
        return None if code is None else f"exit code {code}\n{process.log_tail(20)}"

    def processes(self) -> list[ProcessInfo]:
        """This actor and, while it runs, its server."""
        owner = ProcessInfo(f"owner of {self._spec.name}", "owner", os.getpid())
        server = self._process.server_pid if self._process is not None else None
        return [owner] if server is None else [ProcessInfo(self._spec.name, "engine", server), owner]

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate(_STOP_TIMEOUT_S)

    def _started(self) -> ServerProcess:
        if self._process is None:
            raise RuntimeError(f"{self._spec.name} was not started.")
        return self._process


def _server_command(
    args: Namespace,
) -> Callable[[Namespace, EngineSpec], tuple[list[str], dict[str, str]]]:
    if args.rollout_engine == "embedded":
        from slime.backends.embedded.launch import server_command
    else:
        from slime.backends.sglang.launch import server_command
    return server_command


class Engines:
    """All engines of a run and their router, from start to stop; lives in the rollout manager."""

    def __init__(self, args: Namespace, devices: Any) -> None:
        self._args = args
        self._weights_dir = shared_memory_folder()
        self._actors = [self._place(spec, devices) for spec in self._specs(devices)]
        self._starting: dict[str, Any] = {}
        self._router: ServerProcess | None = None
        self._router_url = ""
        self.records: list[EngineRecord] = []

    def launch(self) -> None:
        """Start router and engines, all at once; `wait_until_ready` follows.

        Sets `args.sglang_router_ip` and `args.sglang_router_port`.
        """
        self._starting = {f"engine {index}": actor.start.remote() for index, actor in enumerate(self._actors)}
        self._router_url = self._start_router()

    def wait_until_ready(self) -> None:
        """Wait until all engines are healthy, and register them with the router."""
        timeout_s = _START_TIMEOUT_S[self._args.rollout_engine]
        specs = wait_for(self._starting, "start", timeout_s)
        router_url = self._router_url
        healthy = {
            spec.name: actor.wait_until_healthy.remote(timeout_s)
            for spec, actor in zip(specs, self._actors, strict=True)
        }
        wait_for(healthy, "answer", timeout_s + 30)
        self.records = [
            EngineRecord(
                spec.name,
                spec.url,
                self._args.rollout_engine,
                spec.num_devices,
                str(spec.weights_dir),
            )
            for spec in specs
        ]
        if self._router is not None:
            self._router.wait_until_healthy(f"{router_url}/liveness", _ROUTER_TIMEOUT_S)
        router = RouterClient(router_url)
        for record in self.records:
            router.add_worker(record.url, timeout_s=_REGISTER_TIMEOUT_S)
        logger.info(
            "%d engine(s) behind %s: %s",
            len(specs),
            router_url,
            ", ".join(record.url for record in self.records),
        )

    def dead(self) -> list[str]:
        """One text for each server that has died: its name, address and last log lines."""
        texts = []
        if self._router is not None and (code := self._router.poll()) is not None:
            texts.append(f"The router ({self._router_url}) died with exit code {code}:\n{self._router.log_tail(20)}")
        ended = ray.get([actor.how_it_ended.remote() for actor in self._actors])
        texts += [
            f"{record.name} ({record.url}) died: {text}"
            for record, text in zip(self.records, ended, strict=False)
            if text is not None
        ]
        return texts

    def processes(self) -> list[ProcessInfo]:
        """Engines with their owners, and the router if it was started here."""
        found = wait_for({f"owner {i}": a.processes.remote() for i, a in enumerate(self._actors)}, "tell its pid", 60)
        router = self._router.server_pid if self._router is not None else None
        routers = [] if router is None else [ProcessInfo("router", "router", router)]
        return [process for processes in found for process in processes] + routers

    def release_memory(self) -> None:
        """Give back weights and caches of every engine."""
        on_each(
            [record.client() for record in self.records],
            lambda engine: engine.release_memory(),
        )

    def resume_memory(self, tags: list[str]) -> None:
        """Take memory back; weights hold nothing until the next sync."""
        on_each(
            [record.client() for record in self.records],
            lambda engine: engine.resume_memory(tags),
        )

    def stop(self) -> None:
        """End every process that was started here."""
        for actor in self._actors:
            ray.get(actor.stop.remote())
            ray.kill(actor)
        if self._router is not None:
            self._router.terminate(_STOP_TIMEOUT_S)
        self._actors = []
        shutil.rmtree(self._weights_dir, ignore_errors=True)

    def _specs(self, devices: Any) -> list[EngineSpec]:
        args = self._args
        per_engine = args.rollout_num_gpus_per_engine
        dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
        return [
            EngineSpec(
                index=index,
                host="127.0.0.1",
                port=0,
                num_devices=per_engine,
                device=args.device,
                device_ids=tuple(devices.device_ids[index * per_engine : (index + 1) * per_engine]),
                model_path=args.hf_checkpoint,
                dtype=dtype,
                threads=args.rollout_threads,
                log_path=Path(args.run_dir) / "logs" / f"engine_{index}.log",
                weights_dir=self._weights_dir,
                seed=args.seed + index,
            )
            for index in range(len(devices.bundles) // per_engine)
        ]

    def _place(self, spec: EngineSpec, devices: Any) -> Any:
        resource = cluster.device_resource(self._args)
        share = {"num_gpus": _DEVICE_SHARE} if resource == "GPU" else {"resources": {resource: _DEVICE_SHARE}}
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=devices.group,
            placement_group_bundle_index=devices.bundles[spec.index * spec.num_devices],
        )
        options = {
            "num_cpus": _DEVICE_SHARE,
            "max_concurrency": 4,
            "scheduling_strategy": strategy,
            **share,
        }
        return ray.remote(EngineActor).options(**options).remote(self._args, spec)

    def _start_router(self) -> str:
        args = self._args
        host = getattr(args, "sglang_router_ip", None)
        if host:
            return f"http://{host}:{args.sglang_router_port}"
        host = "127.0.0.1" if args.device == "cpu" else ray.util.get_node_ip_address()
        port = getattr(args, "sglang_router_port", None) or free_port(host)
        argv, env = router_command(args, host, port, free_port(host))
        self._router = ServerProcess("router", argv, env, Path(args.run_dir) / "logs" / "router.log")
        self._router.start()
        args.sglang_router_ip, args.sglang_router_port = host, port
        args.sglang_model_routers = {"default": (host, port)}
        return f"http://{host}:{port}"
