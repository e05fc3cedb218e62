"""The background loop: results, errors and the one mistake that would wait for ever."""

import asyncio
import threading

import pytest

from slime.utils.async_utils import get_async_loop, run


def test_a_coroutine_runs_on_one_loop_of_another_thread():
    async def where():
        return asyncio.get_running_loop(), threading.current_thread()

    loop, thread = run(where())
    assert loop is get_async_loop()
    assert thread is not threading.current_thread()
    assert run(where()) == (loop, thread)


def test_errors_reach_the_caller():
    async def fails():
        raise KeyError("seen")

    with pytest.raises(KeyError, match="seen"):
        run(fails())


def test_waiting_on_the_loop_itself_is_refused():
    async def inner():
        return 1

    async def outer():
        return run(inner())

    with pytest.raises(RuntimeError, match="await coro"):
        run(outer())
