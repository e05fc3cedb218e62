"""Weights over a process group beside the trainer's own, which rank 0 sends and engines receive: gloo or NCCL."""

import datetime
import functools
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# No public function makes a second group with members from outside the default one. Engines join with this one; using
# the same function keeps the keys in the store equal on both sides. To be replaced when torch offers a public way.
from torch.distributed.distributed_c10d import Backend, PrefixStore, _abort_process_group, _new_process_group_helper

from slime.utils.rendezvous import tcp_store
from slime.weight_sync.base import Bucket, EngineError, WeightEngine, WeightSyncError
from slime.weight_sync.sync import SenderTransport, on_each

logger = logging.getLogger(__name__)

_LEAVE_S = 30.0  # who has not left a group in this time may be stuck in it for ever
_group_numbers = itertools.count(1)  # torch refuses a name twice in a process, even after a join that failed


class DistributedEngine(WeightEngine, Protocol):
    """What this transport asks of an engine besides `WeightEngine`."""

    def begin_weight_update(self) -> None: ...

    def end_weight_update(self) -> None: ...


class DistributedTransport(SenderTransport):
    """Buckets broadcast from trainer rank 0 to every rank of every engine, across hosts and without files.

    One sync: engines paused and flushed; `begin_weight_update`; for each bucket, `update_weights_from_distributed` on
    all engines at once while this side broadcasts; `end_weight_update`; the version label. An engine answers only when
    it has received, so no call to an engine may come before or without its broadcast.
    """

    def __init__(
        self,
        *,
        backend: str,
        master_address: str,
        free_port: Callable[[], int],
        num_ranks: Callable[[WeightEngine], int] = lambda engine: 1,
        device: str = "cpu",
        timeout_s: float = 300.0,
    ) -> None:
        """
        Args:
            backend: "gloo" (device cpu) or "nccl" (device cuda).
            master_address: an address of this host that the engines reach; the store listens on it alone.
            free_port: finds a free port of this host.
            num_ranks: the tensor- and pipeline-parallel ranks of an engine.
            device: where the backend reads tensors.
            timeout_s: of joining and of each broadcast.
        """
        self._backend, self._master_address, self._free_port = backend, master_address, free_port
        self._num_ranks, self._device, self._timeout_s = num_ranks, device, timeout_s
        self._engines: Sequence[DistributedEngine] = ()
        self._group: WeightGroup | None = None
        self._is_open = False

    def connect(self, engines: Sequence[DistributedEngine]) -> None:  # type: ignore[override]
        """Make a new group with these engines; the one before it, if any, is left first."""
        self._leave()
        self._engines = list(engines)
        offsets, world_size = {}, 1
        for engine in self._engines:
            offsets[engine.url] = world_size
            world_size += self._num_ranks(engine)
        layout: dict[str, Any] = {
            "master_address": self._master_address,
            "master_port": self._free_port(),
            "world_size": world_size,
            "group_name": f"slime-weights-{next(_group_numbers)}",
            "backend": self._backend,
        }
        # A trainer that was restarted meets engines which still know the group of its predecessor.
        on_each(self._engines, lambda engine: engine.destroy_weights_update_group(layout["group_name"]))
        joining = _in_thread(lambda: join(**layout, timeout_s=self._timeout_s))
        self._together(
            joining,
            lambda engine: engine.init_weights_update_group(rank_offset=offsets[engine.url], **layout),
            f"the process group {layout['group_name']} of {world_size} ranks at {self._master_address}",
        )
        self._group = joining.result()

    def send(self, bucket: Bucket, version: str) -> None:
        group = self._group
        assert group is not None, "connect() comes before send()"
        if not self._is_open:
            on_each(self._engines, lambda engine: engine.begin_weight_update())
            self._is_open = True
        bucket = sorted(bucket, key=lambda item: -item[1].element_size())  # each starts where its dtype can be read
        request: dict[str, Any] = {
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "group_name": group.name,
        }
        whole = torch.cat([tensor.detach().reshape(-1).view(torch.uint8).to(self._device) for _, tensor in bucket])
        self._together(
            _in_thread(lambda: group.broadcast([whole])),
            lambda engine: engine.update_weights_from_distributed(**request),
            f"the broadcast of {len(bucket)} tensors of version {version}",
        )

    def finish(self, version: str) -> None:
        on_each(self._engines, lambda engine: engine.end_weight_update())
        self._is_open = False
        on_each(self._engines, lambda engine: engine.set_weight_version(version))

    def close(self) -> None:
        self._leave()

    def _leave(self) -> None:
        """All ranks at once: NCCL's leaving is collective on each host, so an engine asked alone would wait for us."""
        group, self._group, self._is_open = self._group, None, False
        if group is None:
            return
        leaving = {"the trainer": _in_thread(group.close)}
        for engine in self._engines:
            call = functools.partial(engine.destroy_weights_update_group, group.name)
            leaving[f"{engine.name} ({engine.url})"] = _in_thread(call)
        wait(leaving.values(), timeout=_LEAVE_S)
        for who, future in leaving.items():
            if not future.done():
                logger.warning("%s did not leave %s within %g s.", who, group.name, _LEAVE_S)
            elif (error := future.exception()) is not None and not isinstance(error, EngineError):
                raise error
            # An engine that does not answer is gone, and its end of the group with it.

    def _together(self, ours: "Future[Any]", call: Callable[[Any], None], what: str) -> None:
        """Wait for our half and the engines'; the first error ends the wait, since the other half may never end."""
        theirs = [_in_thread(functools.partial(call, engine)) for engine in self._engines]
        done, running = wait([ours, *theirs], timeout=self._timeout_s, return_when=FIRST_EXCEPTION)
        failed = sorted((future for future in done if future.exception() is not None), key=lambda f: f is ours)
        if failed or running:
            group, self._group = self._group, None
            if group is not None:
                wait([_in_thread(group.abort)], timeout=_LEAVE_S)
            names = ", ".join(f"{engine.name} ({engine.url})" for engine in self._engines)
            reason = failed[0].exception() if failed else f"not complete within {self._timeout_s:g} s"
            raise WeightSyncError(f"Weights over {self._backend}: {what} with {names} failed: {reason}") from (
                failed[0].exception() if failed else None
            )


