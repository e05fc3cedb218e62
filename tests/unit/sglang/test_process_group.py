"""Weights over gloo: an engine in another process receives what the trainer's side broadcasts, or says why not."""

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest
import torch

from slime.utils.processes import free_port
from slime.weight_sync import process_group
from slime.weight_sync.base import EngineError, WeightSyncError
from slime.weight_sync.process_group import DistributedTransport, WeightGroup, join

HOST = "127.0.0.1"
pytestmark = pytest.mark.usefixtures("ranks")
"""The pool of other tests is forked first: ranks that are forked beside the threads of a group here hang."""


def receive(group: WeightGroup, device, names, dtypes, shapes, group_name) -> dict[str, torch.Tensor]:
    """One broadcast of all bytes, read as SGLang reads a flattened bucket."""
    sizes = [
        torch.Size(shape).numel() * getattr(torch, dtype).itemsize for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    whole = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    group.broadcast([whole])
    return {
        name: part.cpu().view(getattr(torch, dtype)).reshape(shape)
        for name, part, dtype, shape in zip(names, whole.split(sizes), dtypes, shapes, strict=True)
    }


def serve(calls: Connection, gpu: dict[str, str] | None) -> None:
    """The engine's process: joins groups, and gives back what it receives."""
    os.environ.update(gpu or {})
    groups: dict[str, WeightGroup] = {}
    while (call := calls.recv()) is not None:
        name, arguments = call
        try:
            if name == "join":
                groups[arguments["group_name"]] = join(**arguments, timeout_s=30)
                calls.send(None)
            elif name == "leave":
                if arguments in groups:
                    groups.pop(arguments).close()
                calls.send(None)
            else:
                calls.send(receive(groups[arguments["group_name"]], "cpu" if gpu is None else "cuda", **arguments))
        except Exception as error:
            calls.send(error)


class EngineInAnotherProcess:
    """What `DistributedTransport` asks of an engine, answered by `serve` in another process: on a CPU, or on the GPU
    that these variables give it."""

    def __init__(self, index: int, gpu: dict[str, str] | None = None) -> None:
        self.name, self.url = f"engine {index}", f"http://{HOST}:{index}"
        self.received: dict[str, torch.Tensor] = {}
        self.log: list[str] = []
        self.refuses: str | None = None
        context = multiprocessing.get_context("fork" if gpu is None else "spawn")
        self._calls, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, gpu), daemon=True)
        self._process.start()
        theirs.close()

    def _ask(self, name, arguments):
        self.log.append(name)
        if self.refuses == name:
            raise EngineError(f"{self.name} ({self.url}) was asked to {name}: 400 no")
        try:
            self._calls.send((name, arguments))
            answer = self._calls.recv()
        except (EOFError, OSError) as error:
            raise EngineError(f"{self.name} ({self.url}) was asked to {name}: no connection") from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def init_weights_update_group(self, *, rank_offset, **layout):
        self._ask("join", {**layout, "rank": rank_offset})

    def update_weights_from_distributed(self, **request):
        self.received |= self._ask("receive", request)

    def destroy_weights_update_group(self, group_name):
        self._ask("leave", group_name)

    def begin_weight_update(self):
        self.log.append("begin")

    def end_weight_update(self):
        self.log.append("end")

    def set_weight_version(self, version):
        self.log.append(f"version {version}")

    def kill(self):
        self._process.kill()
        self._process.join()

    def close(self):
        with contextlib.suppress(OSError):
            self._calls.send(None)
        self._process.join(5)
        self.kill()


@pytest.fixture
def engines() -> Iterator[list[EngineInAnotherProcess]]:
    engines = [EngineInAnotherProcess(index) for index in range(2)]
    yield engines
    for engine in engines:
        engine.close()


@pytest.fixture
def transport() -> Iterator[DistributedTransport]:
    transport = DistributedTransport(backend="gloo", master_address=HOST, free_port=free_port, timeout_s=30)
    yield transport
    transport.close()


def test_every_engine_receives_every_tensor_bit_for_bit(engines, transport):
    torch.manual_seed(0)
    weights = [("b", torch.randn(7).bfloat16()), ("a", torch.randn(3, 5)), ("c", torch.randn(4, 4).t())]
    transport.connect(engines)
    transport.send(weights[:2], "3")
    transport.send(weights[2:], "3")
    transport.finish("3")
    for engine in engines:
        assert engine.log == ["leave", "join", "begin", "receive", "receive", "end", "version 3"]
        for name, tensor in weights:
            assert engine.received[name].dtype == tensor.dtype
            assert torch.equal(engine.received[name], tensor)


def test_another_set_of_engines_gets_a_new_group(engines, transport):
    transport.connect(engines[:1])
    transport.connect(engines)
    transport.send([("a", torch.ones(2))], "1")
    assert all(torch.equal(engine.received["a"], torch.ones(2)) for engine in engines)


def test_all_ranks_leave_a_group_at_once(engines, transport, monkeypatch):
    """NCCL's leaving is collective on each host: an engine that is asked alone would wait for the trainer for ever."""
    everyone = threading.Barrier(3, timeout=10)
    close = WeightGroup.close

    def close_with_the_others(group):
        everyone.wait()
        close(group)

    monkeypatch.setattr(WeightGroup, "close", close_with_the_others)
    transport.connect(engines)
    for engine in engines:
        monkeypatch.setattr(engine, "destroy_weights_update_group", lambda name: everyone.wait())
    transport.close()
    assert not everyone.broken


def test_an_engine_that_died_or_is_stuck_does_not_keep_the_others_from_a_new_group(engines, transport, monkeypatch):
    monkeypatch.setattr(process_group, "_LEAVE_S", 0.2)
    transport.connect(engines)
    never = threading.Event()
    monkeypatch.setattr(engines[0], "destroy_weights_update_group", lambda name: never.wait(30))
    engines[1].refuses = "leave"
    transport.close()
    engines[1].refuses = None
    transport.connect(engines[1:])
    transport.send([("a", torch.ones(2))], "1")
    assert torch.equal(engines[1].received["a"], torch.ones(2))
    never.set()


def test_a_refusal_ends_the_sync_at_once_with_the_engines_words(engines, transport):
    """Our half of the broadcast would wait for the engine until the timeout; the error does not."""
    transport.connect(engines[:1])
    started = time.monotonic()
    engines[0].refuses = "receive"
    with pytest.raises(WeightSyncError, match=r"broadcast of 1 tensors of version 2 with engine 0 .*asked to receive"):
        transport.send([("a", torch.ones(2))], "2")
    assert time.monotonic() - started < 15


def test_an_engine_that_does_not_join_is_an_error_that_names_the_engines(engines):
    transport = DistributedTransport(backend="gloo", master_address=HOST, free_port=free_port, timeout_s=30)
    engines[1].refuses = "join"
    started = time.monotonic()
    with pytest.raises(
        WeightSyncError, match=r"group slime-weights-\d+ of 3 ranks .* with engine 0 .*, engine 1 .*asked to join"
    ):
        transport.connect(engines)
    assert time.monotonic() - started < 15
