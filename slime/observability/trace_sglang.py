"""What an SGLang reply's meta_info says about time, as attributes and child spans of the request's span.

A child is `{"type": "span" | "event", "name", "offset", "duration", "attrs", "children"}`; offsets and durations in s,
from the start of the parent span.
"""

from collections.abc import Mapping, Sequence
from typing import Any

CHILDREN_KEY = "_trace_children"

PLAIN_KEYS = ("prompt_tokens", "completion_tokens", "cached_tokens", "queue_time", "e2e_latency", "decode_throughput")
PREFILL_STAGES = ("bootstrap_queue", "bootstrap", "alloc_wait", "forward", "transfer_queue")
DECODE_STAGES = ("prealloc", "bootstrap", "alloc_wait", "transfer", "forward")
SUMMARY_KEYS = ("pd_transfer_speed_gb_s", "pd_transfer_total_mb", "pd_prefill_retry_count")


def build_sglang_meta_trace_attrs(meta: Mapping[str, Any] | None) -> dict[str, Any]:
    """Picks what a trace keeps of meta_info; keys that are missing or None are left out.

    Returns:
        token counts and times by their own names, `finish_reason` (its type), `sglang_request_id` and, for
        disaggregated serving, `_trace_children`, which the span turns into child spans.
    """
    if not isinstance(meta, Mapping):
        return {}
    attrs = {key: meta[key] for key in PLAIN_KEYS if meta.get(key) is not None}
    reason = meta.get("finish_reason")
    if isinstance(reason, Mapping):
        reason = reason.get("type")
    if reason is not None:
        attrs["finish_reason"] = reason
    if meta.get("id") is not None:
        attrs["sglang_request_id"] = meta["id"]
    if children := _disaggregated_children(meta):
        attrs[CHILDREN_KEY] = children
    return attrs


def _disaggregated_children(meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Prefill stages in a row from the start; decode stages in a row up to the request's end, where it is known."""
    children = []
    prefill = _durations(meta, "pd_prefill", PREFILL_STAGES)
    decode = _durations(meta, "pd_decode", DECODE_STAGES)
    if prefill:
        children.append(_chain("sglang_pd_prefill", prefill, offset=0.0))
    if decode:
        end = meta.get("e2e_latency")
        start = float(end) - sum(decode.values()) if isinstance(end, int | float) else 0.0
        children.append(_chain("sglang_pd_decode", decode, offset=max(start, 0.0)))
    summary = {key: meta[key] for key in SUMMARY_KEYS if meta.get(key) is not None}
    if summary:
        children.append({"type": "event", "name": "sglang_pd_summary", "offset": 0.0, "attrs": summary})
    return children


def _durations(meta: Mapping[str, Any], prefix: str, stages: Sequence[str]) -> dict[str, float]:
    found = {stage: meta.get(f"{prefix}_{stage}_duration") for stage in stages}
    return {stage: float(value) for stage, value in found.items() if isinstance(value, int | float)}


def _chain(name: str, durations: Mapping[str, float], *, offset: float) -> dict[str, Any]:
    stages, start = [], offset
    for stage, duration in durations.items():
        stages.append({"type": "span", "name": f"{name}/{stage}", "offset": start, "duration": duration})
        start += duration
    return {"type": "span", "name": name, "offset": offset, "duration": start - offset, "children": stages}
