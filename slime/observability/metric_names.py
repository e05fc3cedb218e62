"""Every metric that slime writes, declared once: its name, its unit and what it says.

A name is `where/what`. A part in angle brackets stands for any text: `eval/<task>` declares `eval/gsm8k`.
`docs/metrics.md` is written from this table: `python -m slime.observability.metric_names docs/metrics.md`.
"""

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

STEP_PHASES: dict[str, str] = {
    "generate": "waiting for samples: generation, rewards and filters",
    "wait_for_rollout": "train_async.py: waiting for a rollout that is still being made; 0 where it was ready",
    "train": "log-probs, advantages and optimizer steps, on every trainer rank",
    "sync": "new weights to every engine, with their proof",
    "eval": "evaluation",
    "save": "checkpoints and the data source's state",
    "offload": "giving up memory so that the other side can run",
    "onload": "taking that memory back",
}
"""The phases a step is divided into; with `other` they add up to `perf/step_time`."""


@dataclass(frozen=True)
class Metric:
    """One declared name, or a pattern of names.

    Attributes:
        name: `where/what`; `<x>` stands for any non-empty text.
        unit: of the value, e.g. `s`, `nat`, `tokens`, `fraction`, `count`.
        description: one sentence: what the number says, and over what it is averaged.
    """

    name: str
    unit: str
    description: str

    @property
    def is_pattern(self) -> bool:
        return "<" in self.name

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        parts = re.split(r"<[^<>]+>", self.name)
        return re.compile(".+".join(re.escape(part) for part in parts))

    def matches(self, name: str) -> bool:
        return self._regex.fullmatch(name) is not None


def _statistics(prefix: str, unit: str, what: str) -> list[Metric]:
    words = {"mean": "Mean", "median": "Median", "max": "Largest", "min": "Smallest"}
    return [Metric(f"{prefix}/{key}", unit, f"{word} {what}.") for key, word in words.items()]


