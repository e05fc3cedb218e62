"""Runs coroutines from ordinary code, on one background event loop that lives as long as the process."""

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _LoopThread:
    """An event loop in a daemon thread of its own."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, name="slime-async", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()


_lock = threading.Lock()
_loop_thread: _LoopThread | None = None


def _get_loop_thread() -> _LoopThread:
    global _loop_thread
    with _lock:
        # A forked child inherits the object but not the thread behind it.
        if _loop_thread is None or _loop_thread.pid != os.getpid():
            _loop_thread = _LoopThread()
        return _loop_thread


def get_async_loop() -> asyncio.AbstractEventLoop:
    """The background loop; started by the first call."""
    return _get_loop_thread().loop


def run(coro: Coroutine[Any, Any, T]) -> T:
    """Run `coro` on the background loop and wait for its result; cancels it if the waiting is interrupted.

    Raises:
        RuntimeError: called from the background loop itself, where waiting would never end.
    """
    background = _get_loop_thread()
    if threading.current_thread() is background.thread:
        coro.close()
        raise RuntimeError("run() was called on the loop that it would wait for. Write `await coro` here.")
    future = asyncio.run_coroutine_threadsafe(coro, background.loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise
