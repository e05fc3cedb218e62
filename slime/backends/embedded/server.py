"""The server process: SGLang's HTTP paths in front of one engine.

python -m slime.backends.embedded.server --model-path DIR --port 30000
"""

import argparse
import asyncio
import hmac
import json
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from slime import __version__
from slime.backends.embedded.control import Control
from slime.backends.embedded.engine import KV_MEMORY_SHARE, Engine, EngineSettings
from slime.backends.embedded.frontend import Frontend
from slime.backends.embedded.openai import OpenAIRoutes
from slime.backends.embedded.protocol import GenerateCall, GenerateItem, SamplingParams, parse_generate
from slime.backends.embedded.text import Codec
from slime.backends.embedded.web import answers_errors, event_stream, json_reply, read_json, until_disconnect
from slime.utils.api_key import KEY_VARIABLE
from slime.utils.memory_utils import settle_objects

logger = logging.getLogger("slime.embedded")

HEALTH_TIMEOUT_S = 20.0
PARENT_POLL_S = 1.0
PR_SET_PDEATHSIG = 1
OPEN_PATHS = ("/health", "/health_generate")
"""Paths that answer without the API key, so that a router can watch the engine."""


class Info:
    """Routes that only tell: health, model, server, load."""

    def __init__(self, frontend: Frontend, control: Control, arguments: argparse.Namespace) -> None:
        self.frontend, self.control, self.arguments = frontend, control, arguments
        self.engine = frontend.engine
        self.created = int(time.time())

    @property
    def served_name(self) -> str:
        """The name that clients see."""
        return self.arguments.served_model_name or self.arguments.model_path

    async def health(self, http: HttpRequest) -> Response:
        """200 while the engine's loop lives and answers."""
        if self.engine.failure is not None:
            return Response(status_code=503)
        return Response(status_code=200)

    async def health_generate(self, http: HttpRequest) -> Response:
        """200 when the loop answers within the deadline, with a token made if nothing else runs."""
        if self.engine.failure is not None:
            return Response(status_code=503)
        is_free = not self.frontend.live and self.frontend.door.is_set() and self.engine.why_unavailable() is None
        if is_free:
            sampling = SamplingParams(max_new_tokens=1, temperature=0.0)
            call = GenerateCall([GenerateItem(f"HEALTH_CHECK_{uuid.uuid4().hex}", None, [0], sampling)], False, False)
            answer: Any = self.frontend.generate(call, asyncio.Event().wait())  # type: ignore[arg-type]
        else:
            answer = self.frontend.run(lambda: None)
        try:
            await asyncio.wait_for(answer, HEALTH_TIMEOUT_S)
        except TimeoutError:
            return Response(status_code=503)
        return Response(status_code=200)

    async def model_info(self, http: HttpRequest) -> Response:
        config = self.engine.model.config
        return json_reply(
            {
                "model_path": self.control.model_path,
                "served_model_name": self.served_name,
                "tokenizer_path": self.arguments.model_path,
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": self.engine.weight_version,
                "load_format": "auto",
                "reasoning_parser": None,
                "tool_call_parser": None,
                "disaggregation_mode": "null",
                "has_image_understanding": False,
                "has_audio_understanding": False,
                "model_type": config.model_type,
                "architectures": config.architectures,
            }
        )

    async def server_info(self, http: HttpRequest) -> Response:
        engine = self.engine
        state = {
            "weight_version": engine.weight_version,
            "memory_usage": {"kv_cache": engine.cache.size_bytes / 2**30, "token_capacity": engine.max_total_tokens},
            "num_steps": engine.steps,
            "num_prompt_tokens": engine.prompt_tokens,
            "num_generated_tokens": engine.generated_tokens,
        }
        arguments = {name: value for name, value in vars(self.arguments).items() if name != "api_key"}
        return json_reply(
            arguments
            | {
                "tokenizer_path": self.arguments.model_path,
                "weights_dir": str(self.control.weights_dir) if self.control.weights_dir else None,
                "served_model_name": self.served_name,
                "context_length": engine.settings.context_length,
                "max_total_tokens": engine.max_total_tokens,
                "max_total_num_tokens": engine.max_total_tokens,
                "max_req_input_len": engine.settings.context_length - 1,
                "device": "cpu",
                "tp_size": 1,
                "pp_size": 1,
                "dp_size": 1,
                "ep_size": 1,
                "disaggregation_mode": "null",
                "internal_states": [state],
                "version": __version__,
                "frontend": "slime-embedded",
            }
        )

    async def models(self, http: HttpRequest) -> Response:
        return json_reply({"object": "list", "data": [self._model_card()]})

    async def model(self, http: HttpRequest) -> Response:
        name = http.path_params["model"]
        if name != self.served_name:
            error = {"type": "invalid_request_error", "param": "model", "code": "model_not_found"}
            return json_reply({"error": {"message": f"The model '{name}' does not exist"} | error}, 404)
        return json_reply(self._model_card())

    def _model_card(self) -> dict[str, Any]:
        return {
            "id": self.served_name,
            "object": "model",
            "created": self.created,
            "owned_by": "slime",
            "root": self.served_name,
            "parent": None,
            "max_model_len": self.engine.settings.context_length,
        }

    async def loads(self, http: HttpRequest) -> Response:
        scheduler, capacity = self.engine.scheduler, self.engine.max_total_tokens
        running, waiting = list(scheduler.running), list(scheduler.waiting)
        used = sum(request.num_tokens for request in running)
        load: dict[str, Any] = {
            "timestamp": time.time(),
            "dp_rank": 0,
            "num_running_reqs": len(running),
            "num_waiting_reqs": len(waiting),
            "num_waiting_uncached_tokens": sum(request.num_tokens for request in waiting),
            "num_used_tokens": used,
            "num_total_tokens": used + sum(request.num_tokens for request in waiting),
            "max_total_num_tokens": capacity,
            "max_running_requests": scheduler.max_running,
            "token_usage": used / capacity,
            "gen_throughput": 0.0,
            "cache_hit_rate": 0.0,
            "utilization": len(running) / scheduler.max_running,
        }
        sections = set(filter(None, http.query_params.get("include", "all").split(",")))
        if sections & {"all", "memory"}:
            load["memory"] = {"kv_cache_gb": self.engine.cache.size_bytes / 2**30, "token_capacity": capacity}
        if sections & {"all", "queues"}:
            retracted = sum(1 for request in waiting if request.num_retractions)
            load["queues"] = {"waiting": len(waiting), "grammar": 0, "paused": 0, "retracted": retracted}
        stamp = datetime.now(UTC).isoformat()
        return json_reply({"timestamp": stamp, "version": __version__, "num_accelerators": 1, "loads": [load]})