def _rollout() -> list[Metric]:
    return [
        Metric("rollout/step", "step", "The step that the rollout metrics belong to."),
        Metric("rollout/raw_reward", "reward", "Mean reward of the samples, before any normalization."),
        Metric("rollout/rewards", "reward", "Mean reward after normalization within the group."),
        *_statistics("rollout/response_len", "tokens", "number of trained response tokens of a sample"),
        Metric("rollout/response_lengths", "tokens", "Mean response length as the trainer received it."),
        Metric("rollout/total_lengths", "tokens", "Mean length of prompt and response together."),
        Metric("rollout/truncated", "fraction", "Share of trained samples that were cut at the length limit."),
        Metric("rollout/truncated_ratio", "fraction", "Share of generated samples that were cut at the length limit."),
        Metric("rollout/aborted_ratio", "fraction", "Share of samples whose generation was aborted."),
        Metric("rollout/repetition_frac", "fraction", "Share of samples that repeat themselves without end."),
        Metric("rollout/num_samples", "count", "Samples in the rollout."),
        Metric("rollout/zero_std/count_<reward>", "count", "Groups whose samples all earned this reward: no gradient."),
        Metric("rollout/dynamic_filter/drop_<reason>", "count", "Groups that the dynamic filter dropped, by reason."),
        Metric("rollout/discarded_groups", "count", "Groups that were started and thrown away: surplus, or too old."),
        Metric("rollout/staleness/mean", "rollouts", "How old the oldest trained token of a sample is, on average."),
        Metric("rollout/staleness/max", "rollouts", "The same, for the stalest sample."),
        Metric("rollout/staleness/discarded_groups", "count", "Groups thrown away because they were too old."),
        Metric("rollout/staleness/masked_tokens", "tokens", "Tokens taken out of the loss because they were too old."),
        Metric("rollout/pool/in_flight", "count", "Fully asynchronous: groups in flight when the rollout was taken."),
        Metric("rollout/pool/ready", "count", "Fully asynchronous: groups that were done and left for the next one."),
        Metric("rollout/ready_ahead", "count", "Later rollouts that were ready when training of this one began."),
        Metric("rollout/retokenized", "count", "Samples that came as text only and were tokenised by slime."),
        Metric("rollout/weight_version_lag/mean", "versions", "Newest version in the rollout minus a sample's oldest."),
        Metric("rollout/weight_version_lag/max", "versions", "The same, for the stalest sample."),
        Metric("rollout/weight_version_mixed_ratio", "fraction", "Share of samples made by more than one version."),
        Metric("rollout/error_cat/<category>", "fraction", "Share of samples in this category of the reward."),
        Metric("rollout/spec_accept_rate", "fraction", "Speculative decoding: accepted over drafted tokens."),
        Metric("rollout/spec_accept_length", "tokens", "Speculative decoding: tokens gained per verification."),
        Metric("rollout/prefix_cache_hit_rate", "fraction", "Share of prompt tokens found in the engine's cache."),
        Metric("rollout/avg_cached_tokens_per_sample", "tokens", "Prompt tokens found in the engine's cache."),
        Metric("rollout/top_p_kept_vocab_per_token", "count", "Mean size of the nucleus that top-p kept."),
        Metric("rollout/correct/<sample metric>", "as there", "The metrics above, over the samples with the reward 1."),
        Metric(
            "rollout/log_probs",
            "nat",
            "Mean log-prob of the response tokens under the trainer, before the step; where a pass over all is made.",
        ),
        Metric("rollout/ref_log_probs", "nat", "The same under the reference model."),
        Metric("rollout/teacher_log_probs", "nat", "The same under the teacher of on-policy distillation."),
        Metric("rollout/rollout_log_probs", "nat", "The same as the engine reported it while sampling."),
        Metric("rollout/values", "reward", "Mean value that the critic gave."),
        Metric("rollout/advantages", "reward", "Mean advantage of the response tokens."),
        Metric("rollout/returns", "reward", "Mean return of the response tokens."),
        Metric("rollout/kl", "nat", "Mean divergence from the reference model that is charged to the reward."),
        Metric("rollout/entropy", "nat", "Mean entropy of the policy on response tokens."),
        Metric("rollout/opd_reverse_kl", "nat", "Mean log-prob difference between student and teacher."),
        Metric("rollout/round_number", "count", "Mean number of turns."),
        Metric("passrate/pass@<k>", "fraction", "Chance that one of k samples of a prompt earns the reward 1."),
        Metric("multi_turn/<what>/response_length_<statistic>", "tokens", "Lengths over all turns of a sample."),
        Metric("multi_turn/multi_turn_metric/round_number_<statistic>", "count", "Number of turns."),
    ]


def _train() -> list[Metric]:
    return [
        Metric("train/step", "step", "The optimizer step that the train metrics belong to."),
        Metric("train/loss", "loss", "The whole loss."),
        Metric("train/pg_loss", "loss", "The policy-gradient part of the loss."),
        Metric("train/entropy_loss", "nat", "Mean entropy, which --entropy-coef multiplies."),
        Metric("train/kl_loss", "nat", "Mean divergence from the reference model, which --kl-loss-coef multiplies."),
        Metric("train/pg_clipfrac", "fraction", "Share of tokens whose importance ratio was clipped."),
        Metric("train/ppo_kl", "nat", "Mean of old minus current log-prob; 0 while on-policy."),
        Metric(
            "train/train_rollout_logprob_abs_diff",
            "nat",
            "Mean absolute difference between the trainer's and the engine's log-prob of the same token.",
        ),
        Metric("train/ois", "ratio", "Mean importance ratio between the current and the old policy."),
        Metric("train/tis", "ratio", "Mean importance ratio between trainer and engine, before it is truncated."),
        Metric("train/tis_clipfrac", "fraction", "Share of tokens whose trainer-engine ratio was truncated."),
        Metric("train/tis_abs", "ratio", "Mean distance of the trainer-engine ratio from 1."),
        Metric("train/opsm_clipfrac", "fraction", "Share of tokens masked as off-policy sequences."),
        Metric("train/opd_reverse_kl", "nat", "Mean log-prob difference between student and teacher."),
        Metric("train/value_loss", "loss", "The critic's loss."),
        Metric("train/value_clipfrac", "fraction", "Share of tokens whose value change was clipped."),
        Metric("train/grad_norm", "norm", "Norm of the gradient before clipping."),
        Metric("train/lr-pg_<i>", "1", "Learning rate of parameter group i."),
        Metric("train/global_batch_size", "count", "Rollouts in the optimizer step."),
        Metric("train/mtp_loss", "loss", "Mean loss of the multi-token-prediction layers."),
        Metric("train/mtp_<i>_loss", "loss", "Loss of multi-token-prediction layer i."),
        Metric("train/critic-<metric>", "as there", "The critic's own value of `train/<metric>`."),
    ]


