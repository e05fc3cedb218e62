"""Which forward passes over a rollout must come before its training steps."""

from argparse import Namespace


def needs_ref_log_probs(args: Namespace) -> bool:
    """Whether the reference model's log-probs enter the reward or the loss."""
    return bool(args.compute_advantages_and_returns and (args.kl_coef != 0 or args.use_kl_loss))


def needs_teacher_log_probs(args: Namespace) -> bool:
    """Whether a teacher inside the trainer must give its log-probs (an engine's come with the samples)."""
    return bool(args.compute_advantages_and_returns and args.use_opd and args.opd_type == "megatron")


def needs_old_log_probs(args: Namespace, *, num_steps: int | None = None) -> bool:
    """Whether the trainer must compute log-probs before the first step.

    Not if the engine's stand for them (`use_rollout_logprobs`), and not if the training pass itself gives the same
    numbers (`can_reuse_log_probs`).

    Args:
        num_steps: optimizer steps that this rollout makes; None: num_steps_per_rollout of the arguments, or 1.
    """
    if not args.compute_advantages_and_returns:
        return False
    if args.use_rollout_logprobs and not args.get_mismatch_metrics:
        return False
    return not can_reuse_log_probs(args, num_steps=num_steps)


def can_reuse_log_probs(args: Namespace, *, num_steps: int | None = None) -> bool:
    """Whether the log-probs of the training pass are the old ones: a single on-policy step, and nobody else needs them.

    The weights do not change before the only step, so the importance ratio is exactly 1.
    """
    if num_steps is None:
        num_steps = getattr(args, "num_steps_per_rollout", None) or 1
    return num_steps == 1 and _only_the_loss_needs_old_log_probs(args)


def first_step_with_old_log_probs(args: Namespace, num_steps: int) -> int:
    """The step from which on log-probs must be computed before training; `num_steps` if none needs them.

    1: the first of several steps can take its own, as a single one can; but not where something of the user's is given
    the rollout with them, or they are written down.
    """
    if not needs_old_log_probs(args, num_steps=num_steps):
        return num_steps
    readers = ("custom_advantage_function_path", "rollout_data_postprocess_path", "save_debug_train_data")
    is_read = any(getattr(args, name, None) for name in readers)
    return 1 if _only_the_loss_needs_old_log_probs(args) and not is_read else 0


def _only_the_loss_needs_old_log_probs(args: Namespace) -> bool:
    """What needs log-probs earlier: a KL in the reward, the entropy of the rollout (--use-rollout-entropy), a critic, a
    distillation, mismatch metrics, an older policy kept as the old one, routing recorded in the first pass (R2), and
    GSPO's ratio over sequences."""
    replays_own_routing = getattr(args, "use_routing_replay", False) and not getattr(
        args, "use_rollout_routing_replay", False
    )
    return (
        args.loss_type == "policy_loss"
        and args.kl_coef == 0
        and args.advantage_estimator != "gspo"
        and not args.use_rollout_logprobs
        and not args.get_mismatch_metrics
        and not args.use_critic
        and not args.use_opd
        and not getattr(args, "keep_old_actor", False)
        and not getattr(args, "use_rollout_entropy", False)
        and not replays_own_routing
    )
