"""Turns the traces of samples into metrics: how long requests waited, decoded and moved inside the engine."""

from collections.abc import Iterable, Sequence
from typing import Any

from slime.observability.metric_utils import compute_statistics, dict_add_prefix
from slime.utils.types import Sample

ATTRIBUTES = {
    "e2e_latency": "perf/request/e2e_latency",
    "queue_time": "perf/request/queue_time",
    "decode_throughput": "perf/decode/throughput",
}
_SHORTEST_DECODE_S = 0.01  # of several tokens; what is told of less is the time of a message
STAGES = {"sglang_pd_prefill/": "perf/prefill/", "sglang_pd_decode/": "perf/decode/"}


def trace_metrics(samples: Iterable[Sample]) -> dict[str, float]:
    """Statistics over every request that the samples' traces recorded; {} when there is no trace."""
    values: dict[str, list[float]] = {}
    for sample in samples:
        trace = getattr(sample, "trace", None)
        if isinstance(trace, dict):
            _collect(trace.get("events") or [], values)
    result: dict[str, float] = {}
    for name, numbers in values.items():
        result |= dict_add_prefix(compute_statistics(numbers), f"{name}/")
    return result


def _collect(events: Sequence[dict[str, Any]], values: dict[str, list[float]]) -> None:
    """Adds the numbers of one trace to the lists in `values`, by metric."""
    started: dict[str, float] = {}
    for event in events:
        kind, name = event.get("type"), str(event.get("name"))
        if kind == "span_start":
            started[str(event.get("span_id"))] = event["ts"]
            continue
        if kind != "span_end":
            continue
        attrs = event.get("attrs") or {}
        for key, metric in ATTRIBUTES.items():
            value = attrs.get(key)
            if isinstance(value, int | float) and not (key == "decode_throughput" and _came_at_once(attrs)):
                values.setdefault(metric, []).append(float(value))
        for prefix, metric in STAGES.items():
            start = started.get(str(event.get("span_id")))
            if name.startswith(prefix) and start is not None:
                values.setdefault(metric + name.removeprefix(prefix), []).append(event["ts"] - start)


def _came_at_once(attrs: dict[str, Any]) -> bool:
    """Whether a request was over when SGLang's server heard of its first token, which then tells millions of tokens/s.

    A scheduler reports every so many tokens; a request that is cut, or continued, may have fewer.
    """
    completed = attrs.get("completion_tokens")
    return isinstance(completed, int) and completed - 1 < attrs["decode_throughput"] * _SHORTEST_DECODE_S