def _eval() -> list[Metric]:
    return [
        Metric("eval/step", "step", "The step after which the evaluation was made; -1: before the first."),
        Metric("eval/<task>-truncated_ratio", "fraction", "Share of answers that were cut at the length limit."),
        Metric("eval/<task>-pass@<k>", "fraction", "Chance that one of k answers to a prompt earns the reward 1."),
        Metric("eval/<task>/response_len/<statistic>", "tokens", "Response lengths: mean, median, max, min."),
        Metric("eval/<task>/truncated_ratio", "fraction", "Share of answers that were cut at the length limit."),
        Metric("eval/<task>/aborted_ratio", "fraction", "Share of answers whose generation was aborted."),
        Metric("eval/<task>/repetition_frac", "fraction", "Share of answers that repeat themselves without end."),
        Metric("eval/<task>/num_samples", "count", "Answers that were graded."),
        Metric("eval/<task>/distinct_responses", "count", "Different answer texts: 1 means that the policy collapsed."),
        Metric("eval/<task>/weight_version_lag/<statistic>", "versions", "As for rollouts."),
        Metric(
            "eval/<task>/<sample metric>", "as there", "The sample metrics of `rollout/`, over this task's answers."
        ),
        Metric("eval/<task>", "reward", "Mean reward of the task."),
    ]


def _phases() -> list[Metric]:
    return [
        Metric("perf/step_time", "s", "Wall time of the whole step; the phases below and `other` add up to it."),
        *(Metric(f"perf/{name}_time", "s", f"Phase of the step: {what}.") for name, what in STEP_PHASES.items()),
        Metric("perf/other_time", "s", "Phase of the step: the wall time that no phase accounts for."),
    ]


def _perf() -> list[Metric]:
    speeds = {
        "tokens_per_gpu_per_sec": "Response tokens generated per second and rollout device",
        "effective_tokens_per_gpu_per_sec": "The same, counting trained tokens only",
        "longest_sample_tokens_per_sec": "Tokens per second of the longest response: the floor of the rollout's time",
        "longest_effective_sample_tokens_per_sec": "The same, counting trained tokens only",
    }
    return [
        Metric("perf/rollout_time", "s", "Wall time of the rollout: inside the generate phase, or beside training."),
        *_statistics("perf/non_generation_time", "s", "time of a sample outside the engine: tools, environments"),
        *(Metric(f"perf/{name}", "tokens/s", f"{what}.") for name, what in speeds.items()),
        *(
            Metric(
                f"perf/{name}_without_non_generation", "tokens/s", f"{what}, without the time spent outside the engine."
            )
            for name, what in speeds.items()
        ),
        *_statistics("perf/request/e2e_latency", "s", "time from a request's arrival to its end, in the engine"),
        *_statistics("perf/request/queue_time", "s", "time a request waited in the engine"),
        *_statistics("perf/decode/throughput", "tokens/s", "decoding speed of a request"),
        Metric("perf/prefill/<stage>/<statistic>", "s", "Stages of disaggregated prefill."),
        Metric("perf/decode/<stage>/<statistic>", "s", "Stages of disaggregated decoding."),
        Metric("perf/update_weights_time", "s", "The weight update itself, inside the sync phase."),
        Metric(
            "perf/<timer>_time", "s", "A timer inside a phase: `log_probs`, `actor_train`, `update_weights_send`, ..."
        ),
        Metric("perf/<timer>_tflops", "TFLOP/s", "Speed of `actor_train`, `log_probs` or `ref_log_probs`, per rank."),
        Metric("perf/actor_train_tok_per_s", "tokens/s", "Tokens trained per second, prompts included."),
        Metric("perf/wait_time_ratio", "fraction", "Share of the step in which the trainer waits for samples."),
        Metric("perf/update_weights_density", "fraction", "Share of weight elements that changed (delta transfer)."),
        Metric("perf/update_weights_bytes", "bytes", "Size of the weights that an update carried."),
        Metric("perf/update_weights_wire_bytes", "bytes", "Bytes that an update sent (delta transfer)."),
    ]


