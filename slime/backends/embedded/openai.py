"""OpenAI's completions and chat completions, in the shapes of SGLang's server."""

import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from slime.backends.embedded.frontend import Frontend
from slime.backends.embedded.protocol import GenerateCall, RequestError, parse_generate
from slime.backends.embedded.web import event_stream, json_reply, read_json, until_disconnect

SAME_NAME = (
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "stop",
    "stop_token_ids",
    "stop_regex",
    "regex",
    "ebnf",
    "json_schema",
    "logit_bias",
    "n",
    "no_stop_trim",
    "ignore_eos",
    "skip_special_tokens",
)
"""Fields that mean the same in sampling_params."""
MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Fields whose default comes from the model's generation_config.json."""
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
NOT_SERVED = ("tools", "response_format", "session_params", "return_hidden_states", "echo", "suffix")


def openai_error(message: str, status: int = 400) -> RequestError:
    """A refusal in the envelope of the OpenAI routes."""
    body = {"object": "error", "message": message, "type": "BadRequestError", "param": None, "code": status}
    return RequestError(message, status=status, body=body)


class OpenAIRoutes:
    """POST /v1/completions and /v1/chat/completions over one engine."""

    def __init__(self, frontend: Frontend, served_name: Callable[[], str], defaults: dict[str, Any]) -> None:
        self.frontend, self.served_name = frontend, served_name
        self.defaults = {name: defaults[name] for name in MODEL_DEFAULTS if defaults.get(name) is not None}

    async def chat(self, http: HttpRequest) -> Response:
        """Messages in, an assistant's message out."""
        body = _body(await read_json(http))
        call = self._call(body, {"input_ids": self._chat_prompt(body)}, wants_log_probs=bool(body.get("logprobs")))
        model = body.get("model") or self.served_name()
        if call.stream:
            return event_stream(self._chat_stream(call, body, model, http))
        replies = await self._replies(call, http)
        choices = [
            {
                "index": index,
                "message": {
                    "role": "assistant",
                    "content": reply["text"],
                    "reasoning_content": None,
                    "tool_calls": None,
                },
                "logprobs": self._chat_log_probs(reply, 0) if body.get("logprobs") else None,
                **_ending(reply),
            }
            for index, reply in enumerate(replies)
        ]
        return json_reply(_whole("chat.completion", model, choices, replies, call))

    async def completions(self, http: HttpRequest) -> Response:
        """A prompt in, its continuation out."""
        body = _body(await read_json(http))
        prompt = body.get("prompt")
        if prompt is None:
            raise openai_error("`prompt` is required.")
        first = prompt[0] if isinstance(prompt, list) and prompt else prompt
        given = {"text": prompt} if isinstance(first, str) else {"input_ids": prompt}
        body.setdefault("max_tokens", 16)
        call = self._call(body, given, wants_log_probs=body.get("logprobs") is not None)
        model = body.get("model") or self.served_name()
        if call.stream:
            return event_stream(self._text_stream(call, body, model, http))
        replies = await self._replies(call, http)
        choices = [
            {
                "index": index,
                "text": reply["text"],
                "logprobs": self._text_log_probs(reply, 0) if body.get("logprobs") is not None else None,
                **_ending(reply),
            }
            for index, reply in enumerate(replies)
        ]
        return json_reply(_whole("text_completion", model, choices, replies, call))

    # Requests

    def _chat_prompt(self, body: dict[str, Any]) -> list[int]:
        if body.get("input_ids") is not None:
            return list(body["input_ids"])
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise openai_error("`messages` must be a list of at least one {'role', 'content'} object.")
        for message in messages:
            if not isinstance(message, dict) or message.get("role") not in ROLES:
                raise openai_error(f"Each message must be an object whose role is one of {ROLES}, got {message!r}.")
        codec = self.frontend.codec
        if codec is None or not codec.tokenizer.chat_template:
            raise openai_error(
                "The served folder has no chat template, so messages cannot be put together: use /v1/completions."
            )
        continues = bool(body.get("continue_final_message"))
        try:
            return codec.apply_chat_template(
                [_flattened(message) for message in messages],
                add_generation_prompt=not continues,
                continue_final_message=continues,
                **(body.get("chat_template_kwargs") or {}),
            )
        except Exception as error:  # templates raise what they like: it is about the messages
            raise openai_error(f"The chat template refused the messages: {error}") from error

    def _call(self, body: dict[str, Any], prompt: dict[str, Any], *, wants_log_probs: bool) -> GenerateCall:
        if self.frontend.codec is None:
            raise openai_error("The served folder has no tokenizer: use /generate with input_ids.")
        for name in NOT_SERVED:
            if body.get(name) and body.get(name) != {"type": "text"}:
                raise openai_error(f"The embedded engine cannot honour `{name}`. Remove it.")
        sampling = {name: body[name] for name in SAME_NAME if body.get(name) is not None}
        sampling = self.defaults | sampling
        sampling["max_new_tokens"] = body.get("max_completion_tokens") or body.get("max_tokens")
        sampling["min_new_tokens"] = body.get("min_tokens") or 0
        sampling["sampling_seed"] = body.get("seed")
        top = body.get("top_logprobs") if "messages" in body or "input_ids" in body else body.get("logprobs")
        request = prompt | {
            "sampling_params": sampling,
            "stream": bool(body.get("stream")),
            "rid": body.get("rid"),
            "return_logprob": wants_log_probs,
            "top_logprobs_num": int(top or 0),
            "return_text_in_logprobs": True,
        }
        try:
            return parse_generate(request, self.frontend.engine.model.vocab_size)
        except RequestError as error:
            raise openai_error(str(error), error.status) from error

    async def _replies(self, call: GenerateCall, http: HttpRequest) -> list[dict[str, Any]]:
        try:
            return await self.frontend.generate(call, until_disconnect(http))
        except RequestError as error:
            raise openai_error(str(error), error.status) from error

    # Streams

    async def _chat_stream(
        self, call: GenerateCall, body: dict[str, Any], model: str, http: HttpRequest
    ) -> AsyncIterator[dict[str, Any]]:
        stream = _Stream("chat.completion.chunk", model)
        async for reply in self.frontend.stream(call, until_disconnect(http)):
            index = reply.get("index", 0)
            if index not in stream.shown:
                yield stream.event(reply, {"index": index, "delta": _delta(role="assistant", content="")})
            new, first_token = stream.advance(index, reply)
            log_probs = self._chat_log_probs(reply, first_token) if body.get("logprobs") else None
            if new or (log_probs and log_probs["content"]):
                yield stream.event(reply, {"index": index, "delta": _delta(content=new), "logprobs": log_probs})
            if reply["meta_info"]["finish_reason"]:
                yield stream.event(reply, {"index": index, "delta": _delta(), **_ending(reply)})
        if (body.get("stream_options") or {}).get("include_usage"):
            yield stream.usage(call)

    async def _text_stream(
        self, call: GenerateCall, body: dict[str, Any], model: str, http: HttpRequest
    ) -> AsyncIterator[dict[str, Any]]:
        stream = _Stream("text_completion", model)
        async for reply in self.frontend.stream(call, until_disconnect(http)):
            index = reply.get("index", 0)
            new, first_token = stream.advance(index, reply)
            log_probs = self._text_log_probs(reply, first_token) if body.get("logprobs") is not None else None
            yield stream.event(reply, {"index": index, "text": new, "logprobs": log_probs, **_ending(reply)})
        if (body.get("stream_options") or {}).get("include_usage"):
            yield stream.usage(call)

    # Log-probs

    def _chat_log_probs(self, reply: dict[str, Any], first: int) -> dict[str, Any]:
        meta = reply["meta_info"]
        tops = meta.get("output_top_logprobs") or [None] * len(meta["output_token_logprobs"])
        return {
            "content": [
                _token_entry(entry) | {"top_logprobs": [_token_entry(other) for other in top or []]}
                for entry, top in list(zip(meta["output_token_logprobs"], tops, strict=True))[first:]
            ]
        }

    def _text_log_probs(self, reply: dict[str, Any], first: int) -> dict[str, Any]:
        meta = reply["meta_info"]
        entries = meta["output_token_logprobs"][first:]
        tops = (meta.get("output_top_logprobs") or [])[first:]
        return {
            "text_offset": [-1] * len(entries),
            "token_logprobs": [entry[0] for entry in entries],
            "tokens": [entry[2] for entry in entries],
            "top_logprobs": [{other[2]: other[0] for other in top} for top in tops],
        }


