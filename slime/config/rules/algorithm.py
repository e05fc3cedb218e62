"""Rules of the algorithm: which estimators, losses, corrections and rewards go together."""

import re

from slime.config.config import Config
from slime.config.errors import ConfigError, did_you_mean
from slime.config.groups import RolloutConfig

REWARDS = (
    "answer_tag", "dapo", "deepscaler", "f1", "gpqa", "ifbench", "last_number", "math", "random", "reasoning_gym",
    "remote_rm",
)  # fmt: skip
"""Built-in rewards, those of slime.rollout.rm_hub; known here so that a wrong name is refused before anything loads."""


def one_kl_term(config: Config) -> None:
    """The KL divergence goes into the reward or into the loss."""
    a = config.algorithm
    if a.kl_coef != 0 and a.kl_loss_coef != 0:
        raise ConfigError(
            f"--kl-coef {a.kl_coef} and --kl-loss-coef {a.kl_loss_coef} would count the same divergence twice; "
            "set one of them to 0"
        )


def reference_exists(config: Config) -> None:
    """A reference checkpoint that is named must be there."""
    path = config.checkpoint.ref_load
    if config.uses_reference and path is not None and config.files.kind(path) in ("missing", "empty"):
        raise ConfigError(
            f"--ref-load {path}: there is no checkpoint; give a Megatron or HuggingFace folder, or leave the flag out "
            "to take what the actor starts from"
        )


def losses_have_what_they_need(config: Config) -> None:
    """Without the pass that computes advantages there are neither advantages nor a reference's log-probs."""
    a, own = config.algorithm, config.reward.custom_convert_samples_to_train_data_path
    if a.compute_advantages_and_returns:
        return
    if config.uses_reference:
        flag = "--use-kl-loss" if a.use_kl_loss else f"--kl-coef {a.kl_coef}"
        raise ConfigError(
            f"{flag} needs the log-probs of the reference model, which --disable-compute-advantages-and-returns leaves "
            "out; drop one of the two flags"
        )
    if a.loss_type == "policy_loss" and own is None and config.rollout.rollout_data_postprocess_path is None:
        raise ConfigError(
            "--disable-compute-advantages-and-returns leaves --loss-type policy_loss without advantages; "
            "add --loss-type sft_loss, or drop the flag"
        )


def groups_are_not_evaluated(config: Config) -> None:
    """slime's own evaluation grades each response on its own."""
    function = config.eval.eval_function_path or config.rollout.rollout_function_path
    if config.reward.group_rm and config.eval_datasets and function == RolloutConfig.rollout_function_path:
        raise ConfigError(
            "--group-rm grades the samples of a prompt together, but evaluation grades each on its own; leave out "
            "--eval-prompt-data and --eval-config, or drop --group-rm"
        )


def reinforce_is_normalized(config: Config) -> None:
    """REINFORCE++ is defined with whitened advantages."""
    a = config.algorithm
    if a.advantage_estimator.startswith("reinforce_plus_plus") and not a.normalize_advantages:
        raise ConfigError(
            f"--advantage-estimator {a.advantage_estimator} is defined with whitened advantages; "
            "add --normalize-advantages"
        )


def rollout_logprobs_exclude_tis(config: Config) -> None:
    """With the engines' log-probs as the old ones there is nothing left to correct."""
    if config.correction.use_rollout_logprobs and config.correction.use_tis:
        raise ConfigError(
            "--use-rollout-logprobs takes the engines' log-probs as the old ones, so --use-tis would correct nothing; "
            "drop one of them"
        )


def mismatch_metrics_have_a_function(config: Config) -> None:
    """The metrics come from the correction function."""
    if config.correction.get_mismatch_metrics and config.correction.custom_tis_function_path is None:
        raise ConfigError(
            "--get-mismatch-metrics takes its metrics from a correction function; add --custom-tis-function-path"
        )


def tis_bounds_are_ordered(config: Config) -> None:
    """The lower bound lies below the upper one."""
    c = config.correction
    if c.use_tis and c.tis_clip_low >= c.tis_clip:
        raise ConfigError(
            f"--tis-clip-low {c.tis_clip_low} is not below --tis-clip {c.tis_clip}; lower the one or raise the other"
        )


def custom_loss_is_complete(config: Config) -> None:
    """--loss-type custom_loss and its function come together."""
    a = config.algorithm
    if a.loss_type == "custom_loss" and a.custom_loss_function_path is None:
        raise ConfigError("--loss-type custom_loss needs the loss; add --custom-loss-function-path module.function")
    if a.loss_type != "custom_loss" and a.custom_loss_function_path is not None:
        raise ConfigError(
            f"--custom-loss-function-path {a.custom_loss_function_path} is not used with --loss-type {a.loss_type}; "
            "add --loss-type custom_loss"
        )


