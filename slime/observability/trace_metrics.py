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
        for key, metric in ATTRIBUTES.items():
            value = (event.get("attrs") or {}).get(key)
            if isinstance(value, int | float):
                values.setdefault(metric, []).append(float(value))
        for prefix, metric in STAGES.items():
            start = started.get(str(event.get("span_id")))
            if name.startswith(prefix) and start is not None:
                values.setdefault(metric + name.removeprefix(prefix), []).append(event["ts"] - start)
