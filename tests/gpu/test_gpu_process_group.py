"""Weights over NCCL from one GPU to another (where there is one: to itself), to an engine that lives, past one that
died."""

from collections.abc import Iterator

import pytest
import torch

from slime.utils.processes import free_port
from slime.weight_sync.process_group import DistributedTransport
from tests.gpu.ranks import environment_of_rank, share_one
from tests.unit.sglang.test_process_group import HOST, EngineInAnotherProcess

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@pytest.fixture
def transport(monkeypatch: pytest.MonkeyPatch) -> Iterator[DistributedTransport]:
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "0")
    if share_one():  # both processes import this and so began before tests/gpu/a_host_each could speak for them
        monkeypatch.setenv("NCCL_HOSTID", "trainer")
    transport = DistributedTransport(
        backend="nccl", master_address=HOST, free_port=free_port, device="cuda", timeout_s=60
    )
    yield transport
    transport.close()


def engine_on_gpu() -> EngineInAnotherProcess:
    host = {"NCCL_HOSTID": "engine"} if share_one() else {}
    return EngineInAnotherProcess(0, gpu=environment_of_rank(1) | host)


def assert_arrives(transport: DistributedTransport, engine: EngineInAnotherProcess) -> None:
    weights = [("a", torch.randn(1 << 24, device="cuda").bfloat16()), ("b", torch.randn(3, 5, device="cuda"))]
    transport.send(weights, "1")
    transport.finish("1")
    for name, tensor in weights:
        assert torch.equal(engine.received[name], tensor.cpu())


def test_weights_arrive_before_and_after_an_engine_was_started_again(transport: DistributedTransport) -> None:
    """The first leaves properly, the second is killed; who waits for either for ever runs into the test's timeout."""
    first = engine_on_gpu()
    transport.connect([first])
    assert_arrives(transport, first)
    transport.connect([first])
    assert_arrives(transport, first)
    first.close()
    second = engine_on_gpu()
    transport.connect([second])
    assert_arrives(transport, second)
    second.kill()
    third = engine_on_gpu()
    transport.connect([third])
    assert_arrives(transport, third)
    third.close()
