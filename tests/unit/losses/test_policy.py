"""What each policy loss punishes, rewards and forgives, in values that can be checked by hand."""

import math

import pytest
import torch

from slime.losses.policy import cispo_loss, clipped_policy_loss, gspo_log_ratios, masked_mean_difference, opsm_mask

CLIP = (0.8, 1.2)


def log(*ratios: float) -> torch.Tensor:
    return torch.tensor(ratios, dtype=torch.float64).log()


def test_a_bad_action_is_never_forgiven_by_the_clip() -> None:
    """With a negative advantage and a ratio of 2 the loss stays 2: the clip only limits reward."""
    loss, is_clipped = clipped_policy_loss(log(2), torch.zeros(1), -torch.ones(1), clip_range=CLIP)
    assert loss.item() == pytest.approx(2.0)
    assert not is_clipped.item()


def test_a_good_action_earns_no_more_beyond_the_clip() -> None:
    log_probs = log(2, 1.1).requires_grad_()
    loss, is_clipped = clipped_policy_loss(log_probs, torch.zeros(2), torch.ones(2), clip_range=CLIP)
    assert loss.tolist() == pytest.approx([-1.2, -1.1])
    assert is_clipped.tolist() == [True, False]
    loss.sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == pytest.approx([0.0, -1.1])


def test_clip_higher_leaves_the_lower_bound_alone() -> None:
    loss, is_clipped = clipped_policy_loss(
        log(1.25, 0.5), torch.zeros(2), torch.tensor([1.0, -1.0]), clip_range=(0.8, 1.28)
    )
    assert loss.tolist() == pytest.approx([-1.25, 0.8])
    assert is_clipped.tolist() == [False, True]


def test_dual_clip_bounds_the_loss_of_a_bad_action_only() -> None:
    """Ratio 10, advantage -1: PPO's loss is 10, dual clip's 3. Good actions are untouched."""
    loss, _ = clipped_policy_loss(
        log(10, 10, 0.5), torch.zeros(3), torch.tensor([-1.0, 1.0, -1.0]), clip_range=CLIP, dual_clip=3.0
    )
    assert loss.tolist() == pytest.approx([3.0, -1.2, 0.8])


def test_a_dual_clip_of_one_or_less_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--eps-clip-c.*above 1, got 1.0"):
        clipped_policy_loss(log(1), torch.zeros(1), torch.ones(1), clip_range=CLIP, dual_clip=1.0)


def test_clipped_loss_equals_a_token_by_token_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    new, old, advantages = torch.randn(3, 200, generator=generator, dtype=torch.float64)
    loss, is_clipped = clipped_policy_loss(new, old, advantages, clip_range=(0.7, 1.4), dual_clip=2.5)
    for i in range(200):
        ratio, a = math.exp(new[i] - old[i]), advantages[i].item()
        first, second = -ratio * a, -min(max(ratio, 0.7), 1.4) * a
        expected = max(first, second)
        if a < 0:
            expected = min(-2.5 * a, expected)
        assert loss[i].item() == pytest.approx(expected, rel=1e-12)
        assert is_clipped[i].item() == (second > first)


def test_cispo_keeps_the_gradient_of_a_clipped_token() -> None:
    """Ratio 2 clipped to 1.2: the gradient is that of 1.2 * advantage * log p; PPO's would be 0."""
    log_probs = log(2, 0.5, 1).requires_grad_()
    loss, is_clipped = cispo_loss(log_probs, torch.zeros(3), torch.tensor([1.0, 1.0, -2.0]), clip_range=CLIP)
    assert loss.tolist() == pytest.approx([-1.2 * math.log(2), -0.8 * math.log(0.5), 0.0])
    assert is_clipped.tolist() == [True, True, False]
    loss.sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == pytest.approx([-1.2, -0.8, 2.0])


def test_gspo_gives_each_token_of_a_sample_the_geometric_mean_ratio() -> None:
    """Ratios 4 and 1 of the trained tokens have the mean 2; the masked 100 does not count; samples do not mix."""
    new = [log(4, 1, 100).requires_grad_(), log(3)]
    old = [torch.zeros(3), torch.zeros(1)]
    masks = [torch.tensor([1, 1, 0]), torch.tensor([1])]
    ratios = gspo_log_ratios(new, old, masks)
    assert ratios[0].exp().tolist() == pytest.approx([2.0, 2.0, 2.0])
    assert ratios[1].exp().tolist() == pytest.approx([3.0])
    ratios[0][0].exp().backward()
    assert new[0].grad is not None
    assert new[0].grad.tolist() == pytest.approx([1.0, 1.0, 0.0])  # s / number of trained tokens


def test_a_sample_without_trained_tokens_has_the_sequence_ratio_one() -> None:
    assert gspo_log_ratios([log(5)], [torch.zeros(1)], [torch.tensor([0])])[0].tolist() == [0.0]
    assert gspo_log_ratios([torch.zeros(0)], [torch.zeros(0)], [torch.zeros(0)])[0].shape == (0,)


def test_opsm_leaves_out_bad_actions_of_unlikely_sequences_only() -> None:
    old, new = log(0.9, 0.9), log(0.3, 0.3)
    sequence_kl = masked_mean_difference(old, new, torch.ones(2))
    assert sequence_kl.item() == pytest.approx(math.log(3))
    advantages = torch.tensor([-1.0, 1.0])
    assert opsm_mask(advantages, sequence_kl, delta=1.0).tolist() == [True, False]
    assert opsm_mask(advantages, sequence_kl, delta=1.2).tolist() == [False, False]
