"""The actor beside one engine: it owns the server process on the node where the engine's devices are."""

import os
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from slime.backends.base import EngineClient, EngineSpec
from slime.backends.sglang.client import SGLangClient
from slime.backends.sglang.launch import limits_of_sampling
from slime.observability.run_status import ProcessInfo
from slime.ray.cluster import enter_working_dir, own_host
from slime.ray.liveness import Pulse
from slime.utils.api_key import api_key
from slime.utils.processes import ServerProcess, free_port
from slime.weight_sync.base import EngineError

_STOP_TIMEOUT_S = 2.0  # SGLang drains for longer, but nothing it holds is worth waiting for
_KILL_TIMEOUT_S = 0.5


@dataclass(frozen=True)
class EngineRecord:
    """How other processes reach one engine."""

    name: str
    url: str
    kind: str
    """`embedded` or `sglang`."""
    num_devices: int
    weights_dir: str
    """Folder through which a trainer on the same host hands over weights."""
    first_device: int = 0
    """Position of its first device among those of all engines."""

    def client(self) -> EngineClient:
        return SGLangClient(self.url, name=self.name)


class EngineActor(Pulse):
    """Starts, ends and describes one server; carries no request."""

    def __init__(self, args: Namespace, spec: EngineSpec) -> None:
        enter_working_dir(args)
        self._args, self._spec = args, spec
        self._process: ServerProcess | None = None
        self._start = 0
        self._lock = threading.Lock()  # whoever starts or ends the server; calls come on several threads

    def start(self, number: int, overrides: Mapping[str, Any], first: EngineSpec | None = None) -> EngineSpec:
        """Start the server, again if it ran before; returns the spec with the host and port it was given.

        Does not wait until it is healthy.

        Args:
            number: of this start of the engine, by which `kill` knows what it is to end.
            overrides: SGLang's server arguments that this start needs besides the spec's, by field name.
            first: what `start` returned on the engine's first node; None there.
        """
        with self._lock:
            if number <= self._start:
                raise RuntimeError(f"Start {number} of {self._spec.name} came after start {self._start}.")
            self._start = number
            if self._process is not None:
                self._process.terminate(_KILL_TIMEOUT_S)
            return self._start_server(overrides, first)

    def _start_server(self, overrides: Mapping[str, Any], first: EngineSpec | None) -> EngineSpec:
        host = own_host(self._args)
        self._spec = replace(self._spec, host=host, port=free_port(host), nccl_port=free_port(host))
        self._spec = replace(self._spec, overrides={**self._spec.overrides, **overrides})
        if self._spec.num_nodes > 1:
            meeting = first.dist_address if first is not None else f"{host}:{free_port(host)}"
            self._spec = replace(self._spec, dist_address=meeting)
        if self._spec.worker_type == "prefill":
            self._spec = replace(self._spec, bootstrap_port=free_port(host))
        argv, env = _server_command(self._args)(self._args, self._spec)
        self._process = ServerProcess(self._spec.name, argv, env, self._spec.log_path)
        self._process.start()
        return self._spec

    def wait_until_healthy(self, timeout_s: float) -> None:
        """Block until the server answers and has compiled what it will need.

        Raises:
            ServerError: it ended, or was silent for `timeout_s`; with its last log lines.
            EngineError: it refused the request that makes it compile.
        """
        deadline = time.monotonic() + timeout_s
        self._started().wait_until_healthy(f"{self._spec.url}/health", timeout_s)
        sampling = limits_of_sampling(self._args)
        if self._spec.device == "cuda" and self._spec.worker_type == "regular" and sampling is not None:
            self._warm_up(sampling, max(deadline - time.monotonic(), 1.0))

    def _warm_up(self, sampling: dict[str, Any], timeout_s: float) -> None:
        key = api_key(self._args)  # not the admin's: SGLang asks for that one only before it is changed
        client = SGLangClient(self._spec.url, name=self._spec.name, timeout_s=timeout_s, api_key=key)
        try:
            client.warm_up(sampling)
        except EngineError as error:
            raise EngineError(self.how_it_ended() or f"{error}\n{self.log_tail()}") from error
        finally:
            client.close()

    def how_it_ended(self) -> str | None:
        """None while the server runs and before it does; else how and when it ended, and its last log lines."""
        return None if self._process is None else self._process.how_it_ended()

    def log_tail(self) -> str:
        """The server's last lines."""
        return self._started().log_tail()

    def processes(self) -> list[ProcessInfo]:
        """This actor and, while it runs, its server."""
        owner = ProcessInfo(f"owner of {self._spec.name}", "owner", os.getpid())
        server = self._process.server_pid if self._process is not None else None
        return [owner] if server is None else [ProcessInfo(self._spec.name, "engine", server), owner]

    def kill(self, number: int) -> None:
        """End the server of this start at once, also where it is stopped; a later one stays."""
        with self._lock:
            if self._process is not None and number == self._start:
                self._process.terminate(_KILL_TIMEOUT_S)

    def stop(self) -> None:
        """Ask the server to end, and make it."""
        with self._lock:
            if self._process is not None:
                self._process.terminate(_STOP_TIMEOUT_S)

    def _started(self) -> ServerProcess:
        if self._process is None:
            raise RuntimeError(f"{self._spec.name} was not started.")
        return self._process


def _server_command(args: Namespace) -> Callable[[Namespace, EngineSpec], tuple[list[str], dict[str, str]]]:
    if args.rollout_engine == "embedded":
        from slime.backends.embedded.launch import server_command
    else:
        from slime.backends.sglang.launch import server_command
    return server_command
