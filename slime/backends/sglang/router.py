"""sglang-router: its command line, and the calls that add and remove engines behind it (facts of version 0.3.2)."""

import os
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import httpx

import slime
from slime.backends.sglang.pass_through import changed_flags, is_changed
from slime.utils.api_key import api_key, key_environment, key_header
from slime.utils.http_client import tls_context
from slime.weight_sync.base import EngineError

# Set by slime itself; the router's own defaults would bind every interface, or one fixed port.
_OURS = (
    "router_prometheus_host",
    "router_prometheus_port",
    "router_request_timeout_secs",
    "router_log_level",
    "router_balance_abs_threshold",
    "router_balance_rel_threshold",
    "router_policy",
    "router_prefill_policy",
    "router_decode_policy",
)
_POLICIES = ("policy", "prefill_policy", "decode_policy")
_SLIME_DEFAULTS = {"log_level": "warn", "balance_abs_threshold": 10, "balance_rel_threshold": 1.2}  # not the router's
_STARTUP_TIMEOUT_S = 300
_POLL_S = 0.1


def router_command(
    args: Namespace, host: str, port: int, prometheus_port: int, *, splits_work: bool = False
) -> tuple[list[str], dict[str, str]]:
    """Command line and whole environment of a router that listens on `host` alone; with `splits_work` its engines
    prefill or decode only.

    Worker health checks and circuit breakers are off unless the router is told otherwise: an engine that is paused for
    new weights answers no health check, and who watches engines here is the health monitor. So are its retries: the
    sender of a request retries (`slime.utils.http_utils.post`), and two layers that retry multiply.
    """
    timeout_s = getattr(args, "sglang_router_request_timeout_secs", None) or 14400
    argv = [
        sys.executable, "-m", "slime.backends.sglang.router_main",
        "--host", host,
        "--port", str(port),
        "--prometheus-host", host,
        "--prometheus-port", str(prometheus_port),
        "--request-timeout-secs", str(timeout_s),
    ]  # fmt: skip
    for policy in _POLICIES:
        if (value := getattr(args, f"router_{policy}", None)) is not None:
            argv += ["--" + policy.replace("_", "-"), value]
    argv += changed_flags(args, "router", without=_OURS)
    for name, default in _SLIME_DEFAULTS.items():
        value = getattr(args, f"router_{name}", None)
        argv += ["--" + name.replace("_", "-"), str(default if value is None else value)]
    if not is_changed(args, "router", "router_worker_startup_timeout_secs"):
        argv += ["--worker-startup-timeout-secs", str(_STARTUP_TIMEOUT_S)]
    if not is_changed(args, "router", "router_worker_startup_check_interval"):
        argv += ["--worker-startup-check-interval", "1"]
    switches = ["disable-health-check", "disable-circuit-breaker", *(["pd-disaggregation"] if splits_work else [])]
    if not is_changed(args, "router", "router_retry_max_retries"):
        switches.append("disable-retries")
    for switch in switches:
        if "--" + switch not in argv:
            argv += ["--" + switch]
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(slime.__file__).parents[1]), env.get("PYTHONPATH")]))
    return argv, env | key_environment(args)


class RouterClient:
    """Adds engines to a router and removes them; every failure is an `EngineError` that names the router."""

    def __init__(self, url: str, timeout_s: float = 30.0) -> None:
        """
        Args:
            url: e.g. http://127.0.0.1:3005.
            timeout_s: of a single call.
        """
        self.url = url.rstrip("/")
        self._http = httpx.Client(
            base_url=self.url, headers=key_header(api_key()), timeout=timeout_s, trust_env=False, verify=tls_context()
        )

    def workers(self) -> list[dict[str, Any]]:
        """What the router knows of its engines: dicts with at least "id", "url" and "is_healthy"."""
        reply = self._send("GET", "/workers")
        try:
            return list(reply.json()["workers"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._error("GET /workers", f"no list of workers: {reply.text[:500]}") from error

    def add_worker(
        self, url: str, worker_type: str = "regular", timeout_s: float = 120.0, bootstrap_port: int | None = None
    ) -> None:
        """Register an engine and wait until the router will send requests to it.

        Args:
            url: of the engine, which must be healthy already.
            worker_type: "regular", "prefill" or "decode".
            bootstrap_port: of a prefill engine.

        Raises:
            EngineError: refused, or not there within `timeout_s`.
        """
        request: dict[str, Any] = {"url": url, "worker_type": worker_type}
        if key := api_key():
            request["api_key"] = key
        if bootstrap_port is not None:
            request["bootstrap_port"] = bootstrap_port
        deadline = time.monotonic() + timeout_s
        self._send("POST", "/workers", request)
        while not any(worker.get("url") == url and worker.get("is_healthy") for worker in self.workers()):
            if time.monotonic() > deadline:
                raise self._error(
                    f"POST /workers for {url}", f"the engine is not healthy behind the router after {timeout_s:g} s"
                )
            time.sleep(_POLL_S)

    def remove_worker(self, url: str, timeout_s: float = 30.0) -> None:
        """Take an engine out, and wait until the router has forgotten it; an unknown one is out already."""
        deadline = time.monotonic() + timeout_s
        for worker in self.workers():
            if worker.get("url") == url:
                self._send("DELETE", f"/workers/{worker['id']}")
        while any(worker.get("url") == url for worker in self.workers()):
            if time.monotonic() > deadline:
                raise self._error(f"DELETE /workers for {url}", f"the engine is still listed after {timeout_s:g} s")
            time.sleep(_POLL_S)

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def _send(self, method: str, path: str, payload: dict[str, Any] | None = None) -> httpx.Response:
        try:
            reply = self._http.request(method, path, json=payload)
        except httpx.HTTPError as error:
            raise self._error(f"{method} {path}", f"no answer ({error or type(error).__name__})") from error
        if not reply.is_success:
            raise self._error(f"{method} {path}", f"{reply.status_code} {reply.text[:1000]}")
        return reply

    def _error(self, call: str, what_happened: str) -> EngineError:
        return EngineError(f"The router ({self.url}) was asked {call}: {what_happened}")
