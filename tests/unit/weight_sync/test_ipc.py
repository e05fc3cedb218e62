"""Buckets in shared memory: what an engine's ranks unpickle is the bucket, whichever trainer rank's memory it is in.

CUDA's handles need a GPU; here a handle carries the bytes, so that the format and the order of calls are tested.
"""

import base64
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from slime.weight_sync.base import EngineError
from slime.weight_sync.ipc import Handle, IpcTransport, flattened
from slime.weight_sync.sync import WeightSync
from tests.distributed.pool import RankPool

BUCKETS = [
    [("half", torch.arange(7, dtype=torch.bfloat16)), ("turned", torch.arange(12.0).reshape(3, 4).t())],
    [("byte", torch.arange(5, dtype=torch.uint8)), ("single", torch.tensor([1.5]))],
]


def by_value(buffer: Tensor, device_index: int) -> Handle:
    """A handle that carries the bytes, and whose first one tells which device it was made for."""
    return _rebuilt, (buffer.tolist(), device_index)


def _rebuilt(values: list[int], device_index: int) -> Tensor:
    tensor = torch.tensor(values, dtype=torch.uint8)
    tensor.device_index = device_index  # type: ignore[attr-defined]
    return tensor


class FakeEngine:
    """Loads payloads as SGLang's tensor-parallel ranks do."""

    def __init__(self, url: str) -> None:
        self.name = self.url = url
        self.log: list[str] = []
        self.loaded: list[dict[str, Tensor]] = []
        self.devices: list[int] = []
        self.fails: str | None = None

    def begin_weight_update(self) -> None:
        self._fail_at("begin")
        self.log.append("begin")

    def end_weight_update(self) -> None:
        self.log.append("end")

    def set_weight_version(self, version: str) -> None:
        self.log.append(f"version {version}")

    def update_weights_from_tensor(self, payloads: list[str]) -> None:
        self._fail_at("load")
        self.log.append(f"load on {len(payloads)}")
        for payload in payloads:
            bucket = pickle.loads(base64.b64decode(payload))
            whole = bucket["flattened_tensor"]
            self.devices.append(whole.device_index)
            self.loaded.append({entry.name: tensor_at(whole, entry) for entry in bucket["metadata"]})

    def pause(self, mode: str = "abort") -> None:
        self._fail_at("pause")

    def flush_cache(self, *, only_if_idle: bool = False) -> None:
        """Nothing is cached."""

    def _fail_at(self, call: str) -> None:
        if self.fails == call:
            raise EngineError(f"{self.name} is out of order")


