"""Which transport a run's weight sync gets, and that it still knows an engine that was started again."""

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from slime.backends.sglang.client import SGLangClient
from slime.ray import weights
from slime.ray.engine_actor import EngineRecord
from slime.ray.weights import _ipc_transport, _transport

ENGINES = [
    EngineRecord("engine 0", "http://127.0.0.1:20001", "sglang", 2, "/w", 0),
    EngineRecord("engine 1", "http://127.0.0.1:20002", "sglang", 2, "/w", 2),
]


def started_again(record: EngineRecord) -> Any:
    """A client of what runs in the engine's place now: at another address."""
    client = dataclasses.replace(record, url="http://127.0.0.1:29999").client()
    assert isinstance(client, SGLangClient)
    return client


def test_an_engine_that_was_started_again_has_as_many_ranks_in_the_process_group(tmp_path: Path) -> None:
    args = Namespace(update_weight_transport="nccl", colocate=False, device="cpu")
    transport: Any = _transport(args, ENGINES, rank=0)
    assert transport._num_ranks(started_again(ENGINES[1])) == 2


@pytest.mark.parametrize(
    ("engine", "of_ray", "meeting"),
    [
        ("http://127.0.0.1:20001", "127.0.0.1", "127.0.0.1"),
        ("http://127.0.0.1:20001", "10.0.0.5", "127.0.0.1"),
        ("http://10.0.0.9:20001", "10.0.0.5", "10.0.0.5"),
        ("http://10.0.0.9:20001", "127.0.0.1", "10.0.0.7"),
    ],
    ids=["one machine", "a cluster of one node", "several nodes", "an engine elsewhere, Ray on this machine"],
)
def test_engines_meet_the_trainer_where_they_reach_it(
    engine: str, of_ray: str, meeting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights.ray.util, "get_node_ip_address", lambda: of_ray)
    monkeypatch.setenv("SLIME_HOST_IP", "10.0.0.7")
    args = Namespace(update_weight_transport="nccl", colocate=False, device="cuda")
    transport: Any = _transport(args, [dataclasses.replace(ENGINES[0], url=engine)], rank=0)
    assert transport._master_address == meeting


@pytest.mark.parametrize(("rank", "device_index"), [(0, 0), (1, 1), (2, 0), (3, 1), (4, None)])
def test_an_engine_that_was_started_again_still_shares_its_devices_with_the_same_ranks(
    rank: int, device_index: int | None
) -> None:
    """Two engines of two devices; a fifth trainer rank shares none."""
    transport: Any = _ipc_transport(ENGINES, rank, devices_per_node=8)
    assert transport._device_index == device_index
    assert list(transport._ranks_of(started_again(ENGINES[1]))) == [2, 3]


@pytest.mark.parametrize(("rank", "device_index"), [(0, 0), (7, 7), (8, 0), (15, 7)])
def test_a_server_on_two_nodes_counts_the_devices_of_each_from_zero(rank: int, device_index: int) -> None:
    engine = EngineRecord("engine 0", "http://127.0.0.1:20001", "sglang", 16, "/w", 0)
    transport: Any = _ipc_transport([engine], rank, devices_per_node=8)
    assert transport._device_index == device_index
