"""`--rollout-sample-hook-path`: functions that look at or change each sample between generation and reward."""

import inspect
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from slime.utils.misc import load_function
from slime.utils.types import Sample

_current_rollout_id: int | None = None


def set_current_rollout_id(rollout_id: int | None) -> None:
    """Tell hooks which rollout is being made."""
    global _current_rollout_id
    _current_rollout_id = rollout_id


def get_current_rollout_id() -> int | None:
    return _current_rollout_id


async def apply_rollout_sample_hooks(args: Namespace, value: Any, **kwargs: Any) -> Any:
    """Run every hook on each sample of `value`, in the order of the flags.

    Args:
        value: a sample, or lists of samples.
        kwargs: offered to the hooks (`evaluation`); each gets those that its signature takes, and `rollout_id`.

    Returns:
        `value` with the samples that hooks returned in place of theirs.

    Raises:
        TypeError: a hook returned something that is neither a sample nor None.
    """
    paths = getattr(args, "rollout_sample_hook_path", None) or []
    if not paths:
        return value
    kwargs.setdefault("rollout_id", _current_rollout_id)
    return await _apply([(path, load_function(path)) for path in paths], args, value, kwargs)


async def _apply(
    hooks: list[tuple[str, Callable[..., Any]]], args: Namespace, value: Any, kwargs: dict[str, Any]
) -> Any:
    if isinstance(value, list):
        return [await _apply(hooks, args, item, kwargs) for item in value]
    for path, hook in hooks:
        result = hook(args, value, **_accepted(hook, kwargs))
        if inspect.isawaitable(result):
            result = await result
        if result is None:
            continue
        if not isinstance(result, Sample):
            raise TypeError(
                f"The sample hook {path!r} returned {type(result).__name__}; it must return the sample, or None "
                "after changing it in place."
            )
        value = result
    return value


def _accepted(function: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of `kwargs` that the function's signature takes."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return kwargs
    return {name: value for name, value in kwargs.items() if name in parameters}
