"""Who owns the devices now: trainer and engines take turns where they share them, and give their memory back."""

from argparse import Namespace
from typing import Any

from slime.observability.timer import StepClock
from slime.ray.waiting import wait_for

_MANAGER = "the rollout manager"


class Turns:
    """Hands devices over at the edges of phases; with devices of their own, both sides just keep theirs.

    Engines that gave their memory back hold no weights, so a sync follows before they generate again.
    """

    def __init__(self, args: Namespace, rollout_manager: Any) -> None:
        """
        Args:
            args: reads `offload_rollout` and `offload_train`.
            rollout_manager: the actor whose `offload`, `onload_weights` and `onload_kv` reach the engines.
        """
        self._engines_share, self._trainer_shares = bool(args.offload_rollout), bool(args.offload_train)
        self._manager = rollout_manager
        self.trainer: Any = None
        """Has `offload`, `offload_weights` and `onload`; None until it is there, and where nothing is trained."""
        self._engines_gave_back = False
        self._trainer_gave_back = False

    def to_loading(self, clock: StepClock) -> None:
        """Before the trainer loads its model: it needs what engines that came first have taken."""
        if self._engines_share:
            with clock.phase("offload"):
                self._ask("offload", "release the engines' memory")
            self._engines_gave_back = True

    def to_trainer(self, clock: StepClock) -> None:
        """Before training: engines release weights and caches, the trainer takes its memory."""
        if not self._engines_gave_back:
            self.to_loading(clock)
        if self._trainer_gave_back:
            with clock.phase("onload"):
                self.trainer.onload()
            self._trainer_gave_back = False

    def to_engines(self, clock: StepClock) -> None:
        """Before a sync: the trainer releases what only training needs, engines make room for weights."""
        if self._trainer_shares and not self._trainer_gave_back:
            with clock.phase("offload"):
                self.trainer.offload()
            self._trainer_gave_back = True
        if self._engines_gave_back:
            with clock.phase("onload"):
                self._ask("onload_weights", "make room for weights in the engines")

    def to_generation(self, clock: StepClock) -> None:
        """After a sync: the trainer releases its weights too, engines make room for their caches."""
        if self._trainer_gave_back:
            with clock.phase("offload"):
                self.trainer.offload_weights()
        if self._engines_gave_back:
            with clock.phase("onload"):
                self._ask("onload_kv", "make room for caches in the engines")
            self._engines_gave_back = False

    def _ask(self, method: str, what: str) -> None:
        wait_for({_MANAGER: getattr(self._manager, method).remote()}, what)
