"""Runs coroutines from ordinary code, on one background event loop that lives as long as the process."""

import asyncio
import os
import threading
import weakref
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


class LoopSemaphore:
    """A semaphore for coroutines of any event loop: each loop has one of its own with the whole limit.

    An `asyncio.Semaphore` belongs to the first loop that has to wait for it, and raises in any other.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._own: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = weakref.WeakKeyDictionary()

    def _of_this_loop(self) -> asyncio.Semaphore:
        return self._own.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self._limit))

    async def acquire(self) -> bool:
        return await self._of_this_loop().acquire()

    def release(self) -> None:
        self._of_this_loop().release()

    def locked(self) -> bool:
        return self._of_this_loop().locked()

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(self, *_: object) -> None:
        self.release()
