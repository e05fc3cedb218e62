"""The quick start, shortened: a real model through Ray, trainer ranks, router, engines and the weight sync."""

import json
from pathlib import Path

import pytest

from .conftest import Train

SMALL = ["--rollout-batch-size", "4", "--n-samples-per-prompt", "4"]
STEP_PHASES_MAY_MISS_S = 0.05


@pytest.mark.timeout(900)
def test_a_run_leaves_metrics_curves_samples_and_a_model(
    train: Train, quickstart_flags: list[str], quickstart_data: Path, tmp_path: Path
) -> None:
    words = [*quickstart_flags, *SMALL, "--num-rollout", "2", "--eval-interval", "2"]
    run = train([*words, "--save-hf", str(tmp_path / "hf")])

    assert [line["step"] for line in run.lines] == [-1, 0, 1]
    assert 0.3 < run.lines[0]["eval/held_out"] < 0.6, "greedy accuracy of the untrained model is about 0.44"
    for step in run.steps:
        assert 0 <= step["rollout/raw_reward"] <= 1
        parts = [value for name, value in step.items() if name.startswith("perf/") and is_phase(name)]
        assert abs(sum(parts) - step["perf/step_time"]) < STEP_PHASES_MAY_MISS_S
    assert list(run.folder.glob("events.out.tfevents.*"))
    rows = [json.loads(line) for line in (run.folder / "samples" / "rollout_000001.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    assert {version for row in rows for version in row["weight_versions"]} != set()
    assert_trained(tmp_path / "hf", quickstart_data / "SmolLM2-135M-Instruct")
    assert "still running after the command" not in run.output


def is_phase(name: str) -> bool:
    from slime.observability.metric_names import STEP_PHASES

    return name in {f"perf/{phase}_time" for phase in (*STEP_PHASES, "other")}


def assert_trained(folder: Path, initial: Path) -> None:
    """The export loads in transformers, has the same tensors, and they moved."""
    import torch
    from transformers import AutoModelForCausalLM

    after = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    before = AutoModelForCausalLM.from_pretrained(initial).state_dict()
    assert after.keys() == before.keys()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) > len(before) / 2
    assert all(after[name].isfinite().all() for name in after)


@pytest.mark.timeout(900)
def test_in_fp32_trainer_and_engine_agree_on_every_token(train: Train, quickstart_flags: list[str]) -> None:
    """Log-probs of the same tokens under the same weights: different code, one answer, also after an update."""
    run = train([*quickstart_flags, *SMALL, "--num-rollout", "2", "--skip-eval-before-train", "--no-bf16"])
    differences = run.column("train/train_rollout_logprob_abs_diff")
    assert len(differences) == 2
    assert max(differences) < 1e-4


@pytest.mark.timeout(900)
def test_ten_steps_of_the_quick_start_already_learn(train: Train, quickstart_flags: list[str]) -> None:
    run = train([*quickstart_flags, "--num-rollout", "10"])
    rewards = run.column("rollout/raw_reward")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1
    accuracy = [line["eval/held_out"] for line in run.lines if "eval/held_out" in line]
    assert accuracy[-1] > accuracy[0] + 0.1


@pytest.mark.timeout(120)
def test_a_dry_run_prints_the_plan_and_starts_nothing(train: Train, quickstart_flags: list[str]) -> None:
    run = train([*quickstart_flags, "--dry-run"])
    assert not run.folder.exists()
    assert "30" in run.output
    assert "ray" not in " ".join(run.cost["by_name_s"])
