"""How old the weights are that made a sample, counted in rollouts that were trained since; and the limit to it.

A sample that is trained in rollout `r` and has a token from weights that `t` rollouts were trained into is `r - t`
rollouts old: 0 where every token comes from the weights that are trained. Tokens that are not trained do not count.
"""

import asyncio
import threading
from argparse import Namespace
from collections.abc import Iterable
from typing import Any

from slime.rollout.base_types import flatten_samples
from slime.utils.response_meta import version_spans
from slime.utils.types import Sample

_POLL_S = 0.02


class WeightClock:
    """Which weights the engines hold, as the process that generates was told. Methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._trained_by: dict[str, int] = {}
        self._current: str | None = None
        self._num_updates = 0
        self._is_updating = False

    def begin_update(self) -> None:
        """New weights are about to go out; `settled` waits from now on."""
        with self._lock:
            self._num_updates += 1
            self._is_updating = True

    def end_update(self, version: str, trained: int) -> None:
        """All engines hold `version`, into which `trained` rollouts were trained."""
        with self._lock:
            self._trained_by[version] = trained
            self._current = version
            self._is_updating = False

    @property
    def current(self) -> str | None:
        """The version that engines hold, or held before the update that is under way; None before the first."""
        return self._current

    @property
    def trained(self) -> int:
        """Rollouts that were trained into `current`."""
        return 0 if self._current is None else self._trained_by[self._current]

    @property
    def num_updates(self) -> int:
        """Updates that have begun: a request that ends under another number than it began with met one."""
        return self._num_updates

    @property
    def is_updating(self) -> bool:
        return self._is_updating

    def trained_by(self, version: str) -> int | None:
        """Rollouts that were trained into a version; None of a version that was not announced here."""
        return self._trained_by.get(version)

    async def settled(self) -> int:
        """Wait until no update is under way; returns `num_updates`."""
        while self._is_updating:
            await asyncio.sleep(_POLL_S)
        return self._num_updates

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps: samples that outlive it are then as old as before."""
        with self._lock:
            return dict(self._trained_by)

    def restore(self, state: dict[str, int]) -> None:
        """Know the versions of an earlier part of the run again."""
        with self._lock:
            self._trained_by = {str(version): int(trained) for version, trained in state.items()} | self._trained_by


_clock = WeightClock()


def weight_clock() -> WeightClock:
    """The clock of this process."""
    return _clock


def reset_weight_clock() -> None:
    """A new clock, as a new process has it."""
    global _clock
    _clock = WeightClock()


# ---- one sample ----


def made_from(samples: Iterable[Any]) -> int | None:
    """Rollouts trained into the oldest weights that a trained token of `samples` (nested lists too) comes from.

    None where no trained token has a known version.
    """
    trained_into = [
        trained
        for sample in flatten_samples(samples)
        for version, start, end in version_spans(sample)
        if (trained := _clock.trained_by(version)) is not None and _is_trained(sample, start, end)
    ]
    return min(trained_into, default=None)


def assume_version(made: Any, version: str | None) -> None:
    """Count what a generate function made without saying by which weights as made by `version`, in place.

    Args:
        made: a sample, or nested lists of them. Those that have a version already keep it.
        version: that engines held when the function was called, so the oldest that it can have met.
    """
    for sample in flatten_samples([made]):
        if version is not None and sample.response_length > 0 and not sample.weight_versions:
            sample.weight_versions = [version]


def _is_trained(sample: Sample, start: int, end: int) -> bool:
    return end > start and not sample.remove_sample and (sample.loss_mask is None or any(sample.loss_mask[start:end]))


def staleness(sample: Sample, rollout_id: int) -> int | None:
    """How many rollouts old a sample is where it is trained in `rollout_id`; None where that is not known."""
    trained = made_from([sample])
    return None if trained is None else rollout_id - trained


def mask_tokens_before(samples: Iterable[Any], oldest_trained: int) -> int:
    """Take tokens of weights that fewer than `oldest_trained` rollouts were trained into out of the loss.

    Returns:
        how many trained tokens were taken out.
    """
    masked = 0
    for sample in flatten_samples(samples):
        for version, start, end in version_spans(sample):
            trained = _clock.trained_by(version)
            if trained is None or trained >= oldest_trained:
                continue
            mask = [1] * sample.response_length if sample.loss_mask is None else list(sample.loss_mask)
            masked += sum(mask[start:end])
            sample.loss_mask = mask[:start] + [0] * (end - start) + mask[end:]
    return masked


# ---- the limit ----


def staleness_limit(args: Namespace) -> int | None:
    """How many rollouts old a trained token may be: --async-buffer-size + --update-weights-interval.

    None where generation and training take turns, so that the schedule alone decides.
    """
    limit: int | None = getattr(args, "max_staleness", None)
    return limit


class StalenessCheck:
    """What becomes of finished groups that are too old for the rollout that would train them (--stale-samples).

    Counts what it did; nothing goes silently.
    """

    def __init__(self, args: Namespace, rollout_id: int) -> None:
        limit = staleness_limit(args)
        self._oldest = None if limit is None else rollout_id - limit
        self._masks = getattr(args, "stale_samples", "discard") == "mask"
        self.num_discarded = 0
        self.num_masked_tokens = 0

    def admits(self, group: list[Any]) -> bool:
        """Whether the group may be trained; --stale-samples mask masks its old tokens and lets it pass."""
        if self._oldest is None:
            return True
        trained = made_from(group)
        if trained is None or trained >= self._oldest:
            return True
        if self._masks:
            self.num_masked_tokens += mask_tokens_before(group, self._oldest)
            return True
        self.num_discarded += 1
        return False

    def metrics(self) -> dict[str, Any]:
        """Counts for the metrics of the rollout; {} where there is no limit."""
        if self._oldest is None:
            return {}
        return {
            "rollout/staleness/discarded_groups": self.num_discarded,
            "rollout/staleness/masked_tokens": self.num_masked_tokens,
        }
