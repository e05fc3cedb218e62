"""Places of engines: what runs in one may be lost and replaced; its name and devices stay."""

import contextlib
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

    def kill(self, reason: str) -> None:
        """It is silent: end it, and say so in `death`."""
        raise NotImplementedError

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
        self._starting: Any = None
        self._size: dict[str, Any] = {}
        """How a later start says the size of the first; empty where memory is free then as it was."""

    def begin(self) -> None:
        lost = self._liveness.lost()
        for index, part in enumerate(self._parts):
            if _owner(part) in lost:
                self._liveness.kill(_owner(part))
                self._actors[index] = self._place(part)
        self._starting = self._actors[0].start.remote(self._size)
        for actor in self._actors[1:]:
            actor.start.remote(self._size, self._starting)

    def wait_until_healthy(self) -> None:
        timeout_s = _START_TIMEOUT_S[self._args.rollout_engine]
        (self.spec,) = wait_for({self.name: self._starting}, "start", timeout_s)
        wait_for({self.name: self._actors[0].wait_until_healthy.remote(timeout_s)}, "answer", timeout_s + 30)
        self._serves(self._args.rollout_engine)
        if keeps_its_size(self._args) and not self._size:
            self._size = same_size(SGLangClient(self.spec.url, self.name).cache_tokens())

    def find_out(self) -> None:
        lost = self._liveness.lost()
        for part in self._parts:
            if _owner(part) in lost:
                self.death = f"{part.name} ended with its owner: {lost[_owner(part)]}"
                return
        if self.record is None:
            return
        asked = {actor.how_it_ended.remote(): part for actor, part in zip(self._actors, self._parts, strict=True)}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ASK_TIMEOUT_S)
        for ref in answered:
            with contextlib.suppress(RayError):  # its owner is gone: liveness tells
                if (how := ray.get(ref)) is not None:
                    self.death = f"{asked[ref].name} ({self.record.url}) {how}"

    def kill(self, reason: str) -> None:
        assert self.record is not None
        death = f"{self.name} ({self.record.url}) {reason} and was killed."
        self.death = death  # whether or not its owner can still tell of its log
        with contextlib.suppress(RayError):
            tail = ray.get(self._actors[0].log_tail.remote(), timeout=_ASK_TIMEOUT_S)
            self.death = f"{death}\nLast lines of its log:\n{tail}"
        for actor in self._actors:
            with contextlib.suppress(RayError):
                ray.get(actor.kill.remote(), timeout=_ASK_TIMEOUT_S)

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

    def kill(self, reason: str) -> None:
        self.death = f"{self.name} ({self.spec.url}) {reason}. slime did not start it, so its own log tells why."
