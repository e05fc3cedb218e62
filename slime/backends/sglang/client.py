"""The control side of one engine over SGLang's HTTP protocol, as trainer, weight sync and process room need it.

Works for SGLang servers (0.5.16 to 0.5.23) and for the embedded engine. Prompts do not go through here: they go
through the router.
"""

import time
from collections.abc import Sequence
from typing import Any

import httpx

from slime.utils.api_key import api_key as the_runs_key
from slime.utils.api_key import control_header, key_header
from slime.utils.http_client import tls_context
from slime.utils.server_control import num_requests_from_load
from slime.weight_sync.base import EngineError

_FLUSH_RETRY_S = 0.02
_HEALTH_TIMEOUT_S = 5.0
_KEEPALIVE_S = 3.0  # less than the five seconds after which a server closes an idle connection, maybe under a request
_MAX_REPLY_CHARS = 1500


class SGLangClient:
    """Calls to one engine, each with a deadline; every failure is an `EngineError` that names engine, call and reply.

    May be used from several threads at once.
    """

    def __init__(self, base_url: str, name: str, timeout_s: float = 120.0, api_key: str | None = None) -> None:
        """
        Args:
            base_url: e.g. http://127.0.0.1:15000.
            name: how errors call the engine, e.g. "engine 0".
            timeout_s: of each call; loading a large model's weights from a disk needs more than the default.
            api_key: sent as a bearer token (SGLang's --api-key); the run's if absent. Calls that change something
                show the run's admin key where there is one.
        """
        self.name = name
        self.url = base_url.rstrip("/")
        self._timeout_s = timeout_s
        headers = key_header(api_key or the_runs_key())
        control = {} if api_key else control_header()
        self._control = {} if control == headers else control
        # Engines are ours and near: a proxy of the environment must not come between.
        self._http = httpx.Client(
            base_url=self.url,
            headers=headers,
            timeout=timeout_s,
            limits=httpx.Limits(keepalive_expiry=_KEEPALIVE_S),
            trust_env=False,
            verify=tls_context(),
        )

    def health(self) -> bool:
        """Whether it answers /health with 200; false, not an error, where nothing listens."""
        try:
            return self._http.get("/health", timeout=min(_HEALTH_TIMEOUT_S, self._timeout_s)).status_code == 200
        except httpx.HTTPError:
            return False

    def server_info(self) -> dict[str, Any]:
        return self._get_json("/server_info")

    def cache_tokens(self) -> int:
        """Tokens for whose keys and values it has room."""
        info = self.server_info()
        try:
            return int(info["max_total_num_tokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._error("GET /server_info", f"200 without max_total_num_tokens: {str(info)[:200]}") from error

    def num_requests(self) -> int:
        """Requests running or waiting."""
        load = self._get_json("/v1/loads", {"include": "core"})
        try:
            return num_requests_from_load(load)
        except ValueError as error:
            raise self._error("GET /v1/loads", str(error)) from error

    def abort(self, rid: str | None = None) -> None:
        """End one request, or all of them when `rid` is None; each is answered with what it has so far."""
        self._post("/abort_request", {"abort_all": True} if rid is None else {"rid": rid})

    def pause(self, mode: str = "abort") -> None:
        """Stop generating; new requests wait until `resume`.

        Args:
            mode: for requests in flight: "abort" ends them with what they have, "retract" queues them again (their
                keys and values are computed anew afterwards), "in_place" freezes them.
        """
        self._post("/pause_generation", {"mode": mode})

    def resume(self) -> None:
        self._post("/continue_generation", {})

    def flush_cache(self, *, only_if_idle: bool = False) -> None:
        """Forget all keys and values.

        Asked again for `timeout_s` while the engine still clears aborted requests; with `only_if_idle` once, and an
        engine that has requests keeps its cache.
        """
        deadline = time.monotonic() + self._timeout_s
        while True:
            reply = self._send("POST", "/flush_cache", None)
            if reply.status_code == 200 or (only_if_idle and reply.status_code == 400):
                return
            if reply.status_code != 400 or time.monotonic() > deadline:
                raise self._error("POST /flush_cache", _describe(reply))
            time.sleep(_FLUSH_RETRY_S)

    def warm_up(self, sampling_params: dict[str, Any]) -> None:
        """Generate a token, so that what these sampling parameters need is compiled."""
        self._post("/generate", {"input_ids": [1], "sampling_params": {**sampling_params, "max_new_tokens": 1}})

    def release_memory(self, tags: Sequence[str] | None = None) -> None:
        """Give back the memory of `tags` ("weights", "kv_cache", "cuda_graph"; None is all), once the engine is idle.

        SGLang's scheduler ends itself where this finds it at work, and it is for a step of the model after the last
        reply was sent. A flush is what it refuses then, and what it would do by itself.
        """
        self.flush_cache()
        self._post("/release_memory_occupation", {} if tags is None else {"tags": list(tags)})

    def resume_memory(self, tags: Sequence[str] | None = None) -> None:
        """Take the memory of `tags` again. Released weights come back undefined: send them before generating."""
        self._post("/resume_memory_occupation", {} if tags is None else {"tags": list(tags)})

    def update_weights_from_disk(self, path: str, version: str) -> None:
        """Load a HuggingFace folder that the engine's host sees under `path`; its cache is left to `flush_cache`."""
        request = {"model_path": path, "weight_version": version, "flush_cache": False}
        self._post("/update_weights_from_disk", request)

    def update_weights_from_shared_memory(self, manifest: dict[str, Any]) -> None:
        """Hand over one bucket through a file in memory (embedded engine only)."""
        self._post("/update_weights_from_shared_memory", manifest)

    def init_weights_update_group(
        self, *, master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None:
        """Join a process group for weights. Returns only when all its ranks have joined: call on all engines at once,
        while this side joins as rank 0 (`slime.weight_sync.process_group.join`)."""
        request = {
            "master_address": master_address,
            "master_port": master_port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group_name,
            "backend": backend,
        }
        self._post("/init_weights_update_group", request)

    def begin_weight_update(self) -> None:
        """Open the session in which newer SGLang takes tensors; older servers need none, and have no such path.

        A session that a failed sync left open is closed first.
        """
        reply = self._send("POST", "/begin_weight_update", {})
        if reply.status_code == 400 and "already open" in reply.text:
            self.end_weight_update()
            reply = self._send("POST", "/begin_weight_update", {})
        if reply.status_code not in (404, 405):
            self._checked("POST /begin_weight_update", reply)

    def end_weight_update(self) -> None:
        """Close the session of `begin_weight_update`: the engine finishes what it derives from its weights."""
        reply = self._send("POST", "/end_weight_update", {})
        if reply.status_code not in (404, 405):
            self._checked("POST /end_weight_update", reply)

    def update_weights_from_distributed(
        self,
        *,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str,
        weight_version: str | None = None,
    ) -> None:
        """Receive tensors by one broadcast of their bytes, one after another, from rank 0 of the group; returns when
        they are loaded.

        Call it between `begin_weight_update` and `end_weight_update`, on all engines at once, while rank 0 broadcasts.

        Args:
            names: HuggingFace names.
            dtypes: e.g. "bfloat16".
        """
        request: dict[str, Any] = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
            "group_name": group_name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        if weight_version is not None:
            request["weight_version"] = weight_version
        self._post("/update_weights_from_distributed", request)

    def update_weights_from_tensor(self, payloads: Sequence[str]) -> None:
        """Load a flattened bucket out of memory that this process shares (`slime.weight_sync.ipc.payload`).

        Call it between `begin_weight_update` and `end_weight_update`, with one payload a tensor-parallel rank.
        """
        request = {"serialized_named_tensors": list(payloads), "load_format": "flattened_bucket", "flush_cache": False}
        self._post("/update_weights_from_tensor", request)

    def destroy_weights_update_group(self, group_name: str) -> None:
        """Leave a process group; one that the engine does not know is left already."""
        reply = self._send("POST", "/destroy_weights_update_group", {"group_name": group_name})
        if reply.status_code != 200 and "does not exist" not in reply.text:
            raise self._error("POST /destroy_weights_update_group", _describe(reply))

    def checksums(self) -> dict[str, str]:
        """The engine's tensor name -> digest of the memory that computes, taken now.

        With several tensor-parallel ranks the names begin with `tp0:`, `tp1:`, ...
        """
        body = self._post("/weights_checker", {"action": "checksum"})
        try:
            ranks = [dict(rank["checksums"]) for rank in body["ranks"]]
        except (TypeError, KeyError) as error:
            raise self._error("POST /weights_checker", f"200 without ranks[*].checksums: {str(body)[:200]}") from error
        if len(ranks) == 1:
            return ranks[0]
        return {f"tp{rank}:{name}": value for rank, sums in enumerate(ranks) for name, value in sums.items()}

    def model_info(self) -> dict[str, Any]:
        """Which model it serves: folder, family, version of the weights."""
        return self._get_json("/model_info")

    def weight_version(self) -> str:
        """The version label that the engine puts into its replies."""
        body = self.model_info()
        if "weight_version" not in body:
            raise self._error("GET /model_info", f"200 without weight_version: {str(body)[:200]}")
        return str(body["weight_version"])

    def set_weight_version(self, version: str) -> None:
        """Change the label only; no weight moves."""
        self._post("/update_weight_version", {"new_version": version, "abort_all_requests": False})

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def _get_json(self, path: str, query: dict[str, str] | None = None) -> dict[str, Any]:
        reply = self._send("GET", path, None, query)
        return dict(self._checked(f"GET {path}", reply))

    def _post(self, path: str, payload: dict[str, Any]) -> Any:
        return self._checked(f"POST {path}", self._send("POST", path, payload))

    def _send(
        self, method: str, path: str, payload: dict[str, Any] | None, query: dict[str, str] | None = None
    ) -> httpx.Response:
        control = self._control if method == "POST" else {}
        reply = self._sent(method, path, payload, query, control)
        if reply.status_code == 401 and control:
            # Only paths that SGLang has can ask for the admin's key: one that it does not have asks for the run's.
            reply = self._sent(method, path, payload, query, {})
        return reply

    def _sent(
        self,
        method: str,
        path: str,
        payload: dict[str, Any] | None,
        query: dict[str, str] | None,
        headers: dict[str, str],
    ) -> httpx.Response:
        started = time.monotonic()
        try:
            return self._http.request(method, path, json=payload, params=query, headers=headers)
        except httpx.TimeoutException as error:
            waited_s = time.monotonic() - started
            raise self._error(f"{method} {path}", f"no answer within {waited_s:.1f} s") from error
        except httpx.HTTPError as error:
            raise self._error(f"{method} {path}", f"no connection ({error})") from error

    def _checked(self, call: str, reply: httpx.Response) -> Any:
        """The reply's JSON (None for an empty body); a status other than 2xx or `success: false` is an error."""
        if not reply.is_success:
            raise self._error(call, _describe(reply))
        if not reply.content:
            return None
        try:
            body = reply.json()
        except ValueError as error:
            raise self._error(call, f"{_describe(reply)} (not JSON)") from error
        if isinstance(body, dict) and body.get("success") is False:
            raise self._error(call, _describe(reply))
        return body

    def _error(self, call: str, what_happened: str) -> EngineError:
        return EngineError(f"{self.name} ({self.url}) was asked {call}: {what_happened}")


def _describe(reply: httpx.Response) -> str:
    text = " ".join(reply.text.split())
    return f"{reply.status_code} {text[:_MAX_REPLY_CHARS]}".rstrip()