class _Stream:
    """What a stream has shown so far, by choice."""

    def __init__(self, kind: str, model: str) -> None:
        self.kind, self.model, self.created = kind, model, int(time.time())
        self.shown: dict[int, int] = {}
        self.tokens: dict[int, int] = {}
        self.last: dict[int, dict[str, Any]] = {}
        self.id = ""

    def advance(self, index: int, reply: dict[str, Any]) -> tuple[str, int]:
        """(text that is new, number of tokens shown before)."""
        start, first_token = self.shown.get(index, 0), self.tokens.get(index, 0)
        self.shown[index] = max(start, len(reply["text"]))
        self.tokens[index] = reply["meta_info"]["completion_tokens"]
        self.last[index] = reply
        return reply["text"][start:], first_token

    def event(self, reply: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
        self.id = reply["meta_info"]["id"]
        choice = {"logprobs": None, "finish_reason": None, "matched_stop": None} | choice
        return self._event([choice], None)

    def usage(self, call: GenerateCall) -> dict[str, Any]:
        return self._event([], _usage([self.last[index] for index in sorted(self.last)], call))

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": usage,
        }


def _body(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise openai_error(f"The body must be a JSON object, got {type(body).__name__}.")
    return dict(body)


def _flattened(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is text, also when it came as a list of text parts."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise openai_error(f"The embedded engine reads text only, got a content part {part!r}.")
        parts.append(part["text"])
    return message | {"content": "".join(parts)}


def _delta(role: str | None = None, content: str | None = None) -> dict[str, Any]:
    return {"role": role, "content": content, "reasoning_content": None}


def _ending(reply: dict[str, Any]) -> dict[str, Any]:
    finish = reply["meta_info"]["finish_reason"] or {}
    return {"finish_reason": finish.get("type"), "matched_stop": finish.get("matched")}


def _token_entry(entry: list[Any]) -> dict[str, Any]:
    log_prob, _, text = entry
    return {"token": text, "bytes": list(text.encode()), "logprob": log_prob}


def _usage(replies: list[dict[str, Any]], call: GenerateCall) -> dict[str, Any]:
    n = call.items[0].sampling.n
    prompt = sum(reply["meta_info"]["prompt_tokens"] for reply in replies[::n])
    completion = sum(reply["meta_info"]["completion_tokens"] for reply in replies)
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": None,
        "reasoning_tokens": 0,
    }


def _whole(
    kind: str, model: str, choices: list[dict[str, Any]], replies: list[dict[str, Any]], call: GenerateCall
) -> dict[str, Any]:
    meta = replies[0]["meta_info"]
    return {
        "id": meta["id"],
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": _usage(replies, call),
        "metadata": {"weight_version": meta["weight_version"], "weight_versions": meta["weight_versions"]},
    }
