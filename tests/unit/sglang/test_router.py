"""A real router before fake engines: it listens where it is told, takes engines in and out, and routes."""

import os
from argparse import Namespace

import httpx
import pytest

from slime.backends.sglang.router import RouterClient, router_command
from slime.utils import http_utils
from slime.utils.direct_requests import IDLE_SAMPLING_FIELDS, KEPT_FIELDS, KEPT_SAMPLING_FIELDS, dropped_fields
from slime.utils.processes import ServerProcess, free_port
from slime.weight_sync.base import EngineError
from tests.unit.sglang.conftest import FakeEngine

HOST = "127.0.0.1"


def value_of(argv: list[str], flag: str) -> str:
    assert argv.count(flag) == 1, argv
    return argv[argv.index(flag) + 1]


def test_slimes_defaults_are_given_where_they_are_not_the_routers():
    argv, _ = router_command(Namespace(), HOST, 3001, 4001)
    assert value_of(argv, "--host") == value_of(argv, "--prometheus-host") == HOST
    assert (value_of(argv, "--port"), value_of(argv, "--prometheus-port")) == ("3001", "4001")
    assert value_of(argv, "--log-level") == "warn"
    assert value_of(argv, "--balance-abs-threshold") == "10"
    assert value_of(argv, "--balance-rel-threshold") == "1.2"
    assert value_of(argv, "--request-timeout-secs") == "14400"
    assert int(value_of(argv, "--worker-startup-timeout-secs")) <= 300
    assert {"--disable-health-check", "--disable-circuit-breaker", "--disable-retries"} <= set(argv)


def test_what_the_user_gave_wins():
    args = Namespace(
        sglang_router_request_timeout_secs=60,
        router_policy="round_robin",
        router_log_level="debug",
        router_balance_abs_threshold=3,
        router_retry_max_retries=9,
        router_worker_startup_timeout_secs=7,
        router_disable_health_check=True,
        router_cache_threshold=None,
    )
    argv, _ = router_command(args, HOST, 3001, 4001)
    assert value_of(argv, "--request-timeout-secs") == "60"
    assert value_of(argv, "--policy") == "round_robin"
    assert value_of(argv, "--log-level") == "debug"
    assert value_of(argv, "--balance-abs-threshold") == "3"
    assert value_of(argv, "--retry-max-retries") == "9"
    assert value_of(argv, "--worker-startup-timeout-secs") == "7"
    assert argv.count("--disable-health-check") == 1


@pytest.fixture
def worker(fake_engine):
    fake_engine.replies |= {
        "/health": (200, ""),
        "/server_info": (200, {"model_path": "tiny", "tp_size": 1}),
        "/model_info": (200, {"model_path": "tiny"}),
        "/generate": (200, {"text": "routed", "meta_info": {"id": "1"}}),
    }
    return fake_engine


@pytest.fixture(scope="module")
def router(tmp_path_factory):
    """The router that its own command line would refuse to start: a policy that only RouterArgs knows."""
    port = free_port()
    argv, env = router_command(Namespace(router_policy="consistent_hashing"), HOST, port, free_port())
    process = ServerProcess(
        "router", argv, env | {"PATH": os.environ["PATH"]}, tmp_path_factory.mktemp("r") / "router.log"
    )
    process.start()
    process.wait_until_healthy(f"http://{HOST}:{port}/liveness", 60)
    yield f"http://{HOST}:{port}"
    process.terminate()


def test_an_engine_is_added_used_and_removed(router, worker):
    client = RouterClient(router)
    assert client.workers() == []
    client.add_worker(worker.url, timeout_s=30)
    assert [(w["url"], w["is_healthy"]) for w in client.workers()] == [(worker.url, True)]
    request = {"input_ids": [5], "rid": "r1", "sampling_params": {"max_new_tokens": 1}}
    reply = httpx.post(f"{router}/generate", json=request, headers={"X-SMG-Routing-Key": "s"}, trust_env=False)
    assert reply.json()["text"] == "routed"
    (asked,) = [payload for _, path, payload in worker.asked if path == "/generate"]
    assert (asked["rid"], asked["input_ids"]) == ("r1", [5])
    client.remove_worker(worker.url)
    assert client.workers() == []
    client.remove_worker(worker.url)


