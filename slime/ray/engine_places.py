"""Places of engines: what runs in one may be lost and replaced; its name and devices stay."""

import contextlib
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from slime.backends.base import EngineSpec
from slime.backends.sglang.client import SGLangClient
from slime.observability.run_status import ProcessInfo
from slime.ray import cluster
from slime.ray.engine_actor import EngineActor, EngineRecord
from slime.ray.engine_specs import keeps_its_size, same_size
from slime.ray.external import external_name, find_external
from slime.ray.liveness import THREADS, Liveness
from slime.ray.waiting import wait_for
from slime.weight_sync.base import EngineError

_DEVICE_SHARE = 0.2  # of a device; a trainer on the same device takes more
_START_TIMEOUT_S = {"embedded": 300.0, "sglang": 900.0}
_ASK_TIMEOUT_S = 5.0
_EXTERNAL_TIMEOUT_S = 300.0  # in which whoever started an engine elsewhere may start it again
_GRACE_S = 30.0  # for the owner to say that its server was late
_TOLD_CHARS = 200
_POLL_S = 0.5


@dataclass
class EnginePlace:
    """What is known of one engine."""

    spec: EngineSpec
    record: EngineRecord | None = None
    """None until it is healthy."""
    is_admitted: bool = False
    """Whether its router sends it requests."""
    death: str | None = None
    """How what runs here was lost; None while it serves."""
    gave_back: set[str] = field(default_factory=set)
    """The kinds of memory that it does not hold now; what is started anew holds all."""
    num_starts: int = 0
    """How often it was begun. Who finds it silent means one of them, and may be late."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def gives_memory_back(self) -> bool:
        """Whether it does so in turn with a trainer."""
        return self.spec.gives_memory_back

    @property
    def health_url(self) -> str:
        """What answers 200 while it is well, paused or not."""
        return f"{self.spec.url}/health"

    def begin(self) -> None:
        """Start it, again if it ran before; `wait_until_healthy` follows."""
        raise NotImplementedError

    def wait_until_healthy(self) -> None:
        """Raises when it does not come to life in time; by then it has a record."""
        raise NotImplementedError

    def find_out(self) -> None:
        """Set `death` if what runs here is known to have ended."""

    def kill(self, reason: str, start: int) -> None:
        """It is silent: end it, and say so in `death`; nothing if another than this start of it serves by now."""
        raise NotImplementedError

    def last_line(self) -> str:
        """Of its log, for who waits for it."""
        return "(not known here)"

    def processes(self) -> list[ProcessInfo]:
        """Of this engine, as far as they were started here."""
        return []

    def begin_to_stop(self) -> list[Any]:
        """End it; what Ray says when that is done."""
        return []

    def stop(self) -> None:
        """The rest, after `begin_to_stop`."""

    def _serves(self, kind: str) -> None:
        self.is_admitted, self.death, self.gave_back = False, None, set()
        spec = self.spec
        self.record = EngineRecord(
            self.name, spec.url, kind, spec.num_devices, str(spec.weights_dir), spec.first_device
        )


class OwnEngine(EnginePlace):
    """An engine that this run starts: an actor and a server on each of its nodes."""

    def __init__(self, args: Namespace, specs: list[EngineSpec], devices: Any, liveness: Liveness) -> None:
        """
        Args:
            specs: one a node, the first of which takes requests.
            devices: reserved for generation (`placement_group.Devices`).
            liveness: watches the actors.
        """
        super().__init__(specs[0])
        self._args, self._parts, self._devices, self._liveness = args, specs, devices, liveness
        self._actors = [self._place(part) for part in specs]
        self._starting: list[Any] = []
        self._lock = threading.Lock()  # of `death` and `num_starts`, while somebody finds it silent
        self._size: dict[str, Any] = {}
        """How a later start says the size of the first; empty where memory is free then as it was."""

    def begin(self) -> None:
        lost = self._liveness.lost()
        for index, part in enumerate(self._parts):
            if _owner(part) in lost:
                self._liveness.kill(_owner(part))
                self._actors[index] = self._place(part)
        with self._lock:
            self.num_starts += 1
        told = (self.num_starts, self._size)
        first = self._actors[0].start.remote(*told)
        self._starting = [first, *(actor.start.remote(*told, first) for actor in self._actors[1:])]

    def wait_until_healthy(self) -> None:
        timeout_s = _START_TIMEOUT_S[self._args.rollout_engine]
        starting = {part.name: ref for part, ref in zip(self._parts, self._starting, strict=True)}
        self._parts = wait_for(starting, "start", timeout_s)
        self.spec = self._parts[0]
        answer = self._actors[0].wait_until_healthy.remote(timeout_s)
        began_s = time.monotonic()
        while not ray.wait([answer], timeout=_POLL_S)[0]:
            if (how := self._how_it_ended(self._parts[1:])) is not None:
                raise EngineError(how)  # the first node waits for the others until it times out
            waited_s = time.monotonic() - began_s
            if waited_s > timeout_s + _GRACE_S:
                raise EngineError(f"Waited {waited_s:.0f} s for {self.name} ({self.spec.url}) and its owner to answer.")
        wait_for({self.name: answer}, "answer", _ASK_TIMEOUT_S)
        self._serves(self._args.rollout_engine)
        if keeps_its_size(self._args) and not self._size:
            self._size = same_size(SGLangClient(self.spec.url, self.name).cache_tokens())

    def find_out(self) -> None:
        if self.record is not None and (how := self._how_it_ended(self._parts)) is not None:
            self.death = how

    def kill(self, reason: str, start: int) -> None:
        assert self.record is not None
        death = f"{self.name} ({self.record.url}) {reason} and was killed."
        with contextlib.suppress(RayError):  # whether or not its owner can still tell of its log
            tail = ray.get(self._actors[0].log_tail.remote(), timeout=_ASK_TIMEOUT_S)
            death = f"{death}\nLast lines of its log:\n{tail}"
        with self._lock:
            if self.num_starts != start or self.death is not None:
                return
            self.death = death
        killing = [actor.kill.remote(start) for actor in self._actors]
        ray.wait(killing, num_returns=len(killing), timeout=_ASK_TIMEOUT_S)

    def _how_it_ended(self, parts: list[EngineSpec]) -> str | None:
        """How one of its parts was lost; None if all are there."""
        lost = self._liveness.lost()
        for part in parts:
            if _owner(part) in lost:
                return f"{part.name} ended with its owner: {lost[_owner(part)]}"
        actors = [self._actors[part.node_rank] for part in parts]
        asked = {actor.how_it_ended.remote(): part for actor, part in zip(actors, parts, strict=True)}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ASK_TIMEOUT_S) if asked else ([], [])
        for ref in answered:
            with contextlib.suppress(RayError):  # its owner is gone: liveness tells
                if (how := ray.get(ref)) is not None:
                    return f"{asked[ref].name} ({asked[ref].url}) {how}"
        return None

    def last_line(self) -> str:
        with contextlib.suppress(RayError):
            tail = str(ray.get(self._actors[0].log_tail.remote(), timeout=_ASK_TIMEOUT_S))
            lines = [line.strip() for line in tail.splitlines() if line.strip()]  # bars of progress end with a \r
            return lines[-1][:_TOLD_CHARS] if lines else "(nothing yet)"
        return "(its owner does not answer)"

    def processes(self) -> list[ProcessInfo]:
        asked = {_owner(p): a.processes.remote() for p, a in zip(self._parts, self._actors, strict=True)}
        return [process for processes in wait_for(asked, "tell its pid", 60) for process in processes]

    def begin_to_stop(self) -> list[Any]:
        return [actor.stop.remote() for actor in self._actors]

    def stop(self) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def _place(self, part: EngineSpec) -> Any:
        resource = cluster.device_resource(self._args)
        share = {"num_gpus": _DEVICE_SHARE} if resource == "GPU" else {"resources": {resource: _DEVICE_SHARE}}
        first = part.first_device + part.node_rank * len(part.device_ids)
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self._devices.group, placement_group_bundle_index=self._devices.bundles[first]
        )
        options: dict[str, Any] = {
            "num_cpus": _DEVICE_SHARE,
            "max_concurrency": 4,
            "scheduling_strategy": strategy,
            **share,
        }
        actor = ray.remote(concurrency_groups=THREADS)(EngineActor).options(**options).remote(self._args, part)
        self._liveness.watch(_owner(part), actor)
        return actor


def _owner(part: EngineSpec) -> str:
    return f"owner of {part.name}"


class ExternalEngine(EnginePlace):
    """An engine that somebody else started, and starts again: nothing here ends it."""

    def __init__(self, args: Namespace, index: int, address: str, weights_dir: Path) -> None:
        self._find: Callable[[], EngineSpec] = lambda: find_external(args, index, address, weights_dir)
        super().__init__(self._find())

    @property
    def name(self) -> str:
        return external_name(self.spec.index)

    @property
    def health_url(self) -> str:
        """Its /health may be one that generates a token, which a paused engine cannot."""
        return f"{self.spec.url}/model_info"

    def begin(self) -> None:
        """Whoever started it does so again."""
        self.num_starts += 1

    def wait_until_healthy(self) -> None:
        client = SGLangClient(self.spec.url, self.name, timeout_s=_ASK_TIMEOUT_S)
        deadline = time.monotonic() + _EXTERNAL_TIMEOUT_S
        while True:
            try:
                client.model_info()
                break
            except EngineError as error:
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"{error}; and so for {_EXTERNAL_TIMEOUT_S:g} s. Start it there again, or take it out of "
                        "--rollout-external-engine-addrs."
                    ) from error
            time.sleep(_POLL_S)
        self.spec = replace(self._find(), index=self.spec.index)
        self._serves("sglang")

    def kill(self, reason: str, start: int) -> None:
        if self.num_starts == start:
            self.death = f"{self.name} ({self.spec.url}) {reason}. slime did not start it, so its own log tells why."
