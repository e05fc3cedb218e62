"""Traces nest as the calls do, travel with the sample, and never get in a run's way."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slime.observability import trace_utils
from slime.observability.rollout_metrics import rollout_metrics
from slime.observability.trace_utils import (
    bind_trace,
    bind_trace_carrier,
    build_sglang_meta_trace_attrs,
    export_trace,
    import_trace,
    trace_event,
    trace_function,
    trace_next_attempt,
    trace_span,
)
from slime.utils.types import Sample

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def warnings_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_utils, "_warned", set())


def events(sample: Any) -> list[dict[str, Any]]:
    return sample.trace["events"]  # type: ignore[no-any-return]


def names(sample: Any) -> list[tuple[str, str]]:
    return [(event["type"], event["name"]) for event in events(sample)]


def test_the_carrier_is_plain_data_of_the_documented_form() -> None:
    sample = Sample(index=5, group_index=2)
    with trace_span(sample, "work", attrs={"a": 1}) as span:
        span.set("b", 2)
        span.update({"c": 3})
    carrier = sample.trace  # type: ignore[attr-defined]
    assert {k: v for k, v in carrier.items() if k not in ("events", "trace_id")} == {
        "version": 1, "sample_id": 5, "group_id": 2, "attempt": 0,
    }  # fmt: skip
    start, end = events(sample)
    assert int(carrier["trace_id"], 16) and start["trace_id"] == carrier["trace_id"]
    assert (start["type"], start["name"], start["attrs"]) == ("span_start", "work", {"a": 1})
    assert (end["type"], end["attrs"]) == ("span_end", {"b": 2, "c": 3})
    assert start["span_id"] == end["span_id"] and start["ts"] <= end["ts"] and "parent_span_id" not in start
    assert json.loads(json.dumps(carrier)) == carrier
    assert Sample.from_dict(sample.to_dict()).trace == carrier  # type: ignore[attr-defined]


def test_spans_nest_and_events_lie_in_the_innermost() -> None:
    sample = Sample(index=0)
    with trace_span(sample, "outer"):
        with trace_span(sample, "inner"):
            trace_event(sample, "point", attrs={"x": 1})
        trace_event(None, "later")
    outer, inner, point, inner_end, later, outer_end = events(sample)
    assert inner["parent_span_id"] == inner_end["parent_span_id"] == outer["span_id"]
    assert point["parent_span_id"] == inner["span_id"] and point["attrs"] == {"x": 1}
    assert later["parent_span_id"] == outer["span_id"] and "parent_span_id" not in outer_end


def test_a_group_span_is_the_parent_within_each_sample() -> None:
    group = [Sample(index=0), Sample(index=1)]
    with trace_span(group, "group"), trace_span(group[1], "one"):
        pass
    assert names(group[0]) == [("span_start", "group"), ("span_end", "group")]
    parent = events(group[1])[0]["span_id"]
    assert events(group[1])[1]["name"] == "one" and events(group[1])[1]["parent_span_id"] == parent


async def test_concurrent_tasks_do_not_mix_their_spans() -> None:
    @trace_function("generate", target="sample")
    async def generate(sample: Sample) -> None:
        with trace_span(sample, "wait"):
            await asyncio.sleep(0)
            trace_event(None, "woke")

    group = [Sample(index=i) for i in range(3)]
    with trace_span(group, "group"):
        await asyncio.gather(*(generate(sample) for sample in group))
    for sample in group:
        assert [name for _, name in names(sample)] == [
            "group", "generate", "wait", "woke", "wait", "generate", "group",
        ]  # fmt: skip
        group_span, generate_span, wait_span, woke = events(sample)[:4]
        assert generate_span["parent_span_id"] == group_span["span_id"]
        assert wait_span["parent_span_id"] == generate_span["span_id"]
        assert woke["parent_span_id"] == wait_span["span_id"]


def test_an_error_is_recorded_and_rises() -> None:
    sample = Sample()
    with pytest.raises(ValueError, match="boom"), trace_span(sample, "work"):
        raise ValueError("boom")
    assert events(sample)[-1]["attrs"] == {"error_type": "ValueError", "error_message": "boom"}
    with pytest.raises(ValueError), trace_span(sample, "work", record_error=False):
        raise ValueError("boom")
    assert "attrs" not in events(sample)[-1]


def test_functions_and_coroutines_find_their_target() -> None:
    class SampleBox:
        def __init__(self, sample: Sample) -> None:
            self.sample = sample

    @trace_function("by_name", target="sample", attrs_getter=lambda n, sample: {"n": n})
    def by_name(n: int, sample: Any) -> int:
        return n

    @trace_function("by_getter", target_getter=lambda box: box["it"])
    def by_getter(box: dict[str, Any]) -> str:
        return "done"

    sample = Sample()
    assert by_name(3, sample) == 3 and by_name(4, sample=[sample]) == 4
    assert by_getter({"it": bind_trace(sample)}) == "done"
    assert by_name(5, SampleBox(sample)) == 5
    starts = [event for event in events(sample) if event["type"] == "span_start"]
    assert [e["name"] for e in starts] == ["by_name", "by_name", "by_getter", "by_name"]
    assert [e["attrs"]["n"] for e in starts if e["name"] == "by_name"] == [3, 4, 5]
    assert by_name.__name__ == "by_name"


def test_an_inferred_target_is_warned_about_once(caplog: Any) -> None:
    @trace_function("inferred")
    def work(n: int, sample: Sample) -> None: ...

    sample = Sample()
    work(1, sample)
    work(2, sample)
    assert len(events(sample)) == 4
    assert caplog.text.count("'sample' is taken") == 1


def test_without_any_target_the_open_span_gets_the_events() -> None:
    @trace_function("helper")
    def helper(n: int) -> None: ...

    sample = Sample()
    with trace_span(sample, "outer"):
        helper(1)
    assert [name for _, name in names(sample)] == ["outer", "helper", "helper", "outer"]
    helper(1)  # no open span: nothing is written, nothing is raised
    assert len(events(sample)) == 4


def test_a_wrong_parameter_name_warns_and_leaves_the_call_untraced(caplog: Any) -> None:
    @trace_function("work", target="smaple")
    def work(sample: Sample) -> str:
        return "done"

    sample = Sample()
    assert work(sample) == "done"
    assert not hasattr(sample, "trace") and "no parameter 'smaple'" in caplog.text


def test_tracing_never_raises() -> None:
    class Frozen:
        __slots__ = ("group_index", "index", "metadata")

    frozen = Frozen()
    frozen.index = frozen.group_index = frozen.metadata = None  # type: ignore[attr-defined]

    def broken(*_: Any) -> Any:
        raise RuntimeError("getter")

    @trace_function("work", target_getter=broken, attrs_getter=broken)
    def work(x: int) -> int:
        return x

    assert work(1) == 1
    with trace_span(frozen, "work"):
        trace_event(frozen, "point")
    with trace_span(object(), "nothing"):
        trace_event("text", "point")
    trace_next_attempt(object())
    sample = Sample()
    sample.trace = "broken"  # type: ignore[attr-defined]
    with trace_span(sample, "work") as span:
        span.set("x", object())
    assert len(events(sample)) == 2
    assert build_sglang_meta_trace_attrs(None) == {}


def test_a_wrong_call_fails_with_its_own_error() -> None:
    @trace_function("work", target="sample")
    def work(sample: Sample) -> None: ...

    with pytest.raises(TypeError, match="missing 1 required"):
        work()


def test_attempts_are_counted_on_the_sample() -> None:
    sample = Sample()
    trace_event(sample, "first")
    trace_next_attempt(sample)
    trace_event(sample, "second")
    assert [event["attempt"] for event in events(sample)] == [0, 1] and bind_trace(sample).attempt == 1


def test_a_trace_goes_on_in_another_process() -> None:
    sample = Sample(index=3)
    with trace_span(sample, "driver"):
        sent = json.loads(json.dumps(export_trace(sample)))
    handle = import_trace(sent)
    with trace_span(handle, "remote"):
        pass
    remote = handle.carrier["events"][-1]
    assert remote["trace_id"] == sample.trace["trace_id"]  # type: ignore[attr-defined]
    assert remote["parent_span_id"] == events(sample)[0]["span_id"] and remote["sample_id"] == 3
    assert len(events(sample)) == 2, "the export is a copy"
    assert [c["sample_id"] for c in export_trace([sample, Sample(index=4)])] == [3, 4]


def test_a_carrier_without_a_sample_can_be_bound() -> None:
    handle = bind_trace_carrier(None, trace_id="abc", sample_id=1, group_id=2, attempt=3, parent_span_id="p")
    trace_event(handle, "point")
    (event,) = handle.carrier["events"]
    assert (event["trace_id"], event["sample_id"], event["group_id"], event["attempt"]) == ("abc", 1, 2, 3)
    assert event["parent_span_id"] == "p"


META = {
    "id": "r1",
    "finish_reason": {"type": "stop", "matched": 2},
    "prompt_tokens": 10,
    "completion_tokens": 5,
    "cached_tokens": None,
    "queue_time": 0.25,
    "e2e_latency": 2.0,
    "decode_throughput": 50.0,
    "output_token_logprobs": [[-0.1, 3, None]],
    "pd_prefill_forward_duration": 0.5,
    "pd_prefill_bootstrap_duration": 0.25,
    "pd_decode_transfer_duration": 0.5,
    "pd_decode_forward_duration": 0.75,
    "pd_transfer_total_mb": 8,
}


def test_sglangs_reply_is_reduced_to_what_a_trace_keeps() -> None:
    attrs = build_sglang_meta_trace_attrs(META)
    children = attrs.pop("_trace_children")
    assert attrs == {
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "queue_time": 0.25,
        "e2e_latency": 2.0,
        "decode_throughput": 50.0,
        "finish_reason": "stop",
        "sglang_request_id": "r1",
    }
    assert [child["name"] for child in children] == ["sglang_pd_prefill", "sglang_pd_decode", "sglang_pd_summary"]
    assert children[1]["offset"] == 0.75, "decoding ends with the request: 2.0 - 0.5 - 0.75"
    assert children[2]["attrs"] == {"pd_transfer_total_mb": 8}


def test_stages_become_nested_spans_at_their_offsets_and_metrics() -> None:
    sample = Sample(index=0)
    with trace_span(sample, "sglang_generate") as span:
        span.update(build_sglang_meta_trace_attrs(META))
    by_name = {(e["type"], e["name"]): e for e in events(sample)}
    root = by_name["span_start", "sglang_generate"]
    bootstrap = by_name["span_start", "sglang_pd_prefill/bootstrap"]
    forward = by_name["span_start", "sglang_pd_prefill/forward"]
    assert bootstrap["ts"] == root["ts"] and forward["ts"] == pytest.approx(root["ts"] + 0.25)
    assert by_name["span_end", "sglang_pd_prefill/forward"]["ts"] == pytest.approx(root["ts"] + 0.75)
    assert forward["parent_span_id"] == by_name["span_start", "sglang_pd_prefill"]["span_id"]
    assert by_name["event", "sglang_pd_summary"]["parent_span_id"] == root["span_id"]
    assert "_trace_children" not in by_name["span_end", "sglang_generate"]["attrs"]
    metrics = rollout_metrics(SimpleNamespace(), [sample], None, 1.0)  # type: ignore[arg-type]
    assert metrics["perf/request/e2e_latency/mean"] == 2.0 and metrics["perf/decode/throughput/max"] == 50.0
    assert metrics["perf/prefill/forward/mean"] == pytest.approx(0.5)
    assert metrics["perf/decode/transfer/mean"] == pytest.approx(0.5)


def test_the_throughput_of_a_request_whose_tokens_came_in_one_message_is_not_counted() -> None:
    """SGLang counts from the message with the first token, which here is also that with the last."""
    sample = Sample(index=0)
    for told in (
        {},
        {"completion_tokens": 40, "decode_throughput": 4e7},
        {"completion_tokens": 40, "decode_throughput": 390.0},
    ):
        with trace_span(sample, "sglang_generate") as span:
            span.update(build_sglang_meta_trace_attrs(META | told))
    metrics = rollout_metrics(SimpleNamespace(), [sample], None, 1.0)  # type: ignore[arg-type]
    assert metrics["perf/decode/throughput/mean"] == (50.0 + 390.0) / 2
    assert metrics["perf/request/e2e_latency/mean"] == 2.0


def test_traces_import_without_torch_ray_or_sglang() -> None:
    code = (
        "import sys\nimport slime.observability.trace_utils\n"
        "heavy = {'torch', 'ray', 'sglang', 'sglang_router', 'megatron', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
