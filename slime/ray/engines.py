"""All engines of a run and the routers before them: started, watched, and started again when one dies."""

import contextlib
import logging
import shutil
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import httpx
import ray

from slime.backends.base import EngineClient
from slime.config.engine_groups import DEFAULT_MODEL
from slime.observability.run_status import ProcessInfo
from slime.ray.engine_actor import EngineRecord
from slime.ray.engine_places import EnginePlace, ExternalEngine, OwnEngine
from slime.ray.engine_specs import check_nodes, engine_specs
from slime.ray.health import HealthMonitor
from slime.ray.liveness import Liveness
from slime.ray.routers import Router
from slime.rollout.staleness import weight_clock
from slime.utils.api_key import api_key, key_header
from slime.weight_sync.transports import shared_memory_folder

__all__ = ["EngineRecord", "Engines"]

logger = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 1.5
_NOTICE_S = 10.0  # in which a death that a failed call hints at shows
_POLL_S = 0.5
_TELL_EVERY_S = 30.0
_MEMORY = ("weights", "kv_cache", "cuda_graph")
_SCHEDULER_PATIENCE = 4.0  # it answers between two steps of its model, or after a bucket of weights


def _scheduler(name: str) -> str:
    return f"scheduler of {name}"


class Engines:
    """All engines of a run and their routers, from start to stop; lives in the rollout manager.

    Methods may be called from several threads.
    """

    def __init__(self, args: Namespace, devices: Any) -> None:
        self._args = args
        self._weights_dir = shared_memory_folder()
        self._liveness = Liveness("the rollout manager", args.liveness_timeout)
        self._health = HealthMonitor(
            interval_s=args.rollout_health_check_interval,
            timeout_s=args.rollout_health_check_timeout,
            first_wait_s=args.rollout_health_check_first_wait,
        )
        self._places = self._make_places(devices)
        self._routers = self._make_routers()
        self._num_serving = 0
        self._serving_lock = threading.Lock()
        self._lock = threading.RLock()

    def _make_places(self, devices: Any) -> list[EnginePlace]:
        args = self._args
        if getattr(args, "rollout_external", False):
            addresses = enumerate(args.rollout_external_engine_addrs)
            return [ExternalEngine(args, index, address, self._weights_dir) for index, address in addresses]
        specs = engine_specs(args, devices.device_ids, self._weights_dir)
        if args.device == "cuda":  # CPU devices are all of one host, whatever Ray calls a node
            check_nodes(specs, devices.nodes)
        return [OwnEngine(args, parts, devices, self._liveness) for parts in specs]

    def _make_routers(self) -> dict[str, Router]:
        """One a model; the first model's may run already."""
        args = self._args
        given = getattr(args, "sglang_router_ip", None)
        routers: dict[str, Router] = {}
        for model in dict.fromkeys([place.spec.model for place in self._places] or [DEFAULT_MODEL]):
            address = (given.strip("[]"), args.sglang_router_port) if given and not routers else None
            name = "router" if not routers else f"router of {model}"
            routers[model] = Router(args, self._health, name=name, address=address)
        return routers

    @property
    def records(self) -> list[EngineRecord]:
        """The engines that serve the trained model, or will once they have the weights."""
        return [place.record for place in self._serving_places() if place.record and place.spec.updates_weights]

    def _serving_places(self) -> list[EnginePlace]:
        return [place for place in self._places if place.record is not None and place.death is None]

    # ---- start ----

    def launch(self) -> None:
        """Start routers and engines, all at once; `wait_until_ready` follows.

        Sets `args.sglang_router_ip`, `args.sglang_router_port` and `args.sglang_model_routers`.
        """
        args = self._args
        self._liveness.start()
        for place in self._places:
            place.begin()
        port = getattr(args, "sglang_router_port", None)
        for model, router in self._routers.items():
            kinds = {place.spec.worker_type for place in self._places if place.spec.model == model}
            router.start(splits_work=bool(kinds & {"prefill", "decode"}), port=port)
            port = None
        addresses = {model: router.address for model, router in self._routers.items()}
        first = next(iter(addresses.values()))
        args.sglang_router_ip, args.sglang_router_port = first
        args.sglang_model_routers = {DEFAULT_MODEL: first} | addresses

    def wait_until_ready(self) -> None:
        """Wait until all engines are healthy, and register them with their routers.

        Raises the first error of any of them, while others may still be starting.
        """
        for error in self._start_errors(self._places):
            raise error
        for router in self._routers.values():
            router.wait()
        self.admit()
        for model, router in self._routers.items():
            urls = [place.spec.url for place in self._places if place.spec.model == model]
            logger.info("%d engine(s) behind %s: %s", len(urls), router.url, ", ".join(urls))

    def _start_errors(self, places: list[EnginePlace]) -> Iterator[BaseException]:
        """Wait for all of them, side by side; gives the error of each that cannot start as soon as it is known."""
        pool = ThreadPoolExecutor(max(1, len(places)), thread_name_prefix="starts")
        starting = {pool.submit(place.wait_until_healthy): place for place in places}
        pool.shutdown(wait=False)
        began_s = time.monotonic()
        while starting:
            done, _ = wait(starting, _TELL_EVERY_S, FIRST_COMPLETED)
            for future in done:
                place = starting.pop(future)
                if (error := future.exception()) is None:
                    self._watch_health(place)
                else:
                    yield error
            if not done:
                self._tell_of(list(starting.values()), time.monotonic() - began_s)

    def _tell_of(self, starting: list[EnginePlace], waited_s: float) -> None:
        first, *others = starting
        too = f", as {len(others)} more" if others else ""
        logger.info("%s has been starting for %.0f s%s; its log says: %s", first.name, waited_s, too, first.last_line())

    def _watch_health(self, place: EnginePlace) -> None:
        give_up = partial(self._give_up, place, place.num_starts)
        self._health.watch(place.name, place.health_url, give_up)
        if self._args.rollout_engine == "sglang":
            # /health comes from SGLang's front process, however its scheduler is; this answer comes from the scheduler.
            self._health.watch(
                _scheduler(place.name),
                f"{place.spec.url}/server_info",
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
        """Let routers send requests to every engine that serves and that its router does not know yet."""
        with self._lock:
            self._admit(self._places)

    def _admit(self, places: list[EnginePlace]) -> None:
        for place in places:
            if place.record is not None and place.death is None and not place.is_admitted:
                spec = place.spec
                self._routers[spec.model].admit(place.record.url, spec.worker_type, spec.bootstrap_port)
                place.is_admitted = True

    # ---- watch ----

    def dead(self) -> list[str]:
        """One text for each server that is lost: its name, address, how it ended and its last log lines.

        A lost engine is taken out of its router at once.
        """
        with self._lock:
            texts = [text for router in self._routers.values() if (text := router.death()) is not None]
            for place in self._places:
                if place.death is None:
                    place.find_out()
                if place.death is not None:
                    self._withdraw(place)
                    texts.append(place.death)
            return texts

    def give_up_silent(self) -> None:
        """After a call to the engines failed: end those of which no scheduler answers. Nobody watches schedulers while
        weights are on their way or memory changes hands, and the front process of a server answers without its own.
        """
        if self._args.rollout_engine != "sglang":
            return
        asked = [(place, place.num_starts) for place in self._serving_places()]
        with ThreadPoolExecutor(max(1, len(asked)), thread_name_prefix="engines") as pool:
            for place, start, silence in pool.map(lambda one: (*one, self._silence(one[0])), asked):
                if silence is not None:
                    logger.warning("%s %s and is given up", place.name, silence)
                    self._give_up(place, start, silence)

    def _silence(self, place: EnginePlace) -> str | None:
        """How its scheduler was silent; None if it answers, and be it with an error."""
        timeout_s = self._args.rollout_health_check_timeout
        url = f"{place.spec.url}/server_info"
        try:
            httpx.get(url, headers=key_header(api_key()), timeout=timeout_s, trust_env=False)
        except httpx.HTTPError as error:
            return f"did not answer {url} for {timeout_s:.0f} s ({error or type(error).__name__})"
        return None

    def _give_up(self, place: EnginePlace, start: int, reason: str) -> None:
        """It is silent: end it, so that whoever waits for it hears of it."""
        if place.death is None:
            place.kill(reason, start)

    def _withdraw(self, place: EnginePlace) -> None:
        self._health.forget(place.name)
        self._health.forget(_scheduler(place.name))
        if place.record is not None and place.is_admitted:
            place.is_admitted = False
            self._routers[place.spec.model].withdraw(place.record.url)

    # ---- start again ----

    def restart_dead(self) -> list[EngineRecord]:
        """Start every lost server again; returns the engines that are to be given the current weights.

        These are all that were started again since the last `admit`, before which they get no request: also those of an
        earlier call, after which something else went wrong.
        """
        with self._lock:
            for model, router in self._routers.items():
                if router.death() is not None:
                    self._restart(model, router)
            lost = [place for place in self._places if place.death is not None]
            for place in lost:
                self._withdraw(place)
                place.begin()
            if errors := list(self._start_errors(lost)):  # those that came to life are not started another time
                raise errors[0]
            waiting = [place for place in self._places if place.record is not None and not place.is_admitted]
            return [place.record for place in waiting if place.record and place.spec.updates_weights]

    def _restart(self, model: str, router: Router) -> None:
        router.restart()
        # Others may lack the current weights.
        known = [place for place in self._places if place.is_admitted and place.spec.model == model]
        for place in known:
            place.is_admitted = False
        self._admit(known)

    # ---- what all engines do ----

    def processes(self) -> list[ProcessInfo]:
        """Engines with their owners, and routers, as far as they were started here."""
        parts = [*self._places, *self._routers.values()]
        return [process for part in parts for process in part.processes()]

    def pause(self) -> None:
        """End all requests, and begin none."""
        self._on_all(lambda place, engine: engine.pause("abort"))

    def forget_caches(self) -> None:
        """Engines without requests forget the keys and values that they computed, maybe with older weights."""
        self._on_all(lambda place, engine: engine.flush_cache(only_if_idle=True))

    def release_memory(self) -> None:
        """Give back weights and caches of every engine that shares its devices."""

        def release(place: EnginePlace, engine: EngineClient) -> None:
            if place.gives_memory_back:
                engine.release_memory()
                place.gave_back = set(_MEMORY)

        self._on_all(release)

    def resume_memory(self, tags: list[str]) -> None:
        """Take memory back; weights hold nothing until the next sync."""

        def resume(place: EnginePlace, engine: EngineClient) -> None:
            if wanted := [tag for tag in tags if tag in place.gave_back]:
                engine.resume_memory(wanted)
                place.gave_back -= set(wanted)

        self._on_all(resume)

    def _on_all(self, call: Callable[[EnginePlace, EngineClient], None]) -> None:
        """Call every engine at once. One that fails because it is lost is left to the repair, which comes before it is
        needed; without --use-fault-tolerance `dead` names it.

        Raises:
            EngineError: a call failed, and its engine lives.
        """
        places = [(place, place.record) for place in self._serving_places() if place.record is not None]
        with ThreadPoolExecutor(max(1, len(places)), thread_name_prefix="engines") as pool:
            calls = [(place, pool.submit(call, place, record.client())) for place, record in places]
        failed = [(place, error) for place, done in calls if (error := done.exception()) is not None]
        deadline = time.monotonic() + _NOTICE_S
        while failed and time.monotonic() < deadline:
            self.dead()
            failed = [(place, error) for place, error in failed if place.death is None]
            time.sleep(_POLL_S if failed else 0)
        if failed:
            self.give_up_silent()
            failed = [(place, error) for place, error in failed if place.death is None]
        if failed:
            raise failed[0][1]

    def stop(self) -> None:
        """End every process that was started here."""
        self._health.close()
        self._liveness.close()
        stopping = [ref for place in self._places for ref in place.begin_to_stop()]
        ray.wait(stopping, num_returns=len(stopping), timeout=2 * _STOP_TIMEOUT_S) if stopping else None
        for part in [*self._places, *self._routers.values()]:
            part.stop()
        self._places = []
        shutil.rmtree(self._weights_dir, ignore_errors=True)
