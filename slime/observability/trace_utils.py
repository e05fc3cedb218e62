"""Traces: what happened to a sample and when, kept on the sample itself as spans and events.

`sample.trace` is a plain dict (the carrier), so a trace travels wherever the sample goes:
`{"version": 1, "trace_id", "events": [...], "sample_id", "group_id", "attempt"}`. An event is `{"type": "span_start" |
"span_end" | "event", "name", "ts" (s since 1970), "trace_id", "sample_id", "group_id", "attempt"}` and, where it
applies, `span_id`, `parent_span_id` and `attrs`. Tracing never raises: what goes wrong is logged once.
"""

import copy
import functools
import inspect
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any

from slime.observability.trace_sglang import CHILDREN_KEY, build_sglang_meta_trace_attrs

__all__ = [
    "TraceHandle",
    "TraceSpanContext",
    "bind_trace",
    "bind_trace_carrier",
    "build_sglang_meta_trace_attrs",
    "export_trace",
    "import_trace",
    "trace_event",
    "trace_function",
    "trace_next_attempt",
    "trace_span",
]

logger = logging.getLogger(__name__)

TRACE_VERSION = 1
_warned: set[str] = set()


@dataclass
class TraceHandle:
    """A place to write events to: one sample's carrier, and the span to nest below when there is no open one."""

    trace_id: str
    carrier: dict[str, Any]
    sample_id: int | str | None = None
    group_id: int | str | None = None
    attempt: int = 0
    parent_span_id: str | None = None


@dataclass
class TraceSpanContext:
    """What `trace_span` yields: attributes set here are written when the span ends."""

    name: str
    attrs: dict[str, Any] = field(default_factory=dict)

    def set(self, key: str, value: Any) -> None:
        self.attrs[key] = value

    def update(self, attrs: Mapping[str, Any]) -> None:
        self.attrs.update(attrs)

    set_attr = set
    update_attrs = update


@dataclass(frozen=True)
class _OpenSpan:
    """The innermost open span: which handles it writes to, and its id in each trace."""

    handles: list[TraceHandle]
    span_ids: dict[str, str]


_open_span: ContextVar[_OpenSpan | None] = ContextVar("slime_open_span", default=None)


def bind_trace(sample: Any) -> TraceHandle:
    """The handle of a sample; gives the sample a trace if it has none."""
    found: Any = getattr(sample, "trace", None)
    carrier: dict[str, Any] = found if _is_carrier(found) else _new_carrier()
    with _never_raising("bind_trace"):
        carrier["sample_id"] = getattr(sample, "index", None)
        carrier["group_id"] = getattr(sample, "group_index", None)
        sample.trace = carrier
    return _handle(carrier)


def bind_trace_carrier(
    carrier: dict[str, Any] | None,
    *,
    trace_id: str | None = None,
    sample_id: int | str | None = None,
    group_id: int | str | None = None,
    attempt: int = 0,
    parent_span_id: str | None = None,
) -> TraceHandle:
    """The handle of a carrier that no sample holds; None makes a new one. Arguments fill what the carrier lacks."""
    bound: dict[str, Any] = carrier if carrier is not None and _is_carrier(carrier) else _new_carrier(trace_id)
    for key, value in (("sample_id", sample_id), ("group_id", group_id)):
        if bound.get(key) is None:
            bound[key] = value
    bound["attempt"] = max(int(bound.get("attempt") or 0), attempt)
    return _handle(bound, parent_span_id)


def export_trace(target: Any) -> Any:
    """A copy of a target's carrier to send elsewhere, with the open span as its parent; a list gives a list."""
    if isinstance(target, list | tuple):
        return [export_trace(item) for item in target]
    handles = _handles_of(target)
    if not handles:
        return None
    carrier = copy.deepcopy(handles[0].carrier)
    if parent := _parent_of(handles[0]):
        carrier["parent_span_id"] = parent
    return carrier


def import_trace(carrier: dict[str, Any] | None) -> TraceHandle:
    """The handle of an exported carrier: its spans go below the span that was open at the export."""
    parent = carrier.get("parent_span_id") if isinstance(carrier, dict) else None
    return bind_trace_carrier(carrier, parent_span_id=parent)