def test_a_request_that_fails_reaches_its_engine_once_however_many_have_failed(router, worker):
    """The sender retries: a router that did too would multiply, and one that broke the circuit would end its retries.

    An engine that comes back at the same address serves at once.
    """
    client, request = RouterClient(router), {"input_ids": [5], "sampling_params": {"max_new_tokens": 1}}
    client.add_worker(worker.url, timeout_s=30)
    works = worker.replies["/generate"]
    for status in (500, 503, 429):
        worker.replies["/generate"] = (status, {"error": "restarting"})
        for _ in range(10):
            assert httpx.post(f"{router}/generate", json=request, trust_env=False).status_code == status
    assert len([path for _, path, _ in worker.asked if path == "/generate"]) == 30
    worker.replies["/generate"] = works
    for _ in range(2):
        assert httpx.post(f"{router}/generate", json=request, trust_env=False).status_code == 200
        client.remove_worker(worker.url)
        client.add_worker(worker.url, timeout_s=30)
    client.remove_worker(worker.url)


async def test_the_policy_sends_the_samples_of_a_prompt_to_the_engine_that_knows_it(worker, tmp_path, monkeypatch):
    """Engines that were taken in turn would each read every prompt of the default rollout."""
    other = FakeEngine()
    other.replies = worker.replies
    port = free_port()
    argv, env = router_command(Namespace(router_policy="cache_aware"), HOST, port, free_port())
    process, url = ServerProcess("router", argv, env, tmp_path / "router.log"), f"http://{HOST}:{port}"
    process.start()
    try:
        process.wait_until_healthy(f"{url}/liveness", 60)
        for engine in (worker, other):
            RouterClient(url).add_worker(engine.url, timeout_s=30)
        monkeypatch.setattr(http_utils, "_direct", http_utils.DirectRequests())
        http_utils._direct.know_routers([url])
        params = {"max_new_tokens": 1, "spaces_between_special_tokens": False}
        for _ in range(4):
            await http_utils.post(f"{url}/generate", {"input_ids": [5] * 50, "sampling_params": params})
    finally:
        process.terminate()
        other.close()
    counts = [[path for _, path, _ in engine.asked].count("/generate") for engine in (worker, other)]
    assert sorted(counts) == [0, 4]


def test_with_a_key_the_router_asks_for_it_and_shows_it_to_engines(worker, tmp_path, monkeypatch):
    monkeypatch.setenv("SLIME_API_KEY", "secret")
    port = free_port()
    argv, env = router_command(Namespace(), HOST, port, free_port())
    assert "secret" not in " ".join(argv)
    process, url = ServerProcess("router", argv, env, tmp_path / "router.log"), f"http://{HOST}:{port}"
    process.start()
    try:
        process.wait_until_healthy(f"{url}/liveness", 60)
        RouterClient(url).add_worker(worker.url, timeout_s=30)
        request = {"input_ids": [5], "sampling_params": {"max_new_tokens": 1}}
        assert httpx.post(f"{url}/generate", json=request, trust_env=False).status_code == 401
        headers = {"Authorization": "Bearer secret"}
        assert httpx.post(f"{url}/generate", json=request, headers=headers, trust_env=False).status_code == 200
        assert worker.headers[-1]["authorization"] == "Bearer secret"
    finally:
        process.terminate()


def test_an_engine_that_does_not_come_up_is_an_error_that_names_it(router):
    nobody = f"http://{HOST}:{free_port()}"
    client = RouterClient(router)
    with pytest.raises(EngineError, match=rf"router \({router}\) was asked POST /workers for {nobody}: .* after 0.5 s"):
        client.add_worker(nobody, timeout_s=0.5)


