"""The run under attack: a random two-layer llama on two trainer ranks and two engines, its prompts and its flags."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.contracts.engine.tiny_model import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
SAVE_INTERVAL = 2
EVAL_INTERVAL = 3
NUM_PROMPTS = 26
NAMES = (
    *("driver", "rollout manager", "actor rank 0", "actor rank 1", "engine 0", "engine 1", "router"),
    *("owner of engine 0", "owner of engine 1"),
)
"""Of the processes, as status.json and errors call them."""


@dataclass(frozen=True)
class TinyRun:
    """One command line; starting it again in the same folder resumes it."""

    folder: Path
    """The run's own: metrics.jsonl, status.json, checkpoints, exports."""
    model: Path
    num_rollout: int
    is_fault_tolerant: bool = True
    liveness_timeout_s: float = 60.0
    extra: tuple[str, ...] = field(default=())

    def command(self) -> list[str]:
        return [sys.executable, "train.py", *self.words()]

    def words(self) -> list[str]:
        """Everything that decides on the weights is the same for every instance but `num_rollout`."""
        prompts = self.model / "prompts.jsonl"
        words = [
            *("--output-dir", str(self.folder.parent), "--run-name", self.folder.name),
            *("--hf-checkpoint", str(self.model / "llama"), "--prompt-data", str(prompts), "--rollout-shuffle"),
            *("--custom-rm-path", "tests.chaos.reward.reward", "--deterministic-mode", "--no-bf16"),
            *("--rollout-batch-size", "4", "--n-samples-per-prompt", "4", "--num-steps-per-rollout", "1"),
            *("--over-sampling-batch-size", "6", "--dynamic-sampling-filter-path"),
            "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std",
            *("--rollout-max-response-len", "32", "--lr", "1e-3", "--lr-decay-style", "constant"),
            *("--advantage-estimator", "grpo", "--num-rollout", str(self.num_rollout)),
            *("--colocate", "--actor-num-gpus-per-node", "2", "--num-gpus-per-node", "2"),
            *("--save-interval", str(SAVE_INTERVAL), "--save-hf", str(self.folder / "exports" / "{rollout_id}")),
            *("--eval-interval", str(EVAL_INTERVAL), "--eval-prompt-data", "held", f"{prompts}@[0:4]"),
            *("--skip-eval-before-train", "--eval-temperature", "0", "--eval-max-response-len", "16"),
            *("--liveness-timeout", f"{self.liveness_timeout_s:g}"),
        ]
        if self.is_fault_tolerant:
            words += ["--use-fault-tolerance"]
        words += ["--rollout-health-check-interval", "1"]
        words += ["--rollout-health-check-timeout", f"{self.liveness_timeout_s:g}"]
        return [*words, *self.extra]


def save_model_and_prompts(folder: Path) -> Path:
    """What all runs of one campaign start from; returns `folder`."""
    save_tiny_model(folder / "llama")
    rows = ({"prompt": f"{a} + {a} =", "label": str(2 * a)} for a in range(NUM_PROMPTS))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
