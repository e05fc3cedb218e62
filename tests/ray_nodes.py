"""A Ray cluster that is no run's own: nodes of this machine, started as `ray start` starts them."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from slime.utils.processes import free_port
from tests.run_processes import wait_until

START_TIMEOUT_S = 120


@contextmanager
def ray_cluster(environ: Mapping[str, str], *nodes: list[str]) -> Iterator[str]:
    """As many nodes as there are lists of words for `ray start`; gives the address, and ends all of them.

    Args:
        environ: of every process of the cluster.
    """
    address = f"127.0.0.1:{free_port()}"
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: names of sockets have a limit
    head = ["--head", "--port", address.rpartition(":")[2], "--temp-dir", str(folder), "--include-dashboard", "false"]
    head += ["--ray-client-server-port", str(free_port())]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for index, words in enumerate(nodes):
            log = folder / f"node_{index}.log"
            where = ["--address", address] if index else head
            running.append(_node(log, environ, *where, *words))
            _wait_for_node(running[-1], log)
        yield address
        assert [node.poll() for node in running] == [None] * len(nodes), "a run ended a cluster that was not its own"
    finally:
        for node in reversed(running):
            node.terminate()
            node.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def _node(log: Path, environ: Mapping[str, str], *words: str) -> "subprocess.Popen[bytes]":
    """`ray start --block`, which ends its node when it is ended."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *words]
    command += ["--num-cpus", "16", "--node-ip-address", "127.0.0.1", "--object-store-memory", "200000000"]
    with log.open("wb") as output:  # from another folder than the run's: its paths are meant from there
        return subprocess.Popen(command, cwd=log.parent, env=dict(environ), stdout=output, stderr=output)


def _wait_for_node(node: "subprocess.Popen[bytes]", log: Path) -> None:
    def is_up() -> bool:
        assert node.poll() is None, log.read_text()
        return "Ray runtime started" in log.read_text()

    wait_until(is_up, START_TIMEOUT_S)
