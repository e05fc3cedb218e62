"""The report says what a run gained and where its time went, from its own files."""

import json
from pathlib import Path
from typing import Any

import pytest

from slime.observability.report import format_summary, plot_curves, summarise


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    lines: list[dict[str, Any]] = [{"step": -1, "eval/sums": 0.5, "perf/sync_time": 1.0}]
    for step in range(8):
        line = {"step": step, "rollout/raw_reward": step / 10, "train/train_rollout_logprob_abs_diff": 1e-5}
        line |= {"perf/generate_time": 6.0, "perf/train_time": 3.0, "perf/other_time": 1.0, "perf/step_time": 10.0}
        lines.append(line)
    lines[-1] |= {"eval/sums": 0.75, "eval/sums-truncated_ratio": 0.0, "train/grad_norm": None}
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_the_gain_is_the_last_five_steps_over_the_first_three(run_dir: Path) -> None:
    summary = summarise(run_dir)
    assert summary["steps"] == 8 and summary["wall_s"] == 80.0
    assert summary["reward_first"] == pytest.approx(0.1) and summary["reward_last"] == pytest.approx(0.5)
    assert summary["reward_gain"] == pytest.approx(0.4)
    assert summary["eval"] == {"sums": {"first": 0.5, "first_step": -1, "last": 0.75, "last_step": 7}}
    assert summary["phases_s"] == {"generate": 48.0, "train": 24.0, "sync": 1.0, "other": 8.0}
    assert summary["logprob_difference"] == pytest.approx(1e-5)


def test_the_text_shows_both_ends_and_shares_of_the_time(run_dir: Path) -> None:
    text = format_summary(summarise(run_dir))
    assert "8 steps, 80 s" in text
    assert "0.100 (first 3 steps) -> 0.500 (last 5), +0.400" in text
    assert "eval sums  0.500 (before training) -> 0.750 (step 7)" in text
    assert "generate 48 s (60%)" in text and "1.0e-05 nat" in text


def test_the_time_of_a_repeated_step_was_spent_all_the_same(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "rollout/raw_reward": 1.2, "perf/train_time": 2.0, "perf/step_time": 2.0}\n')
    summary = summarise(run_dir)
    assert summary["steps"] == 8 and summary["wall_s"] == 82.0 and summary["phases_s"]["train"] == 26.0
    assert summary["reward_last"] == pytest.approx(0.6)


def test_a_run_without_rewards_has_none_rather_than_zero(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "train/loss": 1.0}\n')
    summary = summarise(tmp_path)
    assert summary["reward_first"] is None and summary["reward_gain"] is None and summary["eval"] == {}
    assert format_summary(summary).endswith("1 steps, 0 s")


def test_curves_of_several_runs_are_drawn(run_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text('{"step": 0, "rollout/raw_reward": 1.0}\n')
    path = plot_curves([run_dir, other], tmp_path / "curves.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
