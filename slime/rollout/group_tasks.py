"""Groups and samples in flight as tasks: waited for, told apart, cancelled together."""

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any

from slime.utils.types import Sample


async def named(sample: Any, coro: Coroutine[Any, Any, Any]) -> Any:
    """An error on its way up learns which sample it was about."""
    try:
        return await coro
    except Exception as error:
        if isinstance(sample, Sample):
            error.add_note(f"while making sample {sample.index} of prompt {sample.group_index}")
        raise


async def gather_or_cancel(coros: list[Coroutine[Any, Any, Any]]) -> list[Any]:
    """All results in order; the first error cancels the others and is raised when they have ended."""
    tasks = [asyncio.ensure_future(coro) for coro in coros]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        await cancel(tasks)
        raise


async def cancel(tasks: Iterable["asyncio.Task[Any]"]) -> None:
    """Cancel all, and wait until they have ended."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def next_finished(pendings: "set[asyncio.Task[list[Any]]]", *, in_order: bool) -> "list[asyncio.Task[list[Any]]]":
    """Wait for the groups that are judged next: whichever have finished or, in order, the one that was started first.

    An error of a group comes up when it is its turn; in order too, so that it ends every run at the same place.
    """
    tasks = sorted(pendings, key=task_number)
    done, _ = await asyncio.wait(tasks[:1] if in_order else tasks, return_when=asyncio.FIRST_COMPLETED)
    return sorted(done, key=task_number)


def task_name(number: int) -> str:
    """Of the task that makes the rollout's drawn group with this number."""
    return f"group-{number}"


def task_number(task: "asyncio.Task[Any]") -> int:
    """Which of the rollout's drawn groups a task makes, from 0, in the order of their start."""
    return int(task.get_name().rpartition("-")[2])
