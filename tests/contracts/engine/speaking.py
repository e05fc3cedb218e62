"""How the contract's tests speak to an engine, and the transformers model that they compare it with."""

import functools
import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

TIMEOUT_S = 60.0
LONG = 6000  # tokens: far more than an engine makes before a test has ended the request


class Engine:
    """An engine's URL with the calls that tests make; raw replies, so that tests see what clients see."""

    def __init__(self, url: str, kind: str, weights_dir: Path | None = None) -> None:
        self.url = url.rstrip("/")
        self.kind = kind
        self.weights_dir = weights_dir
        self.http = self._connections()
        self._threads = ThreadPoolExecutor(16)

    def _connections(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=TIMEOUT_S, trust_env=False)

    @functools.cached_property
    def info(self) -> dict[str, Any]:
        return self.http.get("/server_info").json()

    @functools.cached_property
    def model_path(self) -> str:
        return str(self.info["model_path"])

    @functools.cached_property
    def context_length(self) -> int:
        return int(self.http.get("/v1/models").json()["data"][0]["max_model_len"])

    @property
    def log_prob_tolerance(self) -> float:
        """Nats between this engine and fp32 transformers."""
        return 1e-4 if self.info["dtype"] == "float32" else 0.25

    def needs_newer_sglang_than(self, version: str, why: str) -> None:
        """Skip the test on a stock server of `version` or older, of which `why` was seen to be true."""
        if self.kind != "embedded" and _numbers(self.info["version"]) <= _numbers(version):
            pytest.skip(f"SGLang {self.info['version']} {why}")

    @property
    def refusals(self) -> tuple[int, ...]:
        """Statuses that answer a sampling field of a wrong name or type: SGLang 0.5.16 calls it an error of its own."""
        is_old = self.kind != "embedded" and _numbers(self.info["version"]) <= (0, 5, 16)
        return (400, 500) if is_old else (400,)

    @property
    def keeps_seeds(self) -> bool:
        """SGLang follows `sampling_seed` only with --enable-deterministic-inference, the embedded engine always."""
        return self.kind == "embedded" or bool(self.info.get("enable_deterministic_inference"))

    def post(self, path: str, payload: Any) -> httpx.Response:
        reply = self.http.post(path, json=payload)
        if reply.status_code >= 500:  # the server closes the connection behind it, maybe only when it is used again
            self.http.close()
            self.http = self._connections()
        return reply

    def ok(self, path: str, payload: Any) -> Any:
        """POST that must succeed; its JSON, or None for an empty body."""
        reply = self.post(path, payload)
        assert reply.status_code == 200, f"POST {path}: {reply.status_code} {reply.text[:500]}"
        return reply.json() if reply.content else None

    def generate(self, input_ids: Any, *, top_level: dict[str, Any] | None = None, **sampling: Any) -> Any:
        """/generate with log-probs."""
        request = {"input_ids": input_ids, "return_logprob": True, "sampling_params": sampling, **(top_level or {})}
        return self.ok("/generate", request)

    def greedy(self, input_ids: Sequence[int], max_new_tokens: int, **sampling: Any) -> Any:
        return self.generate(list(input_ids), temperature=0, max_new_tokens=max_new_tokens, **sampling)

    def stream(self, payload: dict[str, Any], path: str = "/generate") -> "Stream":
        """Start a streaming request in the background."""
        return Stream(self, path, {**payload, "stream": True})

    def background(self, payload: dict[str, Any]) -> "Future[Any]":
        """/generate in another thread."""
        return self._threads.submit(self.ok, "/generate", payload)

    def num_requests(self) -> int:
        loads = self.http.get("/v1/loads", params={"include": "core"}).json()["loads"]
        return sum(rank["num_running_reqs"] + rank["num_waiting_reqs"] for rank in loads)

    def needs_digests(self) -> None:
        """Skip the test where the server cannot tell digests of its weights."""
        if self.info["device"] == "cpu":
            self.needs_newer_sglang_than("0.5.16", "takes digests on a GPU alone")

    def checksums(self) -> dict[str, str]:
        self.needs_digests()
        (rank,) = self.ok("/weights_checker", {"action": "checksum"})["ranks"]
        return dict(rank["checksums"])

    def weight_version(self) -> str:
        return str(self.http.get("/model_info").json()["weight_version"])

    def settle(self) -> None:
        """End what is in flight and let the engine generate."""
        self.ok("/continue_generation", {})
        deadline = time.monotonic() + TIMEOUT_S
        self.post("/abort_request", {"abort_all": True})
        while self.num_requests() > 0:
            assert time.monotonic() < deadline, "requests are in flight long after abort_all"
            time.sleep(0.05)
            self.post("/abort_request", {"abort_all": True})


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


