"""The run's key reaches the run's own servers, and nobody else."""

import os
from argparse import Namespace
from collections.abc import Iterator

import httpx
import pytest

from slime.utils import api_key, http_utils
from slime.utils.http_utils import get, init_http_client, post, stream_post

ROUTER = "http://127.0.0.1:3005"
ENGINE = "http://127.0.0.1:15000"
SERVICE = "http://127.0.0.1:8080"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str | None]]:
    """URL -> the Authorization that a request to it carried; the run's router is ROUTER, its key `secret`."""
    seen: dict[str, str | None] = {}

    def answer(request: httpx.Request) -> httpx.Response:
        seen[str(request.url)] = request.headers.get("authorization")
        return httpx.Response(200, text="data: [DONE]\n")

    monkeypatch.setenv(api_key.KEY_VARIABLE, "secret")
    monkeypatch.setattr(api_key, "_own_servers", set())
    monkeypatch.setattr(http_utils, "_http_client", httpx.AsyncClient(transport=httpx.MockTransport(answer)))
    settings = http_utils._settings
    ip, port = ROUTER.removeprefix("http://").split(":")
    init_http_client(
        Namespace(sglang_server_concurrency=1, rollout_num_engines=1, sglang_router_ip=ip, sglang_router_port=int(port))
    )
    yield seen
    http_utils._settings = settings


async def test_the_router_and_engines_that_it_names_get_the_key(shown: dict[str, str | None]) -> None:
    api_key.is_own_server(ENGINE)
    await post(f"{ROUTER}/generate", {})
    await get(f"{ENGINE}/v1/loads")
    assert [event async for event in stream_post(f"{ROUTER}/stream", {})] == []
    assert len(shown) == 3
    assert set(shown.values()) == {"Bearer secret"}


async def test_a_reward_service_does_not_get_the_key(shown: dict[str, str | None]) -> None:
    await post(f"{SERVICE}/reward", {})
    await post("http://127.0.0.1.elsewhere.test:3005/", {})
    assert set(shown.values()) == {None}


async def test_an_authorization_of_the_caller_stays(shown: dict[str, str | None]) -> None:
    await post(f"{ROUTER}/generate", {}, headers={"Authorization": "Bearer other"})
    assert shown == {f"{ROUTER}/generate": "Bearer other"}


def test_the_flag_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(api_key.KEY_VARIABLE, "of the environment")
    assert api_key.api_key() == "of the environment"
    api_key.take_api_key(Namespace(sglang_api_key=None))
    assert os.environ[api_key.KEY_VARIABLE] == "of the environment"
    api_key.take_api_key(Namespace(sglang_api_key="of the flag"))
    assert api_key.api_key() == "of the flag"
