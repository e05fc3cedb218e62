"""Weights handed from trainer to engines on the same GPU: the engines open the trainer's memory, no byte leaves it.

A bucket lies in one buffer. What travels to an SGLang server (`/update_weights_from_tensor`, format
`flattened_bucket`) is that buffer's CUDA IPC handle and where each tensor lies in it. An engine rank can open only
memory of its own GPU, so with several GPUs every trainer rank gets the bucket and makes a handle of its own.
"""

import base64
import pickle
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import reductions

from slime.weight_sync.base import Bucket, WeightEngine
from slime.weight_sync.sync import SenderTransport, on_each

_ALIGNMENT = 256  # bytes; where every tensor starts, so that any dtype can be read there
_DEVICE = 6  # position of the device's index among the arguments of torch's rebuild_cuda_tensor

Handle = tuple[Callable[..., Tensor], tuple[Any, ...]]
"""A function and its arguments that give a [bytes] uint8 tensor over the same memory in another process."""


class IpcEngine(WeightEngine, Protocol):
    """What this transport asks of an engine besides `WeightEngine`."""

    def begin_weight_update(self) -> None: ...

    def end_weight_update(self) -> None: ...

    def update_weights_from_tensor(self, payloads: Sequence[str]) -> None:
        """Load a flattened bucket; one payload a tensor-parallel rank. Returns when the bucket's memory was read."""


class IpcTransport(SenderTransport):
    """Buckets in memory that trainer and engines share. Every trainer rank makes one, and all take part in each bucket.

    A bucket's buffer is never reused: torch keeps exported memory until the engine has closed it.
    """

    def __init__(
        self,
        ranks_of: Callable[[WeightEngine], Sequence[int]],
        *,
        device_index: int | None = 0,
        share: "Callable[[Tensor, int], Handle] | None" = None,
    ) -> None:
        """
        Args:
            ranks_of: the trainer ranks on whose devices an engine's ranks compute, in the order of the engine's ranks.
            device_index: what the engine that computes on this rank's device calls that device; None where no engine
                computes on it.
            share: makes a handle of a [bytes] uint8 tensor for a process that calls the device so; CUDA IPC by default.
        """
        self._ranks_of, self._device_index = ranks_of, device_index
        self._share = share or cuda_handle
        self._engines: Sequence[IpcEngine] = ()
        self._is_open = False

    def connect(self, engines: Sequence[IpcEngine]) -> None:  # type: ignore[override]
        self._engines, self._is_open = list(engines), False

    def send(self, bucket: Bucket, version: str) -> None:
        try:
            if not self._is_open:
                on_each(self._engines, lambda engine: engine.begin_weight_update())
                self._is_open = True
            buffer, layout = flattened(bucket)
        except BaseException:
            self.skip()
            raise
        handles = self._handles(buffer)
        payloads = {
            engine.url: [payload(handles[rank], layout) for rank in self._ranks_of(engine)] for engine in self._engines
        }
        on_each(self._engines, lambda engine: engine.update_weights_from_tensor(payloads[engine.url]))

    def finish(self, version: str) -> None:
        on_each(self._engines, lambda engine: engine.end_weight_update())
        self._is_open = False
        on_each(self._engines, lambda engine: engine.set_weight_version(version))

    def assist(self) -> None:
        if _num_ranks() > 1:
            self._handles(None)

    def skip(self) -> None:
        if _num_ranks() > 1:
            self._handles(torch.empty(0, dtype=torch.uint8, device=_device()))

    def close(self) -> None:
        """Nothing is held open."""

    def _handles(self, buffer: Tensor | None) -> Mapping[int, Handle]:
        """Every rank's handle of its copy of the bucket, on rank 0. Collective; `buffer` is given on rank 0."""
        asked = {rank for engine in self._engines for rank in self._ranks_of(engine)}
        if _num_ranks() > 1:
            buffer, asked = _broadcast(buffer, asked)
        assert buffer is not None
        if buffer.is_cuda:
            torch.cuda.synchronize(buffer.device)  # an engine reads with a stream of its own
        # A handle that nobody opens would keep its memory for ever: only ranks beside an engine of this sync make one.
        own_rank = dist.get_rank() if _num_ranks() > 1 else 0
        serves = self._device_index is not None and own_rank in asked and buffer.numel() > 0
        mine = self._share(buffer, self._device_index or 0) if serves else None
        if _num_ranks() == 1:
            return {} if mine is None else {0: mine}
        everyones: list[Handle | None] | None = [None] * _num_ranks() if dist.get_rank() == 0 else None
        dist.gather_object(mine, everyones)
        return {rank: handle for rank, handle in enumerate(everyones or []) if handle is not None}


def flattened(bucket: Bucket) -> tuple[Tensor, list[SimpleNamespace]]:
    """A bucket's tensors one after another in a new [bytes] uint8 buffer on their device, and where each one lies."""
    layout, size = [], 0
    for name, tensor in bucket:
        num_bytes = tensor.numel() * tensor.element_size()
        layout.append(
            SimpleNamespace(
                name=name,
                shape=tensor.shape,
                dtype=tensor.dtype,
                start_idx=size,
                end_idx=size + num_bytes,
                numel=num_bytes,
            )
        )
        size += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
    buffer = torch.empty(size, dtype=torch.uint8, device=bucket[0][1].device if bucket else "cpu")
    places = [buffer[entry.start_idx : entry.end_idx] for entry in layout]
    parts = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for _, tensor in bucket]
    if parts:
        torch._foreach_copy_(places, parts)
    return buffer, layout


def payload(handle: Handle, layout: Sequence[SimpleNamespace]) -> str:
    """What a server's `/update_weights_from_tensor` takes for one of its ranks: a pickle in base64, as it asks."""
    return base64.b64encode(
        pickle.dumps({"flattened_tensor": _Rebuilt(handle), "metadata": list(layout)}, pickle.HIGHEST_PROTOCOL)
    ).decode()


def cuda_handle(buffer: Tensor, device_index: int) -> Handle:
    """A handle of CUDA memory for a process that calls this device `device_index`."""
    rebuild, arguments = reductions.reduce_tensor(buffer)
    return rebuild, (*arguments[:_DEVICE], device_index, *arguments[_DEVICE + 1 :])


class _Rebuilt:
    """Pickles as a handle's call, so that unpickling gives the tensor."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def __reduce__(self) -> Handle:
        return self._handle


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _device() -> torch.device:
    """Where the trainer's collectives work."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _broadcast(buffer: Tensor | None, asked: set[int]) -> tuple[Tensor, set[int]]:
    """Rank 0's buffer on every rank's device, and the ranks whose handles it asks for."""
    told: list[Any] = [buffer.numel() if buffer is not None else 0, asked]
    dist.broadcast_object_list(told, src=0)
    size, asked = told
    if buffer is None:
        buffer = torch.empty(size, dtype=torch.uint8, device=_device())
    if size:
        dist.broadcast(buffer, src=0)
    return buffer, asked
