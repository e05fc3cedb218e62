"""Engine processes on their devices and the router before them: started, watched, and started again when one dies."""

import contextlib
import logging
import shutil
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from slime.backends.base import EngineClient, EngineSpec
from slime.backends.sglang.router import RouterClient, router_command
from slime.observability.run_status import ProcessInfo
from slime.ray import cluster
from slime.ray.engine_actor import EngineActor, EngineRecord
from slime.ray.health import HealthMonitor
from slime.ray.liveness import THREADS, Liveness
from slime.ray.waiting import wait_for
from slime.rollout.staleness import weight_clock
from slime.utils.processes import ServerProcess, free_port
from slime.weight_sync.base import EngineError
from slime.weight_sync.transports import shared_memory_folder

__all__ = ["EngineRecord", "Engines"]

logger = logging.getLogger(__name__)

_DEVICE_SHARE = 0.2  # of a device; a trainer on the same device takes more
_START_TIMEOUT_S = {"embedded": 300.0, "sglang": 900.0}
_ROUTER_TIMEOUT_S = 60.0
_REGISTER_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 5.0
_ASK_TIMEOUT_S = 5.0
_NOTICE_S = 10.0  # in which a death that a failed call hints at shows
_POLL_S = 0.5
_MEMORY = ("weights", "kv_cache", "cuda_graph")
_ROUTER = "router"
_SCHEDULER_PATIENCE = 4.0  # it answers between two steps of its model, or after a bucket of weights


def _scheduler(name: str) -> str:
    return f"scheduler of {name}"


