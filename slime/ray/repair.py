"""Keep engines and router serving: notice one that is lost, start it again, give it the current weights, let it in."""

import logging
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from slime.ray.waiting import RemoteError, wait_for
from slime.weight_sync.base import EngineError

logger = logging.getLogger(__name__)

_MANAGER = "the rollout manager"
_POLL_INTERVAL_S = 1.0
_NOTICE_S = 10.0  # in which a death that a failed call hints at is looked for
_RESTARTS_PER_ROLLOUT = 5
_ATTEMPTS = 3


class Repairs:
    """The driver's view of the servers; without --use-fault-tolerance it only tells how one was lost."""

    def __init__(
        self,
        args: Namespace,
        manager: Any,
        trainer: Any,
        on_change: Callable[[], None] = lambda: None,
        new_version: Callable[[], Any] = lambda: None,
    ) -> None:
        """
        Args:
            args: reads `use_fault_tolerance`.
            manager: the rollout manager, which owns the servers.
            trainer: has `make_room`, `connect_engines` and `send_weights_again`; None where nothing is trained.
            on_change: called when servers have been started again: other processes run than before.
            new_version: gives every connected engine what the trainer holds, as the next version.
        """
        self._is_allowed = bool(args.use_fault_tolerance)
        self._manager, self._trainer = manager, trainer
        self._question: Any = None
        self._answered_s = 0.0
        self._is_repairing = False
        self._restarts: Counter[str] = Counter()
        self._restarted_records: dict[str, Any] = {}
        """By name: started again, and no request was let to them yet."""
        self._on_change, self._new_version = on_change, new_version

    def begin_rollout(self) -> None:
        """Servers may be lost so often again."""
        self._restarts.clear()

    def look(self) -> None:
        """Called while servers have to serve: repair what is lost.

        Raises:
            RemoteError: a server was lost and is not to be restarted, or cannot be; names it, with its last log lines.
        """
        if self._is_repairing:
            return
        if dead := self._poll():
            self._require_allowed(dead)
            self.repair(dead)

    def look_only(self) -> None:
        """Called while no server is needed: what is lost is repaired when it is; where that is not allowed, the run
        ends at once."""
        if not self._is_repairing and not self._is_allowed and (dead := self._poll()):
            self._require_allowed(dead)

    def repair(self, dead: list[str] | None = None) -> None:
        """Start what is lost, give it the weights that the other engines have, and let it take requests."""
        self._with_attempts(dead, self._restart_with_weights)

    def restart_lost(self) -> bool:
        """After a call to the engines failed: start lost ones without weights; false if none is lost or may be started.

        A sync follows.
        """
        deadline = time.monotonic() + _NOTICE_S
        while not (dead := self._ask("dead_servers", "look for lost servers")) and time.monotonic() < deadline:
            time.sleep(_POLL_INTERVAL_S)
        dead = dead or self._ask("give_up_silent_servers", "look for silent servers")
        if not dead:
            return False
        if not self._is_allowed:
            raise RemoteError("\n".join(dead))
        self._with_attempts(dead, self._restart_without_weights)
        return True

    def start_lost_before_a_sync(self) -> None:
        """An engine that was lost while training is there again when the weights go out."""
        if dead := self._ask("dead_servers", "look for lost servers"):
            self._require_allowed(dead)
            self._with_attempts(dead, self._restart_without_weights)

    def admit(self) -> None:
        """After a sync: every engine has the weights and may take requests."""
        self._ask("admit_engines", "register engines with the router")
        for record in self._restarted_records.values():
            logger.info("%s serves again at %s with the current weights", record.name, record.url)
        self._restarted_records.clear()

    # ---- how ----

    def _with_attempts(self, dead: list[str] | None, restart: Any) -> None:
        self._is_repairing = True
        try:
            for attempt in range(1, _ATTEMPTS + 1):
                for text in dead or ():
                    self._count(text)
                try:
                    restart()
                    self._on_change()
                    return
                except (RemoteError, EngineError) as error:
                    logger.warning("restart, attempt %d of %d: %s", attempt, _ATTEMPTS, error)
                    if attempt == _ATTEMPTS:
                        raise
                    time.sleep(_POLL_INTERVAL_S)
                    dead = None
        finally:
            self._is_repairing = False
            self._question = None  # its answer may be older than the repair

    def _restart_with_weights(self) -> None:
        restarted = self._restarted()
        if restarted and self._trainer is not None and self._trainer.weight_version > 0:
            self._bring_to_one_version(restarted)
        self.admit()

    def _restarted(self) -> list[Any]:
        """Lost servers started again, on GPUs where the trainer left what it does not need: the engines among them."""
        if self._trainer is not None:
            self._trainer.make_room()
        restarted = list(self._ask("restart_servers", "start lost servers again"))
        self._restarted_records |= {record.name: record for record in restarted}
        return restarted

    def _bring_to_one_version(self, restarted: list[Any]) -> None:
        """Restarted engines get the version that the others have; if the trainer is further, all get the next one."""
        if not self._trainer.has_trained_since_sync:
            self._trainer.connect_engines(restarted)
            self._trainer.send_weights_again()
        self._trainer.connect_engines(self._ask("engine_records", "list its engines"))
        if self._trainer.has_trained_since_sync:
            self._new_version()

    def _restart_without_weights(self) -> None:
        self._restarted()
        if self._trainer is not None:
            self._trainer.connect_engines(self._ask("engine_records", "list its engines"))

    def _count(self, death: str) -> None:
        name = death.partition(" (")[0]
        self._restarts[name] += 1
        logger.warning("%s It is started again.", death.partition("\n")[0])
        if self._restarts[name] > _RESTARTS_PER_ROLLOUT:
            raise RemoteError(
                f"{name} was lost {self._restarts[name]} times in one rollout and is not started again. "
                f"The last time: {death}"
            )

    def _require_allowed(self, dead: list[str]) -> None:
        if not self._is_allowed:
            raise RemoteError("\n".join(dead) + "\nWith --use-fault-tolerance it would be started again.")

    def _poll(self) -> list[str]:
        """What is known to be lost, without waiting for the manager."""
        if self._question is None:
            if time.monotonic() - self._answered_s < _POLL_INTERVAL_S:
                return []
            self._question = self._manager.dead_servers.remote()
        ready, _ = ray.wait([self._question], timeout=0)
        if not ready:
            return []
        question, self._question, self._answered_s = self._question, None, time.monotonic()
        try:
            return list(ray.get(question))
        except RayError as error:
            raise RemoteError(f"{_MANAGER} could not say which servers are lost: {error}") from error

    def _ask(self, method: str, what: str) -> Any:
        (result,) = wait_for({_MANAGER: getattr(self._manager, method).remote()}, what)
        return result