class Source:
    """The trainer's weights as one rank gives them: whole on rank 0, empty buckets elsewhere."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def buckets(self, size_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
        yield from BUCKETS if self._rank == 0 else [[] for _ in BUCKETS]


class Digests:
    """Says what it was told to say: that it can take no more, or nothing."""

    def __init__(self, fails: bool) -> None:
        self._fails = fails

    def add(self, bucket: Any) -> None:
        if self._fails:
            raise EngineError("no room for a digest")


def tensor_at(whole: Tensor, entry: SimpleNamespace) -> Tensor:
    return whole[entry.start_idx : entry.end_idx].view(entry.dtype).reshape(entry.shape)


def assert_same(loaded: dict[str, Tensor], bucket: list[tuple[str, Tensor]]) -> None:
    assert list(loaded) == [name for name, _ in bucket]
    for name, tensor in bucket:
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)


def test_a_bucket_of_several_dtypes_is_laid_out_so_that_each_can_be_read() -> None:
    for bucket in BUCKETS:
        buffer, layout = flattened(bucket)
        assert_same({entry.name: tensor_at(buffer, entry) for entry in layout}, bucket)


def test_one_rank_hands_over_every_bucket_and_then_the_version() -> None:
    engine = FakeEngine("a")
    transport = IpcTransport(lambda _: [0], share=by_value)
    transport.connect([engine])
    for version in ("1", "2"):
        for bucket in BUCKETS:
            transport.send(bucket, version)
        transport.finish(version)
    steps = ["begin", "load on 1", "load on 1", "end"]
    assert engine.log == [*steps, "version 1", *steps, "version 2"]
    for loaded, bucket in zip(engine.loaded, [*BUCKETS, *BUCKETS], strict=True):
        assert_same(loaded, bucket)


def _on_a_rank(rank: int, world_size: int, port: int) -> Any:
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=rank, world_size=world_size, init_method=f"tcp://127.0.0.1:{port}")
    try:
        # Engine a computes on the devices of ranks 0 and 1, engine b on that of rank 2; rank 3 trains alone.
        places: dict[int, int | None] = {0: 0, 1: 1, 2: 0, 3: None}
        transport = IpcTransport(lambda e: {"a": [0, 1], "b": [2]}[e.url], device_index=places[rank], share=by_value)
        if rank:
            for _ in BUCKETS:
                transport.assist()
            return None
        engines = [FakeEngine("a"), FakeEngine("b")]
        transport.connect(engines)
        for bucket in BUCKETS:
            transport.send(bucket, "1")
        return [(engine.log, engine.devices, engine.loaded) for engine in engines]
    finally:
        dist.barrier()
        dist.destroy_process_group()


def test_each_rank_of_an_engine_gets_the_memory_of_its_own_device(ranks: RankPool) -> None:
    (log_a, devices_a, loaded_a), (log_b, devices_b, loaded_b) = ranks.run(_on_a_rank, 4)[0]
    assert log_a == ["begin", "load on 2", "load on 2"] and devices_a == [0, 1, 0, 1]
    assert log_b == ["begin", "load on 1", "load on 1"] and devices_b == [0, 0]
    for i, bucket in enumerate(BUCKETS):
        for loaded in (loaded_a[2 * i], loaded_a[2 * i + 1], loaded_b[i]):
            assert_same(loaded, bucket)


def _sync_that_fails(rank: int, world_size: int, port: int, where: str) -> str | None:
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=rank, world_size=world_size, init_method=f"tcp://127.0.0.1:{port}")
    try:
        engine = FakeEngine("b")
        engine.fails = where
        sync = WeightSync(
            Source(rank), transport=IpcTransport(lambda _: [0], device_index=0 if rank == 0 else None, share=by_value),
            expected_digests=lambda: Digests(where == "digest"), bucket_size_bytes=1, is_sender=rank == 0,
        )  # fmt: skip
        sync.connect([engine] if rank == 0 else [])
        try:
            sync.sync(1)
        except EngineError as error:
            return str(error)
        return None
    finally:
        dist.barrier()  # all ranks come here, or the pool says who did not
        dist.destroy_process_group()


@pytest.mark.parametrize("where", ["pause", "begin", "digest", "load"])
def test_wherever_a_sync_fails_no_rank_is_left_waiting(ranks: RankPool, where: str) -> None:
    words = "no room for a digest" if where == "digest" else "b is out of order"
    assert ranks.run(_sync_that_fails, 3, where, timeout_s=60) == [words, None, None]


def test_only_ranks_beside_an_engine_of_this_sync_export_memory(ranks: RankPool) -> None:
    """A handle that nobody opens would keep the bucket's memory for as long as the process lives."""
    assert ranks.run(_exports, 3) == [0, 2, 0]


def _exports(rank: int, world_size: int, port: int) -> int:
    import torch.distributed as dist

    exported = []

    def share(buffer: Tensor, device_index: int) -> Handle:
        exported.append(buffer.numel())
        return by_value(buffer, device_index)

    dist.init_process_group("gloo", rank=rank, world_size=world_size, init_method=f"tcp://127.0.0.1:{port}")
    try:
        transport = IpcTransport(lambda _: [1], device_index=0, share=share)
        if rank == 0:
            transport.connect([FakeEngine("restarted")])
        for bucket in BUCKETS:
            transport.send(bucket, "1") if rank == 0 else transport.assist()
        return len(exported)
    finally:
        dist.barrier()
        dist.destroy_process_group()
