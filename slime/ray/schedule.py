"""When a run evaluates and saves: one object that the loop asks by rollout id."""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Rollout ids count from 0; intervals are in rollouts."""

    start: int
    stop: int
    """One past the last rollout."""
    eval_interval: int | None = None
    save_interval: int | None = None
    exports: bool = False
    """A HuggingFace folder is wanted, at least of the last rollout (--save-hf)."""
    sync_interval: int = 1
    """1 where engines give their memory back while training: they hold no weights until the next sync."""
    rollouts_per_epoch: int | None = None
    skips_first_eval: bool = False

    @classmethod
    def of(cls, args: Namespace, rollouts_per_epoch: int | None) -> "Schedule":
        return cls(
            start=args.start_rollout_id,
            stop=args.num_rollout,
            eval_interval=args.eval_interval if args.eval_datasets else None,
            save_interval=args.save_interval,
            exports=args.save_hf is not None,
            sync_interval=1 if args.offload_rollout else args.update_weights_interval,
            rollouts_per_epoch=rollouts_per_epoch,
            skips_first_eval=args.skip_eval_before_train,
        )

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    @property
    def evaluates_first(self) -> bool:
        """Whether the untrained model is evaluated; not again after a resume."""
        return self.eval_interval is not None and self.start == 0 and not self.skips_first_eval

    def evaluates_after(self, rollout_id: int) -> bool:
        return self._is_due(rollout_id, self.eval_interval)

    def saves_after(self, rollout_id: int) -> bool:
        """The last rollout is always saved when saving is on."""
        saves = self.exports or self.save_interval is not None
        return saves and (rollout_id == self.stop - 1 or self._is_due(rollout_id, self.save_interval))

    @property
    def saved_before_start(self) -> bool:
        """Whether a resumed run had to save after the rollout that it goes on from."""
        return self.start > 0 and self.saves_after(self.start - 1)

    def syncs_after(self, rollout_id: int) -> bool:
        """Engines get new weights at the interval, before an evaluation, and at the end."""
        is_last = rollout_id == self.stop - 1
        return is_last or (rollout_id + 1) % self.sync_interval == 0 or self.evaluates_after(rollout_id)

    def _is_due(self, rollout_id: int, interval: int | None) -> bool:
        if interval is None:
            return False
        ends_epoch = bool(self.rollouts_per_epoch) and (rollout_id + 1) % self.rollouts_per_epoch == 0
        return (rollout_id + 1) % interval == 0 or ends_epoch
