"""Requests with fields that sglang-router would drop go to one of its engines directly, balanced and sticky as there.

The router (0.3.2) reads `/generate` into a form of its own and sends on what it knows; anything else it leaves out
without a word. `KEPT_FIELDS` and `KEPT_SAMPLING_FIELDS` were measured with an engine that tells what arrived.
"""

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx

from slime.utils.api_key import is_own_server

KEPT_FIELDS = frozenset(
    {
        *("text", "input_ids", "input_embeds", "image_data", "video_data", "audio_data", "sampling_params", "rid"),
        *("return_logprob", "logprob_start_len", "top_logprobs_num", "token_ids_logprob", "return_text_in_logprobs"),
        *("stream", "log_metrics", "return_hidden_states", "session_params", "lora_path", "lora_id"),
        *("custom_logit_processor", "bootstrap_host", "bootstrap_port", "bootstrap_room", "bootstrap_pair_key"),
        *("data_parallel_rank", "background", "conversation_id", "priority", "extra_key", "no_logs"),
        *("return_bytes", "return_entropy", "model"),
    }
)
KEPT_SAMPLING_FIELDS = frozenset(
    {
        *("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"),
        *("min_new_tokens", "max_new_tokens", "stop", "stop_token_ids", "n", "json_schema", "regex", "ebnf"),
        *("ignore_eos", "skip_special_tokens", "no_stop_trim", "sampling_seed"),
    }
)
IDLE_SAMPLING_FIELDS = frozenset({"spaces_between_special_tokens"})
"""Dropped too, and nothing is lost: no tokenizer of transformers 5 but those for speech looks at it. The default
rollout always sends it."""
ROUTING_KEY = "X-SMG-Routing-Key"
"""Header whose requests go to the same engine, by the router and here."""
_LIST_AGE_S = 2.0
_LIST_TIMEOUT_S = 30.0

Fetch = Callable[[str], Awaitable[Any]]
"""GET of a URL: the JSON of its answer."""


def dropped_fields(payload: Any) -> list[str]:
    """Names of the fields of a `/generate` request that the router would not send on, and whose loss would be felt."""
    if not isinstance(payload, dict):
        return []
    dropped = [name for name, value in payload.items() if value is not None and name not in KEPT_FIELDS]
    sampling = payload.get("sampling_params")
    if isinstance(sampling, list):  # the router takes one for all
        return [*dropped, "sampling_params[]"]
    for name, value in (sampling or {}).items():
        if value is not None and name not in KEPT_SAMPLING_FIELDS | IDLE_SAMPLING_FIELDS:
            dropped.append(f"sampling_params.{name}")
    return dropped


class DirectRequests:
    """Chooses the engine behind a router that a request goes to directly. Used in one event loop at a time."""

    def __init__(self) -> None:
        self._routers: set[str] = set()
        self._lists: dict[str, tuple[float, list[dict[str, Any]]]] = {}
        self._asking: dict[str, asyncio.Task[list[dict[str, Any]]]] = {}
        self._in_flight: Counter[str] = Counter()
        self._served: Counter[str] = Counter()

    def know_routers(self, urls: list[str]) -> None:
        """These are the run's routers; requests to other servers stay as they are."""
        self._routers = {urlsplit(url).netloc for url in urls}
        self._lists.clear()
        self._asking.clear()

    def concerns(self, url: str, payload: Any) -> list[str]:
        """The fields for which a request cannot go through the router at `url`; empty where it can."""
        parts = urlsplit(url)
        return dropped_fields(payload) if parts.netloc in self._routers and parts.path == "/generate" else []

    async def choose(self, url: str, dropped: list[str], routing_key: str | None, fetch: Fetch) -> str:
        """Address of `/generate` on a healthy engine: the routing key's own, else the one with the fewest requests.

        Raises:
            ValueError: the router's engines share their work out (prefill, decode), so that none answers alone.
            httpx.ConnectError: no engine is healthy now; to be tried again.
        """
        workers = [worker for worker in await self._workers(url, fetch) if worker.get("is_healthy")]
        kinds = {worker.get("worker_type", "regular") for worker in workers} - {"regular"}
        if kinds:
            raise ValueError(
                f"A request has fields that the router would drop ({', '.join(dropped)}), and no engine can answer it "
                f"alone: behind {url} they are {' and '.join(sorted(kinds))} engines. Leave the fields out, or use "
                "regular engines."
            )
        engines = [str(worker["url"]).rstrip("/") for worker in workers]
        if not engines:
            self.forget(url)
            raise httpx.ConnectError(f"the router at {url} lists no healthy engine")
        is_own_server(*engines)
        if routing_key is not None:
            return max(engines, key=lambda engine: _weight(routing_key, engine)) + "/generate"
        return min(engines, key=lambda engine: (self._in_flight[engine], self._served[engine])) + "/generate"

    @contextmanager
    def counted(self, url: str, target: str) -> Iterator[None]:
        """The engine at `target`, behind the router at `url`, has one request more; if it is lost, the list is old."""
        engine = target.removesuffix("/generate")
        self._in_flight[engine] += 1
        self._served[engine] += 1
        try:
            yield
        except httpx.TransportError:
            self.forget(url)
            raise
        finally:
            self._in_flight[engine] -= 1

    def forget(self, url: str) -> None:
        """An engine of this router failed: ask for the list again, also where an answer is on its way."""
        router = urlsplit(url).netloc
        self._lists.pop(router, None)
        self._asking.pop(router, None)

    async def _workers(self, url: str, fetch: Fetch) -> list[dict[str, Any]]:
        """The router's list, asked for once by all requests that want it at the same time."""
        router = urlsplit(url).netloc
        asked_s, workers = self._lists.get(router, (0.0, []))
        if workers and time.monotonic() - asked_s <= _LIST_AGE_S:
            return workers
        asking = self._asking.get(router)
        if asking is None or asking.get_loop() is not asyncio.get_running_loop():
            asking = self._asking[router] = asyncio.create_task(self._ask(url, fetch))
        return await asyncio.shield(asking)  # a request that is given up does not take the others' answer along

    async def _ask(self, url: str, fetch: Fetch) -> list[dict[str, Any]]:
        parts = urlsplit(url)
        router = parts.netloc
        try:
            async with asyncio.timeout(_LIST_TIMEOUT_S):
                answer = await fetch(f"{parts.scheme}://{router}/workers")
            workers = list(answer.get("workers") or [])
            if self._asking.get(router) is asyncio.current_task():
                self._lists[router] = (time.monotonic(), workers)
            return workers
        except TimeoutError:
            raise httpx.ConnectError(f"the router at {url} did not list its engines in {_LIST_TIMEOUT_S:g} s") from None
        finally:
            if self._asking.get(router) is asyncio.current_task():
                del self._asking[router]


def _weight(routing_key: str, engine: str) -> bytes:
    """Rendezvous hashing: an engine that comes or goes moves only its own keys (Thaler and Ravishankar, 1998)."""
    return hashlib.blake2b(f"{routing_key}\0{engine}".encode(), digest_size=8).digest()
