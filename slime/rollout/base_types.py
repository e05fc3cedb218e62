"""What a rollout function returns, and calling one whichever way it was written."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from slime.utils.types import Sample


@dataclass(frozen=True)
class GroupFates:
    """What became of the groups that a rollout drew from the data source, each by its `group_index`.

    A drawn group that is in none of the lists went back to the data source.
    """

    trained: tuple[int | None, ...] = ()
    dropped: tuple[int | None, ...] = ()
    """By the dynamic filter."""
    discarded: tuple[int | None, ...] = ()
    """Started and thrown away: the batch was full, or the group too old (`slime.rollout.staleness`)."""


@dataclass
class RolloutFnTrainOutput:
    """A rollout for training."""

    samples: list[Any]
    """Groups of samples, nested to any depth."""
    metrics: dict[str, Any] | None = None
    fates: GroupFates | None = None
    """For the run's ledger; None: all that is known is which groups are in `samples`."""


@dataclass
class RolloutFnEvalOutput:
    """An evaluation: per task {"rewards": [...], "truncated": [...], "samples": [...]}, one entry a sample."""

    data: dict[str, dict[str, list[Any]]]
    metrics: dict[str, Any] | None = None


def call_rollout_fn(
    fn: Callable[..., Any], *args: Any, evaluation: bool, **kwargs: Any
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """Call a rollout function; a plain list or dict that it returns is put into the type that is meant.

    Raises:
        TypeError: it returned something else.
    """
    output = fn(*args, **kwargs, evaluation=evaluation)
    if isinstance(output, RolloutFnEvalOutput if evaluation else RolloutFnTrainOutput):
        return output
    if evaluation and isinstance(output, dict):
        return RolloutFnEvalOutput(data=output)
    if not evaluation and isinstance(output, list):
        return RolloutFnTrainOutput(samples=output)
    name = getattr(fn, "__qualname__", repr(fn))
    wanted = "RolloutFnEvalOutput or a dict" if evaluation else "RolloutFnTrainOutput or a list of groups"
    raise TypeError(f"{name}(evaluation={evaluation}) returned {type(output).__name__}; it must return {wanted}.")


def flatten_samples(samples: Iterable[Any]) -> list[Sample]:
    """The samples of nested lists, in order.

    Raises:
        TypeError: something in them is no sample.
    """
    flat: list[Sample] = []
    for item in samples:
        if isinstance(item, list | tuple):
            flat.extend(flatten_samples(item))
        elif isinstance(item, Sample):
            flat.append(item)
        else:
            raise TypeError(
                f"A rollout must consist of Sample objects in lists; found {type(item).__name__}: {item!r}."
            )
    return flat


def validate_rollout_id_annotated(samples: Iterable[Any]) -> None:
    """Check that samples that one call made together say so: siblings share one `rollout_id` that is not None.

    Looked at are lists two levels or more below `samples` (a group's fan-out lists) with more than one sample.

    Raises:
        AssertionError: siblings without a common rollout_id.
    """
    for group in samples:
        if not isinstance(group, list | tuple):
            continue
        for member in group:
            if not isinstance(member, list | tuple):
                continue
            siblings = flatten_samples(member)
            ids = {sample.rollout_id for sample in siblings}
            if len(siblings) > 1 and (len(ids) > 1 or None in ids):
                raise AssertionError(
                    f"{len(siblings)} samples that one generate call returned have the rollout_ids {ids}. "
                    "Set the same rollout_id on all of them (the index of the sample they come from, for example), "
                    "so that together they weigh as one rollout."
                )