def _in_thread(call: Callable[[], Any]) -> "Future[Any]":
    """Run in a daemon thread: a half that waits for a dead engine must not keep this process from ending."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="weights", daemon=True).start()
    return future


class WeightGroup:
    """This process as rank 0 of a group whose other ranks are engines' ranks."""

    def __init__(self, group: dist.ProcessGroup, store: dist.TCPStore, name: str, *, is_nccl: bool = False) -> None:
        self.name, self._is_nccl = name, is_nccl
        self._group = group
        self._store = store  # rank 0 serves it: it must live as long as the group

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Send [*] contiguous tensors from here to all engines, in order; returns when all are sent.

        They must lie where the backend works: on the CPU for gloo, on this rank's GPU for NCCL.
        """
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        for work in [self._group.broadcast([tensor], options) for tensor in tensors]:
            work.wait()
        if self._is_nccl and tensors:  # till here NCCL has only been told
            torch.cuda.current_stream(tensors[0].device).synchronize()

    def abort(self) -> None:
        """End what is under way: over NCCL a broadcast whose receiver died would stay before all later work."""
        if self._is_nccl:
            self.close()

    def close(self) -> None:
        """Leave the group; engines leave by `destroy_weights_update_group`.

        Over NCCL this ends what is under way and waits for nobody, since another rank may be dead.
        """
        leave = _abort_process_group if self._is_nccl else dist.destroy_process_group
        leave(self._group)


def join(
    *,
    master_address: str,
    master_port: int,
    world_size: int,
    group_name: str,
    backend: str,
    rank: int = 0,
    timeout_s: float = 300.0,
) -> WeightGroup:
    """Make the group, as rank 0 by default; returns when all `world_size` ranks are there.

    Engines must be asked to join at the same time, from other threads: each of their answers waits for this side.

    Args:
        master_address: where rank 0 listens, as engines reach it.
        world_size: 1 + the number of the engines' ranks; engine i starts at rank 1 + the ranks of those before it.
        backend: "gloo" or "nccl".

    Raises:
        torch.distributed.DistStoreError: some rank did not come within `timeout_s`.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    store = tcp_store(master_address, master_port, rank=rank, world_size=world_size, timeout=timeout)
    group, _ = _new_process_group_helper(
        world_size,
        rank,
        [],
        Backend(backend),
        PrefixStore(group_name, store),
        group_name=group_name,
        timeout=timeout,
    )
    # torch asks for the ranks of every group that it destroys.
    dist.distributed_c10d._world.pg_group_ranks[group] = {member: member for member in range(world_size)}
    return WeightGroup(group, store, group_name, is_nccl=backend == "nccl")
