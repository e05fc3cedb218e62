"""Flags of logging, debugging and profiling."""

from dataclasses import dataclass
from typing import Literal

from slime.config.flags import flag


@dataclass(frozen=True)
class LoggingConfig:
    """Logging; TensorBoard files are written to the run's folder without any flag."""

    use_tensorboard: bool = False
    """Accepted for older scripts: TensorBoard files are written anyway."""
    no_tensorboard: bool = False
    """Write no TensorBoard files."""
    tb_project_name: str | None = None
    """Folder for TensorBoard files. Default: the environment variable TENSORBOARD_DIR, else the run's folder."""
    tb_experiment_name: str | None = None
    """Sub-folder of --tb-project-name."""
    use_wandb: bool = False
    """Log to Weights & Biases."""
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """Its mode. Default: the environment variable WANDB_MODE, else online."""
    wandb_dir: str | None = None
    """Its local folder."""
    wandb_key: str | None = None
    """Its API key. The environment variable WANDB_API_KEY stays out of process lists; prefer it."""
    wandb_host: str | None = None
    """Its server."""
    wandb_team: str | None = None
    """Its team."""
    wandb_group: str | None = None
    """Its group."""
    wandb_project: str | None = None
    """Its project."""
    wandb_run_id: str | None = None
    """Run to continue."""
    wandb_random_suffix: bool = flag(True, names=("--disable-wandb-random-suffix",), kind="switch_off")
    """Add no random suffix to the run's name."""
    wandb_always_use_train_step: bool = False
    """Count optimizer steps rather than rollouts on every axis."""
    log_multi_turn: bool = False
    """Log metrics of conversations of several turns."""
    log_passrate: bool = False
    """Log pass@k."""
    log_reward_category: str | None = None
    """Entry of the reward mapping whose values are counted."""
    log_correct_samples: bool = False
    """Log metrics of the correct samples on their own."""


@dataclass(frozen=True)
class DebugConfig:
    """Debugging and profiling."""

    debug_rollout_only: bool = False
    """Generate, but do not train."""
    debug_train_only: bool = False
    """Train, but start no engines; use with --load-debug-rollout-data or supervised fine-tuning."""
    load_debug_rollout_data: str | None = None
    """Train on samples saved by --save-debug-rollout-data: a path with {rollout_id} in it."""
    load_debug_rollout_data_subsample: float | None = None
    """Share of these samples to use."""
    save_debug_rollout_data: str | None = None
    """Save each rollout's samples: a path with {rollout_id} in it."""
    save_debug_train_data: str | None = None
    """Save what each rank trains on: a path with {rollout_id} and {rank} in it."""
    load_forge_rollout_data: str | None = None
    """Saved samples for slime.rollout.forge_load."""
    dump_details: str | None = None
    """Folder for everything that can be saved: samples and training data of each rollout, the tokenizer."""
    record_memory_history: bool = False
    """Record what the trainer's CUDA allocator does, and write a snapshot of it when memory runs out, or after
    --memory-snapshot-num-steps rollouts."""
    memory_snapshot_dir: str = "."
    """Folder for memory snapshots."""
    memory_snapshot_num_steps: int | None = None
    """Rollouts after which a memory snapshot is written and recording ends."""
    memory_recorder: Literal["torch", "memray"] = "torch"
    """What records them."""
    use_pytorch_profiler: bool = False
    """Write traces of the trainer to <output-dir>/<run-name>/profile, for the rollouts from --profile-step-start on."""
    profile_target: list[Literal["train_overall", "train_actor", "train_log_probs"]] = flag(["train_overall"])
    """What a trace is of: all training on a rollout, the optimizer steps alone, the log-prob passes alone."""
    profile_step_start: int = 10
    """First rollout that --use-pytorch-profiler records."""
    profile_step_end: int = 12
    """The first that it records no more."""
    profile_ranks: list[int] = flag([0])
    """Trainer ranks that --use-pytorch-profiler records."""
    ci_test: bool = False
    """Assert in each step what must hold on the project's own tests."""
    ci_disable_kl_checker: bool = False
    """Leave the KL divergence out of that."""
    ci_train_rollout_logprob_abs_diff_threshold: float = 0.1
    """Largest mean difference between the trainer's and the engines' log-probs in that, in nats."""
    ci_save_grad_norm: str | None = None
    """Save the gradient norm of each step to this path."""
    ci_load_grad_norm: str | None = None
    """Compare the gradient norm of each step with that path's."""
