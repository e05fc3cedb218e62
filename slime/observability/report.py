"""What a finished (or running) run amounts to: reward at both ends, evaluation, wall time and where it went."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from slime.observability.metric_names import STEP_PHASES
from slime.observability.run_log import read_lines, read_metrics
from slime.observability.step_line import eval_scores

REWARD = "rollout/raw_reward"
FIRST_STEPS, LAST_STEPS = 3, 5


def summarise(run_dir: Path | str) -> dict[str, Any]:
    """The run in numbers; a number that the run does not have is None.

    Returns:
        `steps`; `reward_first` and `reward_last` (means of the first 3 and last 5 steps, fewer if there are fewer)
        with `reward_gain`; `eval`: task -> {first, last, first_step, last_step}; `wall_s`: the sum of step times,
        without those that a resumed run cut off to do them again; `phases_s`: phase -> seconds over the run, `other`
        among them; `logprob_difference`: mean over the steps, nat.
    """
    lines, written = read_metrics(run_dir), list(read_lines(run_dir))
    steps = [line for line in lines if line["step"] >= 0]
    rewards = _column(steps, REWARD)
    first, last = _mean(rewards[:FIRST_STEPS]), _mean(rewards[-LAST_STEPS:])
    names = [*STEP_PHASES, "other"]
    phases = {name: sum(_column(written, f"perf/{name}_time")) for name in names}
    return {
        "run_dir": str(run_dir),
        "steps": len(steps),
        "reward_first": first,
        "reward_last": last,
        "reward_gain": None if first is None or last is None else last - first,
        "eval": _evaluations(lines),
        "wall_s": sum(_column(written, "perf/step_time")),
        "phases_s": {name: seconds for name, seconds in phases.items() if seconds > 0},
        "logprob_difference": _mean(_column(steps, "train/train_rollout_logprob_abs_diff")),
    }


def format_summary(summary: dict[str, Any]) -> str:
    """The summary as a few lines for people."""
    lines = [f"{summary['run_dir']}: {summary['steps']} steps, {summary['wall_s']:.0f} s"]
    if summary["reward_gain"] is not None:
        lines.append(
            f"  reward      {summary['reward_first']:.3f} (first {FIRST_STEPS} steps) -> "
            f"{summary['reward_last']:.3f} (last {LAST_STEPS}), {summary['reward_gain']:+.3f}"
        )
    for task, e in summary["eval"].items():
        at = "before training" if e["first_step"] < 0 else f"step {e['first_step']}"
        lines.append(f"  eval {task}  {e['first']:.3f} ({at}) -> {e['last']:.3f} (step {e['last_step']})")
    if summary["logprob_difference"] is not None:
        lines.append(f"  train-rollout log-probs differ by {summary['logprob_difference']:.1e} nat on average")
    if summary["wall_s"]:
        shares = sorted(summary["phases_s"].items(), key=lambda item: -item[1])
        lines.append("  time        " + "  ".join(f"{n} {s:.0f} s ({s / summary['wall_s']:.0%})" for n, s in shares))
    return "\n".join(lines)


def plot_curves(run_dirs: Sequence[Path | str], out_png: Path | str, metrics: Sequence[str] = (REWARD,)) -> Path:
    """Draws metrics over the steps of one or more runs, one panel a metric and evaluations below them.

    Raises:
        ImportError: matplotlib, which slime does not install, is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"Drawing curves needs matplotlib ({error}): pip install matplotlib") from error
    runs = {Path(run_dir).name: read_metrics(run_dir) for run_dir in run_dirs}
    tasks = sorted({f"eval/{task}" for lines in runs.values() for line in lines for task in eval_scores(line)})
    panels = [*metrics, *tasks]
    figure = Figure(figsize=(7, 2.8 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axis, name in zip(axes, panels, strict=True):
        for run, lines in runs.items():
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=run) if points else None
        axis.set(xlabel="step", ylabel=name)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(out_png, dpi=120)
    return Path(out_png)


def _column(lines: Iterable[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in lines if line.get(name) is not None]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _evaluations(lines: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """First and last score of each task, with the steps they belong to."""
    result: dict[str, dict[str, float]] = {}
    for line in lines:
        for task, score in eval_scores(line).items():
            if score is None:
                continue
            entry = result.setdefault(task, {"first": score, "first_step": line["step"]})
            entry |= {"last": score, "last_step": line["step"]}
    return result