def test_a_router_that_is_not_there_is_an_error_that_names_it():
    url = f"http://{HOST}:{free_port()}"
    with pytest.raises(EngineError, match=rf"The router \({url}\) was asked GET /workers: no answer"):
        RouterClient(url).workers()


# A value of the right type for every field of `/generate` that slime or a plug-in may send.
FIELDS = {
    **dict.fromkeys(KEPT_FIELDS - {"sampling_params"}, "x"),
    **dict.fromkeys(("return_logprob", "return_text_in_logprobs", "log_metrics", "return_hidden_states"), True),
    **dict.fromkeys(("background", "no_logs", "return_bytes", "return_entropy"), True),
    **dict.fromkeys(("logprob_start_len", "top_logprobs_num", "data_parallel_rank", "priority", "bootstrap_port"), 3),
    "input_ids": [1, 2],
    "token_ids_logprob": [1],
    "input_embeds": [[1.5]],
    "session_params": {"id": "s"},
    "bootstrap_room": 3,
    "stream": False,
    **dict.fromkeys(("return_routed_experts", "return_sampling_mask", "return_prompt_token_ids"), True),
    "session_id": "s",
    "cache_salt": "c",
    "routing_key": "k",
    "max_thinking_tokens": 3,
    "routed_dp_rank": 0,
}
SAMPLING_FIELDS = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty"), 0.5),
    **dict.fromkeys(("min_new_tokens", "max_new_tokens", "n", "top_k", "sampling_seed"), 3),
    **dict.fromkeys(("json_schema", "regex", "ebnf", "stop_regex", "structural_tag"), "x"),
    "repetition_penalty": 1.5,
    "stop": ["a"],
    "stop_token_ids": [1],
    "stream_interval": 2,
    "logit_bias": {"5": 1.0},
    "ignore_eos": True,
    "skip_special_tokens": False,
    "no_stop_trim": True,
    "spaces_between_special_tokens": False,
    "custom_params": {"a": 1},
}


def test_what_the_router_drops_is_known_field_by_field(router, worker):
    """A field more that the router keeps would go round it for nothing; one less would be lost without a word."""
    client = RouterClient(router)
    client.add_worker(worker.url, timeout_s=30)
    requests = [{"input_ids": [1], "sampling_params": {}} | {name: value} for name, value in FIELDS.items()]
    requests += [{"input_ids": [1], "sampling_params": {name: value}} for name, value in SAMPLING_FIELDS.items()]
    for request in requests:
        assert httpx.post(f"{router}/generate", json=request, trust_env=False).status_code == 200, request
    arrived = [payload for _, path, payload in worker.asked if path == "/generate"]
    lost = {
        field
        for sent, seen in zip(requests, arrived, strict=True)
        for field in [
            *(name for name in sent if seen.get(name) != sent[name] and name != "sampling_params"),
            *(
                f"sampling_params.{k}"
                for k, v in sent["sampling_params"].items()
                if seen["sampling_params"].get(k) != v
            ),
        ]
    }
    client.remove_worker(worker.url)
    idle = {f"sampling_params.{name}" for name in IDLE_SAMPLING_FIELDS}
    assert lost == idle | {field for request in requests for field in dropped_fields(request)}
    assert FIELDS.keys() >= KEPT_FIELDS - {"sampling_params"} and SAMPLING_FIELDS.keys() >= KEPT_SAMPLING_FIELDS


async def test_a_request_that_the_router_would_maim_reaches_the_engine_whole(router, worker, monkeypatch):
    client = RouterClient(router)
    client.add_worker(worker.url, timeout_s=30)
    host, port = router.removeprefix("http://").split(":")
    monkeypatch.setattr(http_utils, "_direct", http_utils.DirectRequests())
    http_utils._direct.know_routers([router])
    request = {"input_ids": [1], "sampling_params": {"logit_bias": {"5": 1.0}}, "return_routed_experts": True}
    reply = await http_utils.post(f"http://{host}:{port}/generate", request)
    client.remove_worker(worker.url)
    assert reply["text"] == "routed"
    assert [payload for _, path, payload in worker.asked if path == "/generate"] == [request]
