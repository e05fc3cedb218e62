"""Runs a function on gloo ranks that are forked from one process in which Megatron is imported already.

Importing torch and Megatron takes ten seconds, a fork a few milliseconds. So one template process is forked a test run;
it installs the CPU accelerator (which changes names inside torch, and must not touch the process of pytest), imports
the trainer, and forks fresh ranks for every call. No state is left from one test to the next.
"""

import contextlib
import functools
import multiprocessing
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

_fork = multiprocessing.get_context("fork")
_GRACE_S = 5.0


class RankError(AssertionError):
    """A rank raised, died or did not answer; the message holds its traceback."""


class RankPool:
    """A template process and the verb `run`."""

    def __init__(self) -> None:
        self._connection, theirs = _fork.Pipe()
        self._template = _fork.Process(target=_serve, args=(theirs, self._connection), daemon=False)
        self._template.start()
        theirs.close()

    def run(self, function: Callable[..., Any], world_size: int = 1, *args: Any, timeout_s: float = 120.0) -> list[Any]:
        """Call `function(rank, world_size, port, *args)` on every rank and return what they return, in order.

        Args:
            function: at the top level of a module; what it needs of megatron it imports itself.
            world_size: number of ranks.
            args: picklable.
            timeout_s: after this, ranks are killed and the error names those that had not answered.
        """
        self._connection.send_bytes(pickle.dumps((function, world_size, args, timeout_s)))
        results = pickle.loads(self._connection.recv_bytes())
        errors = [f"rank {rank} of {world_size}: {text}" for rank, (is_ok, text) in enumerate(results) if not is_ok]
        if errors:
            raise RankError("\n".join(errors))
        return [value for _, value in results]

    def close(self) -> None:
        self._connection.close()
        self._template.join(_GRACE_S)
        if self._template.is_alive():
            self._template.kill()
            self._template.join()


@functools.cache
def pool() -> RankPool:
    """The pool of this test run."""
    return RankPool()


def close_pool() -> None:
    if pool.cache_info().currsize:
        pool().close()
        pool.cache_clear()


def _serve(connection: Connection, other_end: Connection) -> None:
    """The template: import once, then fork ranks for every request until pytest is gone."""
    other_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    torch.set_num_threads(1)  # before any work: a forked OpenMP team hangs
    from slime.backends.megatron.accelerator import accelerator_for

    accelerator_for("cpu").install()
    import slime.backends.megatron.job  # noqa: F401

    with contextlib.suppress(EOFError):
        while True:
            connection.send_bytes(pickle.dumps(_run_ranks(*pickle.loads(connection.recv_bytes()))))


def _run_ranks(
    function: Callable[..., Any], world_size: int, args: tuple[Any, ...], timeout_s: float
) -> list[tuple[bool, Any]]:
    port = _free_port()
    ranks: list[tuple[Any, Connection]] = []
    for rank in range(world_size):
        ours, theirs = _fork.Pipe(duplex=False)
        process = _fork.Process(target=_rank, args=(theirs, function, rank, world_size, port, args))
        process.start()
        theirs.close()
        ranks.append((process, ours))
    return _collect(ranks, timeout_s)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _collect(ranks: list[tuple[Any, Connection]], timeout_s: float) -> list[tuple[bool, Any]]:
    """What every rank answered; once one has failed the others get a few seconds more."""
    results: list[tuple[bool, Any]] = [(False, f"no answer within {timeout_s:.0f} s")] * len(ranks)
    waiting = {connection: rank for rank, (_, connection) in enumerate(ranks)}
    deadline = time.monotonic() + timeout_s
    while waiting and time.monotonic() < deadline:
        for connection in wait(list(waiting), max(deadline - time.monotonic(), 0)):
            rank = waiting.pop(connection)
            try:
                results[rank] = pickle.loads(connection.recv_bytes())
            except EOFError:
                ranks[rank][0].join(_GRACE_S)
                results[rank] = (False, f"died with exit code {ranks[rank][0].exitcode}")
            if not results[rank][0]:
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    for process, _ in ranks:
        process.join(0.5)
        if process.is_alive():
            process.kill()
            process.join()
    return results


def _rank(
    connection: Connection,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    args: tuple[Any, ...],
) -> None:
    try:
        result = (True, function(rank, world_size, port, *args))
    except BaseException:
        result = (False, traceback.format_exc())
    connection.send_bytes(pickle.dumps(result))
    connection.close()
    os._exit(0)  # no clean-up of threads and groups that belong to the template