def distillation_is_complete(config: Config) -> None:
    """On-policy distillation says where its teacher runs, and only then has one."""
    d = config.distillation
    if not d.use_opd:
        if d.opd_teacher_load is not None:
            raise ConfigError(f"--opd-teacher-load {d.opd_teacher_load} is not used without --use-opd; add that flag")
        return
    if d.opd_type is None:
        raise ConfigError(
            "--use-opd needs to know where the teacher runs; add --opd-type sglang or --opd-type megatron"
        )
    if d.opd_type == "sglang" and d.opd_teacher_load is not None:
        raise ConfigError(
            "--opd-type sglang asks a teacher's server (--rm-url), so --opd-teacher-load is not used; drop that flag"
        )
    if d.opd_type == "megatron" and d.opd_teacher_load is None:
        raise ConfigError("--opd-type megatron loads the teacher itself; add --opd-teacher-load DIR")
    if d.opd_type == "megatron" and config.files.kind(d.opd_teacher_load) in ("missing", "empty"):
        raise ConfigError(f"--opd-teacher-load {d.opd_teacher_load}: there is no checkpoint; give an existing folder")


def known_reward(config: Config) -> None:
    """A built-in reward is one that exists."""
    name = config.reward.rm_type
    if name is None or config.reward.custom_rm_path is not None:
        return
    bare = name.strip().removeprefix("boxed_")
    if bare.split(":")[0] not in REWARDS:
        raise ConfigError(
            f"--rm-type {name}: there is no such reward.{did_you_mean(bare, REWARDS)} There are {', '.join(REWARDS)} "
            "(boxed_ in front grades the boxed answer); for one of your own use --custom-rm-path"
        )
    if bare == "remote_rm" and config.reward.rm_url is None:
        raise ConfigError("--rm-type remote_rm asks a server; add --rm-url http://host:port/path")
    if bare == "dapo" and config.reward.reward_key is None and config.reward.custom_reward_post_process_path is None:
        raise ConfigError("--rm-type dapo gives a mapping with score, acc and pred; add --reward-key score")


def mtp_has_layers(config: Config) -> None:
    """Multi-token prediction can be trained where the model has its layers."""
    if config.train.enable_mtp_training and config.train.mtp_num_layers is None:
        raise ConfigError("--enable-mtp-training needs the number of layers; add --mtp-num-layers 1")


def trained_or_frozen(config: Config) -> None:
    """Parameters are selected by what is trained or by what is frozen, and the patterns are regular expressions."""
    only, frozen = config.train.only_train_params_name_list, config.train.freeze_params_name_list
    if only and frozen:
        raise ConfigError(
            "--only-train-params-name-list and --freeze-params-name-list exclude each other; keep the one that says "
            "what you mean"
        )
    flag = "--only-train-params-name-list" if only else "--freeze-params-name-list"
    for pattern in only or frozen or []:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"{flag} {pattern}: is not a regular expression ({error}); escape special characters with \\"
            ) from None


def stateless_adam_saves_nothing(config: Config) -> None:
    """Adam without moments has no state to save."""
    if not config.train.use_stateless_adam:
        return
    lacks = [
        text
        for text, is_missing in (
            ("--optimizer adam", config.megatron.get("optimizer", "adam") != "adam"),
            ("--no-save-optim", not config.checkpoint.no_save_optim),
        )
        if is_missing
    ]
    if lacks:
        raise ConfigError(f"--use-stateless-adam needs {' and '.join(lacks)}; add that")


def critic_steps_have_a_critic(config: Config) -> None:
    """Only PPO has a critic."""
    if config.train.num_critic_only_steps and config.algorithm.advantage_estimator != "ppo":
        raise ConfigError(
            f"--num-critic-only-steps {config.train.num_critic_only_steps}: --advantage-estimator "
            f"{config.algorithm.advantage_estimator} has no critic; use ppo or drop the flag"
        )


RULES = (
    one_kl_term,
    reference_exists,
    losses_have_what_they_need,
    groups_are_not_evaluated,
    reinforce_is_normalized,
    rollout_logprobs_exclude_tis,
    mismatch_metrics_have_a_function,
    tis_bounds_are_ordered,
    custom_loss_is_complete,
    distillation_is_complete,
    known_reward,
    mtp_has_layers,
    trained_or_frozen,
    stateless_adam_saves_nothing,
    critic_steps_have_a_critic,
)
