"""Small pieces that every route uses: JSON in and out, errors worded as by the stock server, clients that leave."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from slime.backends.embedded.frontend import Disconnected
from slime.backends.embedded.protocol import RequestError
from slime.backends.embedded.weights import WeightError

CLIENT_CLOSED_REQUEST = 499
Handler = Callable[[HttpRequest], Awaitable[Response]]


def json_reply(content: Any, status: int = 200) -> Response:
    """A JSON response."""
    return Response(orjson.dumps(content), status_code=status, media_type="application/json")


def bad_body(message: str) -> RequestError:
    """A body that does not have the route's form, in the stock server's envelope."""
    body = {"object": "error", "message": message, "type": "Bad Request", "param": None, "code": 400}
    return RequestError(message, body=body)


async def read_json(http: HttpRequest, *, default: Any = None) -> Any:
    """The JSON body; `default` for an empty one. Raises `RequestError` when it is not JSON or absent."""
    raw = await http.body()
    if not raw.strip():
        if default is not None:
            return default
        raise bad_body(f"{http.method} {http.url.path} needs a JSON body, but the body is empty.")
    try:
        return json.loads(raw)
    except ValueError as error:
        raise bad_body(f"{http.method} {http.url.path} needs a JSON body, but this is none: {error}.") from error


async def read_object(http: HttpRequest, **fields: type | tuple[type, ...]) -> dict[str, Any]:
    """A JSON object (an empty body is one); `fields` says the type that a given field must have."""
    body = await read_json(http, default={})
    if not isinstance(body, dict):
        raise bad_body(f"{http.url.path} needs a JSON object, got {type(body).__name__}.")
    for name, kind in fields.items():
        value = body.get(name)
        if value is not None and not isinstance(value, kind):
            expected = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise bad_body(f"{http.url.path}: `{name}` must be {expected}, got {value!r}.")
    return body


def required(body: dict[str, Any], name: str, path: str) -> Any:
    """A field that must be there."""
    if body.get(name) is None:
        raise bad_body(f"{path}: field `{name}` is required, got {sorted(body)}.")
    return body[name]


async def until_disconnect(http: HttpRequest) -> None:
    """Return when the client has closed its connection; the body must have been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def event_stream(replies: AsyncIterator[Any]) -> Response:
    """Server-sent events: `data: {...}` for each reply, then `data: [DONE]`; an error becomes the last event."""

    async def events() -> AsyncIterator[bytes]:
        try:
            async for reply in replies:
                yield b"data: " + (reply if isinstance(reply, bytes) else orjson.dumps(reply)) + b"\n\n"
        except Disconnected:
            return
        except RequestError as error:
            content = {"message": str(error), "type": "invalid_request_error", "code": error.status, "retryable": False}
            yield b"data: " + orjson.dumps({"error": content}) + b"\n\n"
        yield b"data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def answers_errors(handler: Handler) -> Handler:
    """The handler with refusals turned into JSON and a client that left into a closed connection."""

    async def wrapped(http: HttpRequest) -> Response:
        try:
            return await handler(http)
        except Disconnected:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        except RequestError as error:
            return json_reply(error.body, error.status)
        except WeightError as error:
            return json_reply({"success": False, "message": str(error)}, 400)

    return wrapped