def trace_next_attempt(target: Any) -> None:
    """Marks that a target starts anew (a retried or recycled sample): later events carry the next attempt."""
    with _never_raising("trace_next_attempt"):
        for handle in _handles_of(target):
            handle.attempt = handle.carrier["attempt"] = int(handle.carrier.get("attempt") or 0) + 1


def trace_event(target: Any, name: str, *, attrs: Mapping[str, Any] | None = None) -> None:
    """Writes a point in time; target None means the open span's."""
    with _never_raising("trace_event"):
        for handle in _handles_of(target):
            parent = _parent_of(handle)
            _write(handle, "event", name, time.time(), parent_span_id=parent, attrs=dict(attrs or {}))


@contextmanager
def trace_span(
    target: Any, name: str, *, attrs: Mapping[str, Any] | None = None, record_error: bool = True
) -> Iterator[TraceSpanContext]:
    """Writes the start and end of a block.

    Args:
        target: a sample, a handle, an object that holds samples, or a list of these; None means the open span's.
        attrs: written with the start; what the block sets on the yielded context is written with the end.
        record_error: an exception that leaves the block adds `error_type` and `error_message` to the end.
    """
    context = TraceSpanContext(name)
    started = _start_spans(target, name, attrs)
    token = _open_span.set(started[0]) if started else None
    try:
        yield context
    except BaseException as error:
        if record_error:
            context.update({"error_type": type(error).__name__, "error_message": str(error)})
        raise
    finally:
        if token is not None and started:
            _close(token)
            _end_spans(started[0], name, started[1], context.attrs)