class Stream:
    """A streaming request under way: its events arrive in another thread."""

    def __init__(self, engine: Engine, path: str, payload: dict[str, Any]) -> None:
        self.events: list[dict[str, Any]] = []
        self.status = 0
        self.content_type = ""
        self.is_complete = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._receive, args=(engine.url + path, payload), daemon=True)
        self._thread.start()

    def _receive(self, url: str, payload: dict[str, Any]) -> None:
        with httpx.stream("POST", url, json=payload, timeout=TIMEOUT_S, trust_env=False) as reply:
            self.status, self.content_type = reply.status_code, reply.headers.get("content-type", "")
            for line in reply.iter_lines():
                if line == "data: [DONE]":
                    self.is_complete = True
                elif line.startswith("data:"):
                    assert not self.is_complete, "an event after [DONE]"
                    with self._changed:
                        self.events.append(json.loads(line.removeprefix("data:")))
                        self._changed.notify_all()

    def wait_for_events(self, count: int) -> None:
        with self._changed:
            arrived = self._changed.wait_for(lambda: len(self.events) >= count, TIMEOUT_S)
        assert arrived, f"{len(self.events)} of {count} events after {TIMEOUT_S} s"

    def finish(self) -> list[dict[str, Any]]:
        """All events, once [DONE] has come."""
        self._thread.join(TIMEOUT_S)
        assert self.is_complete, f"status {self.status}: the stream ended without [DONE] after {self.events[-1:]}"
        return self.events

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()


class Reference:
    """A model under transformers in fp32, for log-probs that no engine made."""

    def __init__(self, model_path: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model_path)
        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    @property
    def eos_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], start: int = 0) -> Tensor:
        """[T - start, V] logits that follow each token from position `start`."""
        return self.model(torch.tensor([list(token_ids)])).logits[0, start:].float()

    def log_probs(
        self, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """[N] log-probs of the response's tokens, nats, at `temperature`, and [N, V] of the whole vocabulary."""
        every = self.logits([*prompt, *response], len(prompt) - 1)[:-1].div(temperature).log_softmax(-1)
        return every.gather(1, torch.tensor(list(response))[:, None])[:, 0], every

    @torch.inference_mode()
    def prompt_before_eos(self) -> list[int] | None:
        """A prompt after which the likeliest token is the end of sequence, if one of a few thousand is."""
        random = torch.Generator().manual_seed(0)
        for _ in range(20):
            prompts = torch.randint(3, len(self.tokenizer), (200, 4), generator=random)
            likeliest = self.model(prompts, logits_to_keep=1).logits[:, -1].argmax(-1)
            found = (likeliest == self.eos_id).nonzero()
            if len(found):
                return list(prompts[int(found[0])].tolist())
        return None


def output_log_probs(reply: dict[str, Any]) -> Tensor:
    """[N] log-probs of a reply's tokens, nats; checks that they belong to its output_ids."""
    triples = reply["meta_info"]["output_token_logprobs"]
    assert [token for _, token, _ in triples] == reply["output_ids"]
    return torch.tensor([log_prob for log_prob, _, _ in triples])
