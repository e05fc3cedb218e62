"""Requests with fields that sglang-router would drop go to one of its engines directly, balanced and sticky as there.

The router (0.3.2) reads `/generate` into a form of its own and sends on what it knows; anything else it leaves out
without a word. `KEPT_FIELDS` and `KEPT_SAMPLING_FIELDS` were measured with an engine that tells what arrived.
"""

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
ROUTING_KEY = "X-SMG-Routing-Key"
"""Header whose requests go to the same engine, by the router and here."""
_LIST_AGE_S = 2.0

Fetch = Callable[[str], Awaitable[Any]]
"""GET of a URL: the JSON of its answer."""


def dropped_fields(payload: Any) -> list[str]:
    """Names of the fields of a `/generate` request that the router would not send on."""
    if not isinstance(payload, dict):
        return []
    dropped = [name for name, value in payload.items() if value is not None and name not in KEPT_FIELDS]
    sampling = payload.get("sampling_params")
    if isinstance(sampling, list):  # the router takes one for all
        return [*dropped, "sampling_params[]"]
    for name, value in (sampling or {}).items():
        if value is not None and name not in KEPT_SAMPLING_FIELDS:
            dropped.append(f"sampling_params.{name}")
    return dropped


class DirectRequests:
    """Chooses the engine behind a router that a request goes to directly. Used in one event loop at a time."""

    def __init__(self) -> None:
        self._routers: set[str] = set()
        self._lists: dict[str, tuple[float, list[dict[str, Any]]]] = {}
        self._in_flight: Counter[str] = Counter()
        self._served: Counter[str] = Counter()

    def know_routers(self, urls: list[str]) -> None:
        """These are the run's routers; requests to other servers stay as they are."""
        self._routers = {urlsplit(url).netloc for url in urls}
        self._lists.clear()

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
    def counted(self, target: str) -> Iterator[None]:
        """The engine at `target` has one request more."""
        engine = target.removesuffix("/generate")
        self._in_flight[engine] += 1
        self._served[engine] += 1
        try:
            yield
        finally:
            self._in_flight[engine] -= 1

    def forget(self, url: str) -> None:
        """An engine of this router failed: ask for the list again."""
        self._lists.pop(urlsplit(url).netloc, None)

    async def _workers(self, url: str, fetch: Fetch) -> list[dict[str, Any]]:
        parts = urlsplit(url)
        asked_s, workers = self._lists.get(parts.netloc, (0.0, []))
        if not workers or time.monotonic() - asked_s > _LIST_AGE_S:
            answer = await fetch(f"{parts.scheme}://{parts.netloc}/workers")
            workers = list(answer.get("workers") or [])
            self._lists[parts.netloc] = (time.monotonic(), workers)
        return workers


def _weight(routing_key: str, engine: str) -> bytes:
    """Rendezvous hashing: an engine that comes or goes moves only its own keys (Thaler and Ravishankar, 1998)."""
    return hashlib.blake2b(f"{routing_key}\0{engine}".encode(), digest_size=8).digest()
