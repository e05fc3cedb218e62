"""Which engine gets a request that the router would maim: a healthy one, in turn, the same for the same session."""

import json
from collections import Counter
from typing import Any

import httpx
import pytest

from slime.utils import http_utils
from slime.utils.direct_requests import ROUTING_KEY, DirectRequests, dropped_fields

ROUTER = "http://router.test"
NEEDS_AN_ENGINE = {"input_ids": [1], "sampling_params": {"custom_params": {"a": 1}}}
PLAIN = {"input_ids": [1], "sampling_params": {"temperature": 1.0, "custom_params": None}}


class Network:
    """A router and engines that say who was asked; `dead` ones refuse the connection."""

    def __init__(self, engines: list[str], worker_type: str = "regular") -> None:
        self.listed = dict.fromkeys(engines, True)
        self.dead: set[str] = set()
        self.worker_type = worker_type
        self.answered: list[str] = []
        self.num_lists = 0

    async def handle(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        if request.url.path == "/workers":
            self.num_lists += 1
            workers = [
                {"url": f"http://{engine}", "is_healthy": is_healthy, "worker_type": self.worker_type}
                for engine, is_healthy in self.listed.items()
            ]
            return httpx.Response(200, json={"workers": workers})
        if host in self.dead:
            raise httpx.ConnectError("refused")
        self.answered.append(host)
        return httpx.Response(200, json={"by": host, "got": json.loads(request.content)})


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    network = Network(["a.test", "b.test", "c.test"])
    client = httpx.AsyncClient(transport=httpx.MockTransport(network.handle))
    monkeypatch.setattr(http_utils, "_http_client", client)
    monkeypatch.setattr(http_utils, "RETRY_INTERVAL_S", 0.0)
    monkeypatch.setattr(http_utils, "_direct", DirectRequests())
    http_utils._direct.know_routers([ROUTER])
    return network


async def ask(payload: dict[str, Any], key: str | None = None, url: str = f"{ROUTER}/generate") -> Any:
    return await http_utils.post(url, payload, headers={ROUTING_KEY: key} if key else None)


def test_a_field_that_is_none_is_not_there():
    assert dropped_fields(PLAIN | {"return_routed_experts": None}) == []
    assert dropped_fields(NEEDS_AN_ENGINE | {"return_routed_experts": True}) == [
        "return_routed_experts",
        "sampling_params.custom_params",
    ]
    assert dropped_fields({"input_ids": [[1], [2]], "sampling_params": [{}, {}]}) == ["sampling_params[]"]


async def test_only_what_the_router_would_drop_goes_round_it(network: Network):
    assert (await ask(PLAIN))["by"] == "router.test"
    reply = await ask(NEEDS_AN_ENGINE)
    assert reply["by"] != "router.test" and reply["got"] == NEEDS_AN_ENGINE
    assert (await ask(NEEDS_AN_ENGINE, url="http://elsewhere.test/generate"))["by"] == "elsewhere.test"
    assert (await ask(NEEDS_AN_ENGINE, url=f"{ROUTER}/abort_request"))["by"] == "router.test"


async def test_requests_are_shared_out_over_healthy_engines(network: Network):
    network.listed["b.test"] = False
    for _ in range(6):
        await ask(NEEDS_AN_ENGINE)
    assert Counter(network.answered) == {"a.test": 3, "c.test": 3}
    assert network.num_lists == 1


async def test_a_session_stays_with_its_engine_and_moves_only_when_that_goes(network: Network):
    before = {key: (await ask(NEEDS_AN_ENGINE, key))["by"] for key in map(str, range(30))}
    assert set(before.values()) == {"a.test", "b.test", "c.test"}
    del network.listed["b.test"]
    http_utils._direct.forget(f"{ROUTER}/generate")
    after = {key: (await ask(NEEDS_AN_ENGINE, key))["by"] for key in before}
    assert all(after[key] == engine for key, engine in before.items() if engine != "b.test")
    assert "b.test" not in after.values()


async def test_an_engine_that_is_gone_is_asked_for_anew(network: Network):
    """The router's list changes when the engine's death was noticed: the request is tried until then."""
    by_key = {key: (await ask(NEEDS_AN_ENGINE, key))["by"] for key in map(str, range(30))}
    key = next(key for key, engine in by_key.items() if engine == "b.test")
    network.dead.add("b.test")
    lists = network.num_lists

    original = network.handle

    async def withdraw_after_two_lists(request: httpx.Request) -> httpx.Response:
        if network.num_lists >= lists + 2:
            network.listed.pop("b.test", None)
        return await original(request)

    http_utils._http_client = httpx.AsyncClient(transport=httpx.MockTransport(withdraw_after_two_lists))
    assert (await ask(NEEDS_AN_ENGINE, key))["by"] in ("a.test", "c.test")


async def test_without_a_healthy_engine_it_is_tried_again(network: Network):
    network.listed = dict.fromkeys(network.listed, False)
    with pytest.raises(httpx.ConnectError, match="3 times.*no healthy engine"):
        await http_utils.post(f"{ROUTER}/generate", NEEDS_AN_ENGINE, max_retries=2)


async def test_engines_that_share_the_work_out_cannot_answer_alone(network: Network):
    network.worker_type = "decode"
    with pytest.raises(ValueError, match=r"sampling_params\.custom_params.*decode engines"):
        await ask(NEEDS_AN_ENGINE)


async def test_an_error_of_the_engines_own_is_not_tried_for_ever(network: Network, monkeypatch: pytest.MonkeyPatch):
    """A router that does not reach an engine also says 500: that is tried as long as any lost connection."""
    asked: list[int] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        asked.append(1)
        lost = {"error": {"code": "call_upstream_request_error", "message": "error sending request"}}
        return httpx.Response(500, json=lost) if len(asked) <= 20 else httpx.Response(500, text="Internal Server Error")

    monkeypatch.setattr(http_utils, "_http_client", httpx.AsyncClient(transport=httpx.MockTransport(answer)))
    with pytest.raises(httpx.HTTPStatusError, match="Internal Server Error"):
        await ask(PLAIN)
    assert len(asked) == 20 + http_utils.OWN_ERRORS + 1