@dataclass
class _Slot:
    """The place of one engine; what runs there may be replaced."""

    spec: EngineSpec
    actor: Any
    record: EngineRecord | None = None
    """None until it is healthy."""
    is_admitted: bool = False
    """Whether the router sends it requests."""
    death: str | None = None
    """How what runs here was lost; None while it serves."""
    gave_back: set[str] = field(default_factory=set)
    """The kinds of memory that it does not hold now; what is started anew holds all."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def owner(self) -> str:
        return f"owner of {self.spec.name}"


class Engines:
    """All engines of a run and their router, from start to stop; lives in the rollout manager.

    Methods may be called from several threads.
    """

    def __init__(self, args: Namespace, devices: Any) -> None:
        self._args, self._devices = args, devices
        self._weights_dir = shared_memory_folder()
        self._liveness = Liveness("the rollout manager", args.liveness_timeout)
        self._health = HealthMonitor(
            interval_s=args.rollout_health_check_interval,
            timeout_s=args.rollout_health_check_timeout,
            first_wait_s=args.rollout_health_check_first_wait,
        )
        self._slots = [_Slot(spec, self._place(spec)) for spec in self._specs()]
        self._router: ServerProcess | None = None
        self._router_url = ""
        self._router_silence: str | None = None
        self._num_serving = 0
        self._serving_lock = threading.Lock()
        self._lock = threading.RLock()
        self._starting: dict[str, Any] = {}

    @property
    def records(self) -> list[EngineRecord]:
        """The engines that serve, or will once they have the weights."""
        return [slot.record for slot in self._slots if slot.record is not None and slot.death is None]

    # ---- start ----

    def launch(self) -> None:
        """Start router and engines, all at once; `wait_until_ready` follows.

        Sets `args.sglang_router_ip` and `args.sglang_router_port`.
        """
        self._liveness.start()
        self._starting = {slot.name: slot.actor.start.remote() for slot in self._slots}
        self._router_url = self._start_router()

    def wait_until_ready(self) -> None:
        """Wait until all engines are healthy, and register them with the router."""
        self._wait_until_healthy(self._slots, self._starting)
        self._wait_for_router()
        self.admit()
        logger.info(
            "%d engine(s) behind %s: %s",
            len(self._slots),
            self._router_url,
            ", ".join(record.url for record in self.records),
        )

    def _wait_until_healthy(self, slots: list[_Slot], starting: dict[str, Any]) -> None:
        timeout_s = _START_TIMEOUT_S[self._args.rollout_engine]
        specs = wait_for(starting, "start", timeout_s)
        healthy = {slot.name: slot.actor.wait_until_healthy.remote(timeout_s) for slot in slots}
        wait_for(healthy, "answer", timeout_s + 30)
        for slot, spec in zip(slots, specs, strict=True):
            slot.spec, slot.is_admitted, slot.death, slot.gave_back = spec, False, None, set()
            slot.record = EngineRecord(
                spec.name,
                spec.url,
                self._args.rollout_engine,
                spec.num_devices,
                str(spec.weights_dir),
                spec.index * spec.num_devices,
            )
            self._watch_health(slot)

    def _watch_health(self, slot: _Slot) -> None:
        give_up = partial(self._give_up_engine, slot)
        self._health.watch(slot.name, f"{slot.spec.url}/health", give_up)
        if self._args.rollout_engine == "sglang":
            # /health comes from SGLang's front process, however its scheduler is; this answer comes from the scheduler.
            self._health.watch(
                _scheduler(slot.name),
                f"{slot.spec.url}/server_info",
                give_up,
                patience=_SCHEDULER_PATIENCE,
                when=lambda: self._num_serving > 0 and not weight_clock().is_updating,
            )

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Inside, and while no weights are on their way, engines generate: the silence of a scheduler is no work."""
        with self._serving_lock:
            self._num_serving += 1
        try:
            yield
        finally:
            with self._serving_lock:
                self._num_serving -= 1

    def admit(self) -> None:
        """Let the router send requests to every engine that serves and that it does not know yet."""
        with self._lock:
            self._admit(self._slots)

    def _admit(self, slots: list[_Slot]) -> None:
        router = RouterClient(self._router_url)
        for slot in slots:
            if slot.record is not None and slot.death is None and not slot.is_admitted:
                router.add_worker(slot.record.url, timeout_s=_REGISTER_TIMEOUT_S)
                slot.is_admitted = True
        router.close()

    # ---- watch ----

    def dead(self) -> list[str]:
        """One text for each server that is lost: its name, address, how it ended and its last log lines.

        A lost engine is taken out of the router at once.
        """
        with self._lock:
            texts = [text for text in [self._router_death()] if text is not None]
            self._find_lost_owners()
            self._find_ended_servers()
            for slot in self._slots:
                if slot.death is not None:
                    self._withdraw(slot)
                    texts.append(slot.death)
            return texts

    def _find_lost_owners(self) -> None:
        lost = self._liveness.lost()
        for slot in self._slots:
            if slot.death is None and slot.owner in lost:
                slot.death = f"{slot.name} ended with its owner: {lost[slot.owner]}"

    def _find_ended_servers(self) -> None:
        asked = {slot.actor.how_it_ended.remote(): slot for slot in self._slots if slot.death is None and slot.record}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ASK_TIMEOUT_S) if asked else ([], [])
        for ref in answered:
            slot = asked[ref]
            with contextlib.suppress(RayError):  # its owner is gone: liveness tells
                if (how := ray.get(ref)) is not None and slot.record is not None:
                    slot.death = f"{slot.name} ({slot.record.url}) {how}"

    def _give_up_engine(self, slot: _Slot, reason: str) -> None:
        """It is silent: end it, so that whoever waits for it hears of it."""
        assert slot.record is not None
        if slot.death is not None:
            return
        with contextlib.suppress(RayError):
            tail = ray.get(slot.actor.log_tail.remote(), timeout=_ASK_TIMEOUT_S)
            slot.death = f"{slot.name} ({slot.record.url}) {reason} and was killed.\nLast lines of its log:\n{tail}"
            ray.get(slot.actor.kill.remote(), timeout=_ASK_TIMEOUT_S)

    def _withdraw(self, slot: _Slot) -> None:
        self._health.forget(slot.name)
        self._health.forget(_scheduler(slot.name))
        if slot.record is None or not slot.is_admitted:
            return
        slot.is_admitted = False
        with contextlib.suppress(EngineError):  # a router that is gone knows no engine
            RouterClient(self._router_url, timeout_s=_ASK_TIMEOUT_S).remove_worker(slot.record.url, _ASK_TIMEOUT_S)

    def _router_death(self) -> str | None:
        if self._router is None:
            return None
        how = self._router_silence or self._router.how_it_ended()
        return None if how is None else f"The router ({self._router_url}) {how}"

    # ---- start again ----

    def restart_dead(self) -> list[EngineRecord]:
        """Start every lost server again; returns the engines that are to be given the current weights.

        These are all that were started again since the last `admit`, before which they get no request: also those of an
        earlier call, after which something else went wrong.
        """
        with self._lock:
            if self._router_death() is not None:
                self._restart_router()
            slots = [slot for slot in self._slots if slot.death is not None]
            for slot in slots:
                self._withdraw(slot)
                if slot.owner in self._liveness.lost():
                    self._liveness.kill(slot.owner)
                    slot.actor = self._place(slot.spec)
            self._wait_until_healthy(slots, {slot.name: slot.actor.start.remote() for slot in slots})
            return [slot.record for slot in self._slots if slot.record is not None and not slot.is_admitted]

    def _restart_router(self) -> None:
        assert self._router is not None
        self._health.forget(_ROUTER)
        self._router.terminate(0.5)
        self._router.start()
        self._router_silence = None
        self._wait_for_router()
        known = [slot for slot in self._slots if slot.is_admitted]  # others may lack the current weights
        for slot in known:
            slot.is_admitted = False
        self._admit(known)

    # ---- what all engines do ----

    def processes(self) -> list[ProcessInfo]:
        """Engines with their owners, and the router if it was started here."""
        found = wait_for({slot.owner: slot.actor.processes.remote() for slot in self._slots}, "tell its pid", 60)
        router = self._router.server_pid if self._router is not None else None
        routers = [] if router is None else [ProcessInfo(_ROUTER, "router", router)]
        return [process for processes in found for process in processes] + routers

    def pause(self) -> None:
        """End all requests, and begin none."""
        self._on_all(lambda slot, engine: engine.pause("abort"))

    def release_memory(self) -> None:
        """Give back weights and caches of every engine."""

        def release(slot: _Slot, engine: EngineClient) -> None:
            engine.release_memory()
            slot.gave_back = set(_MEMORY)

        self._on_all(release)

    def resume_memory(self, tags: list[str]) -> None:
        """Take memory back; weights hold nothing until the next sync."""

        def resume(slot: _Slot, engine: EngineClient) -> None:
            if wanted := [tag for tag in tags if tag in slot.gave_back]:
                engine.resume_memory(wanted)
                slot.gave_back -= set(wanted)

        self._on_all(resume)

    def _on_all(self, call: Callable[[_Slot, EngineClient], None]) -> None:
        """Call every engine at once. One that fails because it is lost is left to the repair, which comes before it is
        needed; without --use-fault-tolerance `dead` names it.

        Raises:
            EngineError: a call failed, and its engine lives.
        """
        slots = [(slot, slot.record) for slot in self._slots if slot.record is not None and slot.death is None]
        with ThreadPoolExecutor(max(1, len(slots)), thread_name_prefix="engines") as pool:
            calls = [(slot, pool.submit(call, slot, record.client())) for slot, record in slots]
        failed = [(slot, error) for slot, done in calls if (error := done.exception()) is not None]
        deadline = time.monotonic() + _NOTICE_S
        while failed and time.monotonic() < deadline:
            self.dead()
            failed = [(slot, error) for slot, error in failed if slot.death is None]
            time.sleep(_POLL_S if failed else 0)
        if failed:
            raise failed[0][1]

    def stop(self) -> None:
        """End every process that was started here."""
        self._health.close()
        self._liveness.close()
        stopping = [slot.actor.stop.remote() for slot in self._slots]
        ray.wait(stopping, num_returns=len(stopping), timeout=2 * _STOP_TIMEOUT_S) if stopping else None
        for slot in self._slots:
            ray.kill(slot.actor)
        if self._router is not None:
            self._router.terminate(_STOP_TIMEOUT_S)
        self._slots = []
        shutil.rmtree(self._weights_dir, ignore_errors=True)

    # ---- one engine, one router ----

    def _specs(self) -> list[EngineSpec]:
        args, devices = self._args, self._devices
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

    def _place(self, spec: EngineSpec) -> Any:
        resource = cluster.device_resource(self._args)
        share = {"num_gpus": _DEVICE_SHARE} if resource == "GPU" else {"resources": {resource: _DEVICE_SHARE}}
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self._devices.group,
            placement_group_bundle_index=self._devices.bundles[spec.index * spec.num_devices],
        )
        options: dict[str, Any] = {
            "num_cpus": _DEVICE_SHARE,
            "max_concurrency": 4,
            "scheduling_strategy": strategy,
            **share,
        }
        actor = ray.remote(concurrency_groups=THREADS)(EngineActor).options(**options).remote(self._args, spec)
        self._liveness.watch(f"owner of {spec.name}", actor)
        return actor

    def _start_router(self) -> str:
        args = self._args
        host = getattr(args, "sglang_router_ip", None)
        if host:
            return f"http://{host}:{args.sglang_router_port}"
        host = "127.0.0.1" if args.device == "cpu" else ray.util.get_node_ip_address()
        port = getattr(args, "sglang_router_port", None) or free_port(host)
        argv, env = router_command(args, host, port, free_port(host))
        self._router = ServerProcess(_ROUTER, argv, env, Path(args.run_dir) / "logs" / "router.log")
        self._router.start()
        args.sglang_router_ip, args.sglang_router_port = host, port
        args.sglang_model_routers = {"default": (host, port)}
        return f"http://{host}:{port}"

    def _wait_for_router(self) -> None:
        if self._router is None:
            return
        url = f"{self._router_url}/liveness"
        self._router.wait_until_healthy(url, _ROUTER_TIMEOUT_S)
        self._health.watch(_ROUTER, url, self._give_up_router)

    def _give_up_router(self, reason: str) -> None:
        assert self._router is not None
        self._router_silence = f"{reason} and was killed.\nLast lines of its log:\n{self._router.log_tail()}"
        self._router.terminate(0.5)
