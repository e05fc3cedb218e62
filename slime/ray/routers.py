"""The router before one model's engines: started or only spoken to, watched, started again, told who serves."""

import contextlib
from argparse import Namespace
from pathlib import Path

from slime.backends.sglang.router import RouterClient, router_command
from slime.observability.run_status import ProcessInfo
from slime.ray import cluster
from slime.ray.health import HealthMonitor
from slime.utils.http_utils import _wrap_ipv6
from slime.utils.processes import ServerProcess, free_port
from slime.weight_sync.base import EngineError

_START_TIMEOUT_S = 60.0
_REGISTER_TIMEOUT_S = 120.0
_ASK_TIMEOUT_S = 5.0
_STOP_TIMEOUT_S = 1.0


class Router:
    """One model's router. With an address that the user gave, the router there, which is never ended from here."""

    def __init__(self, args: Namespace, health: HealthMonitor, *, name: str, address: tuple[str, int] | None) -> None:
        """
        Args:
            name: how errors and status.json call it, e.g. "router".
            address: of a router that runs already; None to start one.
        """
        self._args, self._health, self.name = args, health, name
        self.address = address or ("", 0)
        self._process: ServerProcess | None = None
        self._silence: str | None = None
        self._is_ours = address is None

    @property
    def url(self) -> str:
        return f"http://{_wrap_ipv6(self.address[0])}:{self.address[1]}"

    def start(self, *, splits_work: bool = False, port: int | None = None) -> None:
        """Start the process, if it is ours; `wait` follows.

        Args:
            splits_work: whether its engines prefill or decode only.
            port: where it listens; a free one if None.
        """
        if not self._is_ours:
            return
        host = cluster.own_host(self._args)
        self.address = (host, port or free_port(host))
        argv, env = router_command(self._args, *self.address, free_port(host), splits_work=splits_work)
        log_path = Path(self._args.run_dir) / "logs" / f"{self.name.replace(' ', '_')}.log"
        self._process = ServerProcess(self.name, argv, env, log_path)
        self._process.start()

    def wait(self) -> None:
        """Until it answers; from then on it is watched."""
        if self._process is None:
            return
        self._process.wait_until_healthy(f"{self.url}/liveness", _START_TIMEOUT_S)
        self._health.watch(self.name, f"{self.url}/liveness", self._give_up)

    def death(self) -> str | None:
        """How it was lost; None while it serves."""
        if self._process is None:
            return None
        how = self._silence or self._process.how_it_ended()
        return None if how is None else f"The {self.name} ({self.url}) {how}"

    def restart(self) -> None:
        """Start it again, at the same address; it knows no engine then."""
        assert self._process is not None, "a router elsewhere is not started from here"
        self._health.forget(self.name)
        self._process.terminate(0.5)
        self._process.start()
        self._silence = None
        self.wait()

    def admit(self, url: str, worker_type: str = "regular", bootstrap_port: int = 0) -> None:
        """Let it send requests to an engine."""
        with contextlib.closing(RouterClient(self.url)) as client:
            if any(worker.get("url") == url and worker.get("is_healthy") for worker in client.workers()):
                return  # a router elsewhere may know its engines
            client.add_worker(url, worker_type, _REGISTER_TIMEOUT_S, bootstrap_port or None)

    def withdraw(self, url: str) -> None:
        """Send an engine no more requests. A router that is gone knows none."""
        with contextlib.suppress(EngineError), contextlib.closing(RouterClient(self.url, _ASK_TIMEOUT_S)) as client:
            client.remove_worker(url, _ASK_TIMEOUT_S)

    def processes(self) -> list[ProcessInfo]:
        """Itself, if it was started here and runs."""
        pid = self._process.server_pid if self._process is not None else None
        return [] if pid is None else [ProcessInfo(self.name, "router", pid)]

    def stop(self) -> None:
        """End it, if it is ours."""
        if self._process is not None:
            self._process.terminate(_STOP_TIMEOUT_S)

    def _give_up(self, reason: str) -> None:
        assert self._process is not None
        self._silence = f"{reason} and was killed.\nLast lines of its log:\n{self._process.log_tail()}"
        self._process.terminate(0.5)
