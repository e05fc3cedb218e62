"""Which engine gets a request that the router would maim: a healthy one, in turn, the same for the same session."""

import asyncio
import json
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from slime.rollout.sampling import eval_sampling_params, rollout_sampling_params
from slime.utils import direct_requests, http_utils
from slime.utils.direct_requests import IDLE_SAMPLING_FIELDS, ROUTING_KEY, DirectRequests, dropped_fields
from slime.utils.eval_config import EvalDatasetConfig

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
        self.may_list = asyncio.Event()
        self.may_list.set()
        self.cannot_list = False

    async def handle(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        if request.url.path == "/workers":
            self.num_lists += 1
            await self.may_list.wait()
            if self.cannot_list:
                raise httpx.ConnectError("refused")
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


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_so():
            await asyncio.sleep(0)


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


@pytest.mark.parametrize("worker_type", ["regular", "prefill"])
async def test_the_default_rollout_and_evaluation_go_through_the_router(network: Network, worker_type: str):
    """So `--router-policy` chooses the engine, and engines that share the work out can be used."""
    network.worker_type = worker_type
    args = Namespace(
        rollout_temperature=1.0, rollout_top_p=1.0, rollout_top_k=-1, rollout_max_response_len=4, rollout_stop=["a"],
        rollout_stop_token_ids=[7], rollout_skip_special_tokens=False,
    )  # fmt: skip
    for params in (rollout_sampling_params(args), eval_sampling_params(args, EvalDatasetConfig("task", "task.jsonl"))):
        assert params.keys() >= IDLE_SAMPLING_FIELDS
        reply = await ask({"input_ids": [1], "return_logprob": True, "sampling_params": params})
        assert reply["by"] == "router.test"
    assert network.num_lists == 0


@pytest.mark.parametrize("skips", [False, True])
def test_no_tokenizer_looks_at_the_field_that_may_be_dropped(skips: bool):
    """Neither a fast one nor one written in Python, of which transformers 4 put spaces around special tokens."""
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "<x>": 2}))
    fast = PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=["<x>"])
    slow = ByT5Tokenizer(extra_ids=0, additional_special_tokens=["<x>"])
    for tokenizer in (fast, slow):
        ids = tokenizer.convert_tokens_to_ids(["a", "<x>", "<x>", "b", "<x>"])
        (field,) = IDLE_SAMPLING_FIELDS
        texts = {tokenizer.decode(ids, skip_special_tokens=skips, **{field: value}) for value in (False, True)}
        assert texts == {tokenizer.decode(ids, skip_special_tokens=skips)}
        assert ("<x>" in texts.pop()) is not skips


async def test_requests_are_shared_out_over_healthy_engines(network: Network):
    network.listed["b.test"] = False
    for _ in range(6):
        await ask(NEEDS_AN_ENGINE)
    assert Counter(network.answered) == {"a.test": 3, "c.test": 3}
    assert network.num_lists == 1


async def test_requests_that_begin_together_ask_for_the_list_once(network: Network):
    network.may_list.clear()
    requests = [asyncio.create_task(ask(NEEDS_AN_ENGINE)) for _ in range(12)]
    await asyncio.sleep(0)
    requests[0].cancel()  # who began to ask may give up: the others get the answer all the same
    await until(lambda: network.num_lists > 0)
    network.may_list.set()
    await asyncio.gather(*requests[1:])
    assert network.num_lists == 1
    assert Counter(network.answered).keys() == {"a.test", "b.test", "c.test"}


async def test_a_list_that_cannot_be_had_is_asked_for_once_a_round(network: Network):
    network.cannot_list = True
    results = await asyncio.gather(
        *(http_utils.post(f"{ROUTER}/generate", NEEDS_AN_ENGINE, max_retries=2) for _ in range(8)),
        return_exceptions=True,
    )
    assert all(isinstance(result, httpx.ConnectError) for result in results)
    assert network.num_lists == 3


async def test_a_list_from_before_an_engine_was_lost_is_not_kept(network: Network):
    """Its answer was on its way when the connection broke, so the lost engine may be on it."""
    network.may_list.clear()
    early = asyncio.create_task(ask(NEEDS_AN_ENGINE))
    await until(lambda: network.num_lists == 1)
    http_utils._direct.forget(f"{ROUTER}/generate")
    network.may_list.set()
    await early
    await ask(NEEDS_AN_ENGINE)
    assert network.num_lists == 2


async def test_a_router_that_does_not_answer_holds_nobody_for_ever(network: Network, monkeypatch: pytest.MonkeyPatch):
    network.may_list.clear()
    monkeypatch.setattr(direct_requests, "_LIST_TIMEOUT_S", 0.01)
    with pytest.raises(httpx.ConnectError, match=r"did not list its engines in 0\.01 s"):
        await http_utils.post(f"{ROUTER}/generate", NEEDS_AN_ENGINE, max_retries=0)


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
