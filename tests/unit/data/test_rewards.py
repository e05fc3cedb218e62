"""Rewards that train: normalised within their group, or by a hook, or as they are."""

import math

import pytest

from slime.data.rewards import post_process_rewards

HERE = __name__


def rewarded(make_sample, rewards):
    return [make_sample([1], [2], reward, index=i) for i, reward in enumerate(rewards)]


def swap_signs(args, samples):
    return [s.reward for s in samples], [-s.reward for s in samples]


def forget_one(args, samples):
    return [s.reward for s in samples], [0.0]


@pytest.mark.parametrize("estimator", ["grpo", "gspo", "cispo"])
def test_rewards_are_normalised_within_their_group(make_args, make_sample, estimator: str) -> None:
    """Groups (1, 0) and (5, 5): +-0.5 over sqrt(1/2) + 1e-6, and nothing."""
    raw, rewards = post_process_rewards(
        make_args(advantage_estimator=estimator), rewarded(make_sample, [1.0, 0.0, 5.0, 5.0])
    )
    expected = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert raw == [1.0, 0.0, 5.0, 5.0]
    assert rewards == pytest.approx([expected, -expected, 0.0, 0.0])


def test_the_deviation_is_left_out_when_asked_and_for_the_baseline_estimator(make_args, make_sample) -> None:
    samples = rewarded(make_sample, [1.0, 0.0, 5.0, 7.0])
    for changes in ({"grpo_std_normalization": False}, {"advantage_estimator": "reinforce_plus_plus_baseline"}):
        assert post_process_rewards(make_args(**changes), samples)[1] == [0.5, -0.5, -1.0, 1.0]


@pytest.mark.parametrize(
    "changes",
    [{"rewards_normalization": False}, {"advantage_estimator": "ppo"}, {"advantage_estimator": "reinforce_plus_plus"}],
)
def test_other_estimators_train_on_the_rewards_themselves(make_args, make_sample, changes) -> None:
    raw, rewards = post_process_rewards(make_args(**changes), rewarded(make_sample, [1.0, 0.0, 5.0, 7.0]))
    assert raw == rewards == [1.0, 0.0, 5.0, 7.0]


def test_another_number_of_samples_is_one_group_and_says_so(make_args, make_sample, caplog) -> None:
    _, rewards = post_process_rewards(make_args(grpo_std_normalization=False), rewarded(make_sample, [0.0, 3.0, 6.0]))
    assert rewards == [-3.0, 0.0, 3.0]
    assert "normalised as one group" in caplog.text


def test_a_reward_key_picks_from_a_dict(make_args, make_sample) -> None:
    samples = rewarded(make_sample, [{"score": 1, "acc": True}, {"score": 0, "acc": False}])
    raw, _ = post_process_rewards(make_args(reward_key="score", rollout_batch_size=1), samples)
    assert raw == [1.0, 0.0]


def test_a_reward_that_is_no_number_names_its_sample_and_the_way_out(make_args, make_sample) -> None:
    with pytest.raises(ValueError, match=r"Sample 1 \(number 1 of the rollout, status completed\).*None.*not a number"):
        post_process_rewards(make_args(), rewarded(make_sample, [1.0, None]))
    with pytest.raises(ValueError, match=r"its keys: score, acc; choose one with --reward-key"):
        post_process_rewards(make_args(), rewarded(make_sample, [{"score": 1, "acc": True}]))


def test_a_hook_replaces_the_normalisation(make_args, make_sample, monkeypatch) -> None:
    monkeypatch.setattr("slime.data.rewards.load_function", {"mine": swap_signs, "short": forget_one}.get)
    samples = rewarded(make_sample, [1.0, 2.0])
    assert post_process_rewards(make_args(custom_reward_post_process_path="mine"), samples) == (
        [1.0, 2.0],
        [-1.0, -2.0],
    )
    with pytest.raises(ValueError, match=r"short got 2 samples but returned 2 raw rewards and 1 rewards"):
        post_process_rewards(make_args(custom_reward_post_process_path="short"), samples)
