"""A run joins a Ray cluster that runs already, as a Ray job does: two nodes, both of this machine."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from slime.utils.processes import free_port
from tests.run_processes import wait_until

from .conftest import Train

DEVICES_OF_A_NODE = 2
START_TIMEOUT_S = 120


@pytest.fixture
def ray_address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A cluster of two nodes with two CPU devices each; whoever joins it needs its token, which is in os.environ."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)  # importing slime.ray set it in this process
    address = f"127.0.0.1:{free_port()}"
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: names of sockets have a limit
    head = ["--head", "--port", address.rpartition(":")[2], "--temp-dir", str(folder), "--include-dashboard", "false"]
    nodes = [ray_node(folder / "head.log", *head, "--ray-client-server-port", str(free_port()))]
    try:
        wait_for_node(nodes[0], folder / "head.log")
        nodes.append(ray_node(folder / "other.log", "--address", address))
        wait_for_node(nodes[1], folder / "other.log")
        yield address
        assert [node.poll() for node in nodes] == [None, None], "a run ended a cluster that was not its own"
    finally:
        for node in reversed(nodes):
            node.terminate()
            node.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def ray_node(log: Path, *words: str) -> "subprocess.Popen[bytes]":
    """`ray start --block`, which ends its node when it is ended."""
    resources = json.dumps({"cpu_device": DEVICES_OF_A_NODE})
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *words]
    command += ["--num-cpus", "16", "--num-gpus", "0", "--resources", resources, "--node-ip-address", "127.0.0.1"]
    command += ["--object-store-memory", "200000000"]
    with log.open("wb") as output:  # from another folder than the run's: its paths are meant from there
        return subprocess.Popen(command, cwd=log.parent, stdout=output, stderr=output)


def wait_for_node(node: "subprocess.Popen[bytes]", log: Path) -> None:
    def is_up() -> bool:
        assert node.poll() is None, log.read_text()
        return "Ray runtime started" in log.read_text()

    wait_until(is_up, START_TIMEOUT_S)


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