_declared: list[Metric] = [*_rollout(), *_train(), *_eval(), *_phases(), *_perf()]
_exact: dict[str, Metric] = {metric.name: metric for metric in _declared if not metric.is_pattern}
_patterns: list[Metric] = [metric for metric in _declared if metric.is_pattern]


def declare(name: str, unit: str, description: str) -> Metric:
    """Declares a plug-in's own metric, so that logging it warns no more. Declaring a name twice keeps the last."""
    metric = Metric(name, unit, description)
    if metric.is_pattern:
        _patterns.append(metric)
    else:
        _exact[name] = metric
    return metric


def find(name: str) -> Metric | None:
    """The declaration of a metric's name; an exact one wins over a pattern, an earlier pattern over a later."""
    return _exact.get(name) or next((metric for metric in _patterns if metric.matches(name)), None)


def depends_on_timing(name: str) -> bool:
    """Whether a metric may differ between two runs that compute the same: speed, and what engines had in a cache."""
    return name.startswith("perf/") or name.endswith(_OF_CACHES)


_OF_CACHES = ("/prefix_cache_hit_rate", "/avg_cached_tokens_per_sample")


def undeclared(names: Iterable[str]) -> list[str]:
    """Those of the names that nothing declares, sorted."""
    return sorted(name for name in names if find(name) is None)


def require_declared(names: Iterable[str]) -> None:
    """Raises ValueError that lists the names that nothing declares."""
    if unknown := undeclared(names):
        raise ValueError(
            f"Metrics without a declaration: {', '.join(unknown)}. Add each to slime/observability/metric_names.py, "
            "or, from a plug-in, call slime.observability.metric_names.declare(name, unit, description)."
        )


def markdown() -> str:
    """docs/metrics.md, whole."""
    lines = [
        "# Metrics",
        "",
        "Written by `python -m slime.observability.metric_names docs/metrics.md`; do not edit by hand.",
        "",
        "`<run_dir>/metrics.jsonl` has one JSON object a step: `step` (the rollout's number; -1 is the evaluation",
        "before the first step), `time` (seconds since 1970) and every metric below that the run produces, by name.",
        "A value that is not a finite number is `null`. TensorBoard and W&B get the same names. A part in `<...>`",
        "varies.",
        "A metric of your own: `slime.observability.metric_names.declare(name, unit, description)`.",
    ]
    sections = (
        ("What was generated", _rollout()),
        ("What was learnt", _train()),
        ("Evaluation", _eval()),
        ("Where a step's time goes", _phases()),
        ("Speed", _perf()),
    )
    for title, metrics in sections:
        lines += ["", f"## {title}", "", "| name | unit | meaning |", "|---|---|---|"]
        lines += [f"| `{m.name}` | {m.unit} | {m.description} |" for m in metrics]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m slime.observability.metric_names docs/metrics.md")
    Path(sys.argv[1]).write_text(markdown(), encoding="utf-8")
