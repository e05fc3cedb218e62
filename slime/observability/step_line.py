"""The line a step prints: what was earned, how the policy moved, where the time went; every fact with its unit."""

from collections.abc import Mapping
from dataclasses import dataclass

EVAL_SUFFIXES = ("-truncated_ratio", "-pass@")


@dataclass(frozen=True)
class Fact:
    """One fact of the line.

    Attributes:
        label: the word before the number.
        names: the metrics that may hold it; the first one present is shown.
        text: how the number is written, with its unit; given to str.format.
        scale: what the metric is multiplied by first.
    """

    label: str
    names: tuple[str, ...]
    text: str
    scale: float = 1.0


FACTS = (
    Fact("reward", ("rollout/raw_reward",), "{:.3f}"),
    Fact("response", ("rollout/response_len/mean", "rollout/response_lengths"), "{:.0f} tok"),
    Fact("cut", ("rollout/truncated_ratio", "rollout/truncated"), "{:.1f} %", 100.0),
    Fact("kl", ("train/kl_loss", "rollout/kl"), "{:.4f} nat"),
    Fact("clipped", ("train/pg_clipfrac",), "{:.1f} %", 100.0),
    Fact("grad", ("train/grad_norm",), "{:.2f}"),
    Fact("train-rollout", ("train/train_rollout_logprob_abs_diff",), "{:.1e} nat"),
    Fact("stale", ("rollout/staleness/mean",), "{:.1f} rollouts"),
    Fact("too old", ("rollout/staleness/discarded_groups",), "{:.0f}"),
    Fact("waited", ("perf/wait_for_rollout_time",), "{:.1f} s"),
    Fact("gen", ("perf/generate_time", "perf/rollout_time"), "{:.1f} s"),
    Fact("train", ("perf/train_time",), "{:.1f} s"),
    Fact("sync", ("perf/sync_time", "perf/update_weights_time"), "{:.1f} s"),
    Fact("step", ("perf/step_time",), "{:.1f} s"),
)


def format_step(rollout_id: int, metrics: Mapping[str, float | None]) -> str:
    """The step line of whatever facts are there; a value that is not finite reads `nan`.

    Args:
        rollout_id: the step's number; -1: the evaluation before the first step.
        metrics: values by declared name; None stands for a number that was not finite.
    """
    facts = [f"step {rollout_id}" if rollout_id >= 0 else "before the first step"]
    for fact in FACTS:
        name = next((name for name in fact.names if name in metrics), None)
        if name is not None:
            value = metrics[name]
            facts.append(f"{fact.label} " + fact.text.format(float("nan") if value is None else value * fact.scale))
    for task, score in eval_scores(metrics).items():
        facts.append(f"eval {task} " + ("nan" if score is None else f"{score:.3f}"))
    return "  ".join(facts)


def eval_scores(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """The mean reward of each evaluated task: task -> value."""
    prefix = "eval/"
    tasks = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    return {
        task: value
        for task, value in tasks.items()
        if task != "step" and "/" not in task and not any(suffix in task for suffix in EVAL_SUFFIXES)
    }