class GenerateRoute:
    """POST /generate."""

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend

    async def __call__(self, http: HttpRequest) -> Response:
        call = parse_generate(await read_json(http), self.frontend.engine.model.vocab_size)
        if call.stream:
            return event_stream(self.frontend.stream(call, until_disconnect(http)))
        replies = await self.frontend.generate(call, until_disconnect(http))
        return json_reply(replies if call.is_list else replies[0])


class RequireKey:
    """Middleware: every path but the health checks needs `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self.expected = app, f"Bearer {key}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected.encode()):
                await json_reply({"error": "Unauthorized"}, 401)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def create_app(frontend: Frontend, arguments: argparse.Namespace) -> Starlette:
    """All routes over one engine. Must be called inside a running event loop."""
    weights_dir = Path(arguments.weights_dir).resolve() if arguments.weights_dir else None
    control = Control(frontend, weights_dir)
    info = Info(frontend, control, arguments)
    openai = OpenAIRoutes(frontend, lambda: info.served_name, generation_config(arguments.model_path))
    post, both = ["POST"], ["GET", "POST"]
    table: list[tuple[str, Any, list[str]]] = [
        ("/health", info.health, ["GET"]),
        ("/health_generate", info.health_generate, ["GET"]),
        ("/get_model_info", info.model_info, ["GET"]),
        ("/model_info", info.model_info, ["GET"]),
        ("/get_server_info", info.server_info, ["GET"]),
        ("/server_info", info.server_info, ["GET"]),
        ("/v1/models", info.models, ["GET"]),
        ("/v1/models/{model:path}", info.model, ["GET"]),
        ("/v1/loads", info.loads, ["GET"]),
        ("/generate", GenerateRoute(frontend).__call__, ["POST", "PUT"]),
        ("/v1/completions", openai.completions, post),
        ("/v1/chat/completions", openai.chat, post),
        ("/flush_cache", control.flush_cache, both),
        ("/abort_request", control.abort, post),
        ("/pause_generation", control.pause, post),
        ("/continue_generation", control.resume, post),
        ("/release_memory_occupation", control.release_memory, both),
        ("/resume_memory_occupation", control.resume_memory, both),
        ("/update_weights_from_disk", control.update_from_disk, post),
        ("/update_weights_from_shared_memory", control.update_from_shared_memory, post),
        ("/update_weight_version", control.update_version, post),
        ("/get_weight_version", control.get_version, ["GET"]),
        ("/get_weights_by_name", control.get_weights_by_name, both),
        ("/weights_checker", control.check_weights, both),
    ]
    routes = [Route(path, answers_errors(handler), methods=methods) for path, handler, methods in table]
    middleware = [Middleware(RequireKey, key=arguments.api_key)] if arguments.api_key else []
    return Starlette(routes=routes, middleware=middleware)


def build_parser() -> argparse.ArgumentParser:
    """The flags of the server process."""
    parser = argparse.ArgumentParser(prog="python -m slime.backends.embedded.server", description=__doc__)
    add = parser.add_argument
    add("--model-path", required=True, help="folder in HuggingFace format")
    add("--served-model-name", help="name that clients see; the model path if absent")
    add("--host", default="127.0.0.1", help="address to listen on; one that others can reach needs --api-key")
    add("--port", type=int, default=30000)
    key = os.environ.get(KEY_VARIABLE)
    add("--api-key", default=key, help=f"clients must send it as a bearer token; {KEY_VARIABLE} if absent")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="weights, activations and cache")
    add("--threads", type=int, default=1, help="CPU threads of the model loop")
    add("--weights-dir", help="the only folder that /update_weights_from_shared_memory reads from")
    add("--max-running-requests", type=int, default=64, help="sequences in one step")
    add("--max-total-tokens", type=int, help="positions the key-value cache may hold; by --kv-memory-share if absent")
    add("--kv-memory-share", type=float, default=KV_MEMORY_SHARE, help="largest part of the memory for that cache")
    add("--context-length", type=int, help="longest prompt plus reply; the model's own limit if absent")
    add("--random-seed", type=int, default=0, help="seeds the sampling of requests that bring no sampling_seed")
    add(
        "--enable-deterministic-inference",
        action="store_true",
        help="let a reply, bit by bit, depend on weights, prompt and seed only; refuses to start where it cannot",
    )
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    return parser


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Exit with status 2 and a reason when the flags do not fit together."""
    if arguments.host not in ("127.0.0.1", "localhost", "::1") and not arguments.api_key:
        parser.error(
            f"--host {arguments.host} can be reached by others: add --api-key KEY (or set {KEY_VARIABLE}), "
            "or listen on 127.0.0.1."
        )
    if not (Path(arguments.model_path) / "config.json").is_file():
        parser.error(f"--model-path {arguments.model_path} holds no config.json: give a folder in HuggingFace format.")
    if arguments.threads < 1 or arguments.max_running_requests < 1:
        parser.error("--threads and --max-running-requests must be at least 1.")


