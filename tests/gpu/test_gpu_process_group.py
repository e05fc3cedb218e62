"""Weights over NCCL from one GPU to another, to an engine that lives, and past one that died."""

from collections.abc import Iterator

import pytest
import torch

from slime.utils.processes import free_port
from slime.weight_sync.process_group import DistributedTransport
from tests.unit.sglang.test_process_group import HOST, EngineInAnotherProcess

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each rank: two"),
]


@pytest.fixture
def transport(monkeypatch: pytest.MonkeyPatch) -> Iterator[DistributedTransport]:
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "0")
    transport = DistributedTransport(
        backend="nccl", master_address=HOST, free_port=free_port, device="cuda", timeout_s=60
    )
    yield transport
    transport.close()


def assert_arrives(transport: DistributedTransport, engine: EngineInAnotherProcess) -> None:
    weights = [("a", torch.randn(1 << 24, device="cuda").bfloat16()), ("b", torch.randn(3, 5, device="cuda"))]
    transport.send(weights, "1")
    transport.finish("1")
    for name, tensor in weights:
        assert torch.equal(engine.received[name], tensor.cpu())


def test_weights_arrive_before_and_after_an_engine_was_started_again(transport: DistributedTransport) -> None:
    """The first leaves properly, the second is killed; who waits for either for ever runs into the test's timeout."""
    first = EngineInAnotherProcess(0, gpu=1)
    transport.connect([first])
    assert_arrives(transport, first)
    transport.connect([first])
    assert_arrives(transport, first)
    first.close()
    second = EngineInAnotherProcess(0, gpu=1)
    transport.connect([second])
    assert_arrives(transport, second)
    second.kill()
    third = EngineInAnotherProcess(0, gpu=1)
    transport.connect([third])
    assert_arrives(transport, third)
    third.close()
