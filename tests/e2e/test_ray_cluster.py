"""A run joins a Ray cluster that runs already, as a Ray job does: two nodes, both of this machine."""

import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ray_nodes import ray_cluster

from .conftest import Train

DEVICES_OF_A_NODE = 2


@pytest.fixture
def ray_address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A cluster of two nodes with two CPU devices each; whoever joins it needs its token, which is in os.environ."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)  # importing slime.ray set it in this process
    node = ["--num-gpus", "0", "--resources", json.dumps({"cpu_device": DEVICES_OF_A_NODE})]
    with ray_cluster(os.environ, node, node) as address:
        yield address


@pytest.mark.timeout(600)
def test_a_run_uses_the_devices_of_a_cluster_that_it_joins(
    ray_address: str, train: Train, tiny_flags: list[str], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three devices, which no node has alone. Paths are given from the folder in which the run is started."""
    monkeypatch.setenv("RAY_ADDRESS", ray_address)
    job = {"runtime_env": {"env_vars": {"PYTHONPATH": str(repository)}}, "metadata": {}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    from_here = [os.path.relpath(word, repository) if os.path.isabs(word) else word for word in tiny_flags]
    words = [*from_here, "--device", "cpu", "--num-rollout", "2"]

    run = train([*words, "--actor-num-nodes", "2"])
    assert len(run.column("train/grad_norm")) == 2
    processes = json.loads((run.folder / "status.json").read_text())["processes"]
    assert sum(process["role"] == "trainer" for process in processes) == 2

    refused = train([*words, "--actor-num-nodes", "4"], expect_exit_code=1)
    assert "This run needs 5 CPU devices and the Ray cluster has 4 on this host" in refused.output