def generation_config(model_path: str) -> dict[str, Any]:
    """What the model's folder says about generating with it; empty if nothing."""
    path = Path(model_path) / "generation_config.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def end_tokens_of(model_path: str, config: Any, codec: Codec | None) -> frozenset[int]:
    """Tokens that end a reply: those of generation_config.json, of the model's config and of the tokenizer."""
    tokens = set() if codec is None else codec.end_tokens
    for value in (generation_config(model_path).get("eos_token_id"), getattr(config, "eos_token_id", None)):
        tokens |= {value} if isinstance(value, int) else set(value or ())
    return frozenset(tokens)


class ParentWatch:
    """Ends this process when the one that started it ends.

    The kernel's death signal is sent when the parent's starting thread ends, so it only makes us look whether the
    parent itself is gone; looking every second covers systems without that signal.
    """

    def __init__(self) -> None:
        self.parent = os.getppid()
        if sys.platform == "linux":
            import ctypes

            signal.signal(signal.SIGUSR2, self.look)
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR2)
        self.look()

    def look(self, *_: object) -> None:
        """End the process if it has been adopted by another one."""
        if os.getppid() != self.parent:
            os._exit(0)

    async def poll(self) -> None:
        """Look every second, forever."""
        while True:
            self.look()
            await asyncio.sleep(PARENT_POLL_S)


