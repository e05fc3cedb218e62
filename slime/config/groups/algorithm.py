"""Flags of the algorithm: advantages, losses, corrections, distillation, rewards."""

from dataclasses import dataclass
from typing import Literal

from slime.config.flags import flag


@dataclass(frozen=True)
class AlgorithmConfig:
    """Algorithm."""

    advantage_estimator: Literal[
        "grpo", "gspo", "cispo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo"
    ] = "grpo"
    """How rewards become advantages."""
    loss_type: Literal["policy_loss", "sft_loss", "custom_loss"] = "policy_loss"
    """What is minimised."""
    custom_loss_function_path: str | None = None
    """Function (args, batch, logits, sum_of_sample_mean), with --loss-type custom_loss."""
    custom_advantage_function_path: str | None = None
    """Function (args, rollout_data) that sets advantages and returns."""
    custom_pg_loss_reducer_function_path: str | None = None
    """Function (total_lengths, response_lengths, loss_masks, calculate_per_token_loss) that returns a reducer."""
    compute_advantages_and_returns: bool = flag(
        True, names=("--disable-compute-advantages-and-returns",), kind="switch_off"
    )
    """Compute no advantages (supervised fine-tuning)."""
    eps_clip: float = 0.2
    """The importance ratio is clipped below 1 minus this."""
    eps_clip_high: float | None = None
    """The importance ratio is clipped above 1 plus this. Default: --eps-clip."""
    eps_clip_c: float | None = None
    """Bound of the dual clip for negative advantages, above 1."""
    value_clip: float = 0.2
    """The critic's values are clipped to this distance from their old ones."""
    kl_coef: float = 0.0
    """Weight of the KL divergence from the reference model inside the reward."""
    use_kl_loss: bool = False
    """Add the KL divergence from the reference model to the loss."""
    kl_loss_coef: float = 0.0
    """Its weight."""
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = "k1"
    """Its estimator."""
    use_unbiased_kl: bool = False
    """Weigh the KL loss by the importance ratio."""
    ref_update_interval: int | None = None
    """Rollouts after which the reference model takes the actor's weights. Default: never."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    gamma: float = 1.0
    """Discount of later rewards."""
    lambd: float = 1.0
    """Lambda of generalised advantage estimation."""
    normalize_advantages: bool = False
    """Whiten the advantages of a batch."""
    grpo_std_normalization: bool = flag(True, names=("--disable-grpo-std-normalization",), kind="switch_off")
    """Do not divide a group's rewards by their standard deviation."""
    rewards_normalization: bool = flag(True, names=("--disable-rewards-normalization",), kind="switch_off")
    """Do not subtract a group's mean from its rewards."""
    calculate_per_token_loss: bool = False
    """Average the loss over tokens rather than over samples."""
    use_rollout_entropy: bool = False
    """Compute the entropy in the log-prob passes."""


@dataclass(frozen=True)
class CorrectionConfig:
    """Corrections for the difference between the engines' and the trainer's log-probs."""

    use_rollout_logprobs: bool = False
    """Take the engines' log-probs as the old ones."""
    use_tis: bool = False
    """Truncated importance sampling."""
    tis_clip: float = 2.0
    """Its upper bound."""
    tis_clip_low: float = 0.0
    """Its lower bound."""
    custom_tis_function_path: str | None = None
    """Function (args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, ...) in its place."""
    get_mismatch_metrics: bool = False
    """Log how far the two differ; needs --custom-tis-function-path."""
    use_routing_replay: bool = False
    """Replay the experts chosen in the log-prob pass in the training pass."""
    use_rollout_routing_replay: bool = False
    """Replay the experts chosen by the engines; implies --use-routing-replay."""
    use_opsm: bool = False
    """Mask sequences that are far off policy and have a negative advantage."""
    opsm_delta: float = 1e-4
    """How far, in nats a token."""


@dataclass(frozen=True)
class DistillationConfig:
    """On-policy distillation."""

    use_opd: bool = False
    """Learn from a teacher's log-probs on the student's own samples."""
    opd_type: Literal["sglang", "megatron"] | None = None
    """Where the teacher runs."""
    opd_kl_coef: float = 1.0
    """Weight of the divergence from the teacher."""
    opd_teacher_load: str | None = None
    """Checkpoint of a teacher that runs in Megatron."""
    opd_teacher_ckpt_step: int | None = None
    """Its iteration. Default: the newest."""


@dataclass(frozen=True)
class RewardConfig:
    """Reward."""

    rm_type: str | None = None
    """Built-in reward: math, deepscaler, dapo, answer_tag, last_number, f1, gpqa, ifbench, reasoning_gym:TASK,
    remote_rm, random; `boxed_` in front grades only the boxed answer. A row's metadata may name its own."""
    rm_url: str | None = None
    """Address of the reward server (remote_rm)."""
    rm_model_path: str | None = None
    """Given to the constructor of a reward class."""
    custom_rm_path: str | None = None
    """Reward of your own: async (args, sample) or (args, samples), or a class with compute_reward(prompts,
    responses); a dotted path, file.py:name, or file.py."""
    reward_key: str | None = None
    """Entry that counts, when rewards are mappings."""
    group_rm: bool = False
    """Grade the samples of one prompt together."""
    custom_reward_post_process_path: str | None = None
    """Function (args, samples) -> (raw_rewards, rewards), in place of group normalization."""
    custom_convert_samples_to_train_data_path: str | None = None
    """Function (args, samples) -> dict, in place of the default conversion."""
