"""Which forward passes a rollout needs before its training steps."""

import pytest

from slime.algorithm.passes import (
    can_reuse_log_probs,
    first_step_with_old_log_probs,
    needs_old_log_probs,
    needs_ref_log_probs,
    needs_teacher_log_probs,
)


def test_a_single_on_policy_step_needs_no_second_forward_pass(make_args) -> None:
    assert can_reuse_log_probs(make_args())
    assert not needs_old_log_probs(make_args())
    assert not needs_old_log_probs(make_args(use_tis=True))


def test_more_steps_need_old_log_probs(make_args) -> None:
    assert needs_old_log_probs(make_args(), num_steps=2)
    assert needs_old_log_probs(make_args(num_steps_per_rollout=2))
    assert not needs_old_log_probs(make_args(num_steps_per_rollout=2), num_steps=1)


def test_the_first_of_several_steps_takes_its_own_log_probs(make_args) -> None:
    """The weights have not changed yet."""
    assert first_step_with_old_log_probs(make_args(), 4) == 1
    assert first_step_with_old_log_probs(make_args(), 1) == 1, "of one step none is left"


def test_all_steps_need_them_where_somebody_reads_the_rollout(make_args) -> None:
    for flag in ("custom_advantage_function_path", "rollout_data_postprocess_path", "save_debug_train_data"):
        assert first_step_with_old_log_probs(make_args(**{flag: "mine.function"}), 2) == 0
    assert first_step_with_old_log_probs(make_args(kl_coef=0.1), 2) == 0
    assert first_step_with_old_log_probs(make_args(kl_coef=0.1), 1) == 0


def test_no_step_needs_them_with_the_engines(make_args) -> None:
    assert first_step_with_old_log_probs(make_args(use_rollout_logprobs=True), 3) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_coef": 0.1},
        {"advantage_estimator": "gspo"},
        {"loss_type": "custom_loss"},
        {"get_mismatch_metrics": True},
        {"get_mismatch_metrics": True, "use_rollout_logprobs": True},
        {"use_critic": True},
        {"use_opd": True},
        {"keep_old_actor": True},
        {"use_routing_replay": True},
    ],
)
def test_what_needs_log_probs_before_the_step(make_args, changes) -> None:
    assert needs_old_log_probs(make_args(**changes))


def test_the_engines_log_probs_or_no_advantages_spare_the_pass(make_args) -> None:
    assert not needs_old_log_probs(make_args(use_rollout_logprobs=True), num_steps=4)
    assert not needs_old_log_probs(make_args(compute_advantages_and_returns=False, loss_type="sft_loss"), num_steps=4)
    assert not needs_old_log_probs(make_args(use_routing_replay=True, use_rollout_routing_replay=True))


def test_the_reference_is_needed_for_a_kl_only(make_args) -> None:
    assert not needs_ref_log_probs(make_args(kl_loss_coef=0.1))
    assert needs_ref_log_probs(make_args(use_kl_loss=True))
    assert needs_ref_log_probs(make_args(kl_coef=0.1))
    assert not needs_ref_log_probs(make_args(use_kl_loss=True, compute_advantages_and_returns=False))


def test_a_teacher_in_the_trainer_needs_a_pass_and_one_behind_an_engine_does_not(make_args) -> None:
    assert needs_teacher_log_probs(make_args(use_opd=True, opd_type="megatron"))
    assert not needs_teacher_log_probs(make_args(use_opd=True, opd_type="sglang"))
    assert not needs_teacher_log_probs(make_args(opd_type="megatron"))