async def stop_on_failure(engine: Engine, server: Any) -> None:
    """Let the process end when the engine's loop has failed, so that whoever watches it starts another."""
    while engine.failure is None:
        await asyncio.sleep(PARENT_POLL_S)
    logger.error("the engine failed: %r", engine.failure)
    server.should_exit = True


async def serve(arguments: argparse.Namespace, parent: ParentWatch) -> None:
    """Load the model, then answer until the process ends."""
    import torch
    import uvicorn

    from slime.backends.embedded.model import DTYPES, ServedModel
    from slime.backends.embedded.text import load_codec

    torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    model = ServedModel(arguments.model_path, DTYPES[arguments.dtype])
    own_limit = int(model.text_config.max_position_embeddings)
    context_length = min(arguments.context_length or own_limit, own_limit)
    settings = EngineSettings(
        max_running_requests=arguments.max_running_requests,
        context_length=context_length,
        max_total_tokens=arguments.max_total_tokens,
        random_seed=arguments.random_seed,
        threads=arguments.threads,
        kv_memory_share=arguments.kv_memory_share,
        deterministic=arguments.enable_deterministic_inference,
    )
    engine = Engine(model, settings)
    codec = load_codec(arguments.model_path)
    frontend = Frontend(engine, codec, end_tokens_of(arguments.model_path, model.config, codec))
    engine.start()
    logger.info(
        "serving %s in %s on http://%s:%d: context %d tokens, %d sequences, cache of %d tokens; ready after %.1f s",
        arguments.model_path,
        arguments.dtype,
        arguments.host,
        arguments.port,
        context_length,
        settings.max_running_requests,
        engine.max_total_tokens,
        time.perf_counter() - started,
    )
    config = uvicorn.Config(
        create_app(frontend, arguments),
        host=arguments.host,
        port=arguments.port,
        log_level="warning" if arguments.log_level == "info" else arguments.log_level,
        timeout_graceful_shutdown=2,
        lifespan="off",
    )
    watch = asyncio.create_task(parent.poll())
    server = uvicorn.Server(config)
    failed = asyncio.create_task(stop_on_failure(engine, server))
    settle_objects()
    await server.serve()
    watch.cancel()
    failed.cancel()
    if engine.failure is not None:
        raise SystemExit(1)
    engine.stop()


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the process."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    check_arguments(parser, arguments)
    logging.basicConfig(level=arguments.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    asyncio.run(serve(arguments, ParentWatch()))


if __name__ == "__main__":
    main()
