"""Every metric has one declaration, and docs/metrics.md says what the code says."""

from pathlib import Path

import pytest

from slime.observability import metric_names

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"

DOCUMENTED = [
    "rollout/raw_reward",
    "rollout/response_len/mean",
    "rollout/zero_std/count_0.0",
    "rollout/dynamic_filter/drop_zero_std_1.0",
    "rollout/prefix_cache_hit_rate",
    "rollout/top_p_kept_vocab_per_token",
    "perf/tokens_per_gpu_per_sec",
    "perf/request/e2e_latency/median",
    "perf/prefill/forward/max",
    "perf/longest_sample_tokens_per_sec_without_non_generation",
    "eval/gsm8k",
    "eval/gsm8k-truncated_ratio",
    "eval/gsm8k-pass@4",
    "eval/gsm8k/response_len/max",
    "passrate/pass@2",
    "multi_turn/raw_response_length/response_length_mean",
    "train/pg_clipfrac",
    "train/train_rollout_logprob_abs_diff",
    "train/lr-pg_0",
    "train/critic-value_loss",
    "perf/ref_log_probs_time",
    "perf/actor_train_tflops",
    "perf/update_weights_density",
]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_documented_names_are_declared(name: str) -> None:
    assert metric_names.find(name) is not None


@pytest.mark.parametrize("name", ["train/los", "rollout/raw-reward", "eval/", "perf/_time", "reward", "train/loss/x"])
def test_a_misspelt_name_is_not_declared(name: str) -> None:
    assert metric_names.undeclared([name]) == [name]


def test_an_exact_name_wins_over_a_pattern_that_fits_too() -> None:
    found = metric_names.find("perf/step_time")
    assert found is not None and not found.is_pattern


def test_a_task_is_not_mistaken_for_a_metric_of_a_task() -> None:
    for name, unit in (("eval/aime", "reward"), ("eval/aime-pass@2", "fraction"), ("eval/aime/num_samples", "count")):
        found = metric_names.find(name)
        assert found is not None and found.unit == unit


def test_the_error_names_every_undeclared_metric_and_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"a/x, b/y.*metric_names\.declare"):
        metric_names.require_declared(["b/y", "train/loss", "a/x"])


def test_a_plug_in_can_declare_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric_names, "_exact", dict(metric_names._exact))
    monkeypatch.setattr(metric_names, "_patterns", list(metric_names._patterns))
    metric_names.declare("tools/calls", "count", "Tool calls of a sample.")
    metric_names.declare("tools/<tool>_errors", "count", "Failed calls by tool.")
    assert metric_names.undeclared(["tools/calls", "tools/search_errors"]) == []


def test_no_name_is_declared_twice() -> None:
    names = [metric.name for metric in metric_names._declared]
    assert sorted(set(names)) == sorted(names)


def test_the_docs_are_what_the_code_declares() -> None:
    assert DOCS.read_text(encoding="utf-8") == metric_names.markdown(), (
        "docs/metrics.md is old; run: python -m slime.observability.metric_names docs/metrics.md"
    )