def trace_function(
    name: str,
    *,
    target: str | None = None,
    target_getter: Callable[..., Any] | None = None,
    attrs_getter: Callable[..., Mapping[str, Any]] | None = None,
    record_error: bool = True,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that writes a span for each call of a function or coroutine function.

    Args:
        target: name of the parameter that holds the target. A name that the function does not have: the call is
            not traced, and a warning says so.
        target_getter: called with the call's arguments, gives the target.
        attrs_getter: called with the call's arguments, gives the span's attributes.
        record_error: as in `trace_span`.

    With neither target nor target_getter the first argument that can be traced is taken (a warning says so, once),
    else the open span's target.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        def span(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            found = _call_target(name, signature, target, target_getter, args, kwargs)
            attrs = _safely(attrs_getter, args, kwargs) if attrs_getter else None
            return trace_span(found, name, attrs=attrs, record_error=record_error)

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def traced_coroutine(*args: Any, **kwargs: Any) -> Any:
                with span(args, kwargs):
                    return await function(*args, **kwargs)

            return traced_coroutine

        @functools.wraps(function)
        def traced(*args: Any, **kwargs: Any) -> Any:
            with span(args, kwargs):
                return function(*args, **kwargs)

        return traced

    return decorate


_NOTHING: list[Any] = []
"""The target of a call that is not traced: a list without samples."""


def _call_target(
    name: str,
    signature: inspect.Signature,
    target: str | None,
    target_getter: Callable[..., Any] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The target of one call; None for the open span's, _NOTHING for none at all."""
    if target_getter is not None:
        found = _safely(target_getter, args, kwargs)
        return _NOTHING if found is None else found
    try:
        arguments = signature.bind_partial(*args, **kwargs).arguments
    except TypeError:
        return _NOTHING  # the call itself is about to fail with this error
    if target is not None:
        if target not in signature.parameters:
            _warn_once(f"trace_function({name!r})", f"the function has no parameter {target!r}; it is not traced")
            return _NOTHING
        return arguments.get(target, _NOTHING)
    for key, value in arguments.items():
        if _is_target(value):
            _warn_once(f"trace_function({name!r})", f"no target was given; the argument {key!r} is taken")
            return value
    return None


def _safely(getter: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with _never_raising(getattr(getter, "__name__", "getter")):
        return getter(*args, **kwargs)
    return None


def _start_spans(target: Any, name: str, attrs: Mapping[str, Any] | None) -> tuple[_OpenSpan, float] | None:
    with _never_raising("trace_span"):
        handles = _handles_of(target)
        if not handles:
            return None
        now, span_ids = time.time(), {}
        for handle in handles:
            span_id = span_ids[handle.trace_id] = _new_id()
            parent = _parent_of(handle)
            _write(handle, "span_start", name, now, span_id=span_id, parent_span_id=parent, attrs=dict(attrs or {}))
        return _OpenSpan(handles, span_ids), now
    return None


def _close(token: Token[_OpenSpan | None]) -> None:
    try:
        _open_span.reset(token)
    except ValueError as error:  # the block was entered in another context, as async generators do
        _open_span.set(None)
        _warn_once("trace_span", error)


def _end_spans(span: _OpenSpan, name: str, start_ts: float, attrs: dict[str, Any]) -> None:
    with _never_raising("trace_span"):
        own = {key: value for key, value in attrs.items() if key != CHILDREN_KEY}
        now = time.time()
        for handle in span.handles:
            span_id = span.span_ids[handle.trace_id]
            _write_children(handle, attrs.get(CHILDREN_KEY) or [], span_id, start_ts)
            _write(handle, "span_end", name, now, span_id=span_id, parent_span_id=_parent_of(handle), attrs=own)


def _write_children(handle: TraceHandle, children: list[dict[str, Any]], parent: str, start_ts: float) -> None:
    for child in children:
        begin = start_ts + float(child.get("offset", 0.0))
        attrs = child.get("attrs") or {}
        if child.get("type") == "event":
            _write(handle, "event", child["name"], begin, parent_span_id=parent, attrs=attrs)
            continue
        ids = {"span_id": _new_id(), "parent_span_id": parent}
        _write(handle, "span_start", child["name"], begin, attrs=attrs, **ids)
        _write_children(handle, child.get("children") or [], ids["span_id"], start_ts)
        _write(handle, "span_end", child["name"], begin + float(child.get("duration", 0.0)), attrs={}, **ids)


def _write(handle: TraceHandle, kind: str, name: str, ts: float, *, attrs: dict[str, Any], **ids: str | None) -> None:
    event: dict[str, Any] = {"type": kind, "name": name, "ts": ts, "trace_id": handle.trace_id}
    event |= {key: handle.carrier.get(key) for key in ("sample_id", "group_id", "attempt")}
    event |= {key: value for key, value in ids.items() if value is not None}
    if attrs:
        event["attrs"] = attrs
    handle.carrier["events"].append(event)


def _parent_of(handle: TraceHandle) -> str | None:
    """The span that a new event of this trace goes below."""
    span = _open_span.get()
    return (span.span_ids.get(handle.trace_id) if span else None) or handle.parent_span_id


def _handles_of(target: Any) -> list[TraceHandle]:
    """Every trace that a target stands for, each once."""
    if target is None:
        span = _open_span.get()
        return list(span.handles) if span else []
    if isinstance(target, TraceHandle):
        return [target]
    if isinstance(target, list | tuple):
        each = [handle for item in target if item is not None for handle in _handles_of(item)]
        return list({handle.trace_id: handle for handle in each}.values())
    if _is_sample(target):
        return [bind_trace(target)]
    for key in ("samples", "sample"):
        if (held := getattr(target, key, None)) is not None:
            return _handles_of(held)
    return []


def _is_sample(value: Any) -> bool:
    return all(hasattr(value, key) for key in ("index", "group_index", "metadata"))


def _is_target(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) > 0 and all(_is_target(item) for item in value)
    return isinstance(value, TraceHandle) or _is_sample(value) or any(hasattr(value, k) for k in ("samples", "sample"))


def _is_carrier(value: Any) -> bool:
    return isinstance(value, dict) and "trace_id" in value and isinstance(value.get("events"), list)


def _new_carrier(trace_id: str | None = None) -> dict[str, Any]:
    ids = {"trace_id": trace_id or _new_id(), "sample_id": None, "group_id": None, "attempt": 0}
    return {"version": TRACE_VERSION, "events": [], **ids}


def _handle(carrier: dict[str, Any], parent_span_id: str | None = None) -> TraceHandle:
    attempt = int(carrier.get("attempt") or 0)
    names = (carrier["trace_id"], carrier, carrier.get("sample_id"), carrier.get("group_id"), attempt)
    return TraceHandle(*names, parent_span_id)


def _new_id() -> str:
    return uuid.uuid4().hex


@contextmanager
def _never_raising(where: str) -> Iterator[None]:
    """A run does not end because its trace could not be written."""
    try:
        yield
    except Exception as error:
        _warn_once(where, error)


def _warn_once(where: str, what: object) -> None:
    if where not in _warned:
        _warned.add(where)
        logger.warning("Tracing, %s: %s. Said once.", where, what)
