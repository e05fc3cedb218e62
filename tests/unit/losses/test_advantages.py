"""Returns, advantages and normalisations against textbook loops in float64."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.losses.advantages import (
    chunked_discounted_returns,
    chunked_gae,
    discounted_returns,
    group_normalize,
    masked_moments,
    vanilla_gae,
    whiten,
)


def test_returns_by_hand() -> None:
    """Rewards 1, 0, 4 at discount 1/2: 4, then 0 + 2, then 1 + 1."""
    assert discounted_returns(torch.tensor([[1.0, 0.0, 4.0]]), 0.5).tolist() == [[2.0, 2.0, 4.0]]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3), st.integers(0, 40), st.sampled_from([0.0, 0.3, 0.99, 1.0]), st.sampled_from([1, 3, 8, 128]))
def test_chunks_give_what_single_steps_give(batch_size: int, num_tokens: int, discount: float, chunk_size: int) -> None:
    rewards = torch.randn(batch_size, num_tokens, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    expected = discounted_returns(rewards, discount)
    torch.testing.assert_close(chunked_discounted_returns(rewards, discount, chunk_size), expected)


def test_a_chunk_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        chunked_discounted_returns(torch.zeros(1, 1), 1.0, 0)


def gae_reference(rewards: list[float], values: list[float], gamma: float, lambd: float) -> list[float]:
    """The definition (eq. 16): A_t = sum over l of (gamma lambd)^l delta_(t+l)."""
    deltas = [
        rewards[t] + gamma * (values[t + 1] if t + 1 < len(values) else 0.0) - values[t] for t in range(len(rewards))
    ]
    return [
        math.fsum((gamma * lambd) ** (s - t) * deltas[s] for s in range(t, len(deltas))) for t in range(len(deltas))
    ]


@pytest.mark.parametrize(("gamma", "lambd"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("gae", [vanilla_gae, chunked_gae])
def test_gae_equals_its_definition_on_padded_sequences(gae, gamma: float, lambd: float) -> None:
    lengths = [200, 1, 131]
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 200, generator=generator, dtype=torch.float64)
    for row, length in enumerate(lengths):
        rewards[row, length:] = values[row, length:] = 0
    advantages, returns = gae(rewards, values, gamma, lambd)
    for row, length in enumerate(lengths):
        expected = gae_reference(rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lambd)
        assert advantages[row, :length].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert advantages[row, length:].abs().sum() == 0
    torch.testing.assert_close(returns, advantages + values)


def test_gae_of_a_perfect_critic_is_zero() -> None:
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    advantages, returns = vanilla_gae(rewards, torch.ones(1, 3), 1.0, 0.95)
    assert advantages.tolist() == [[0.0, 0.0, 0.0]]
    assert returns.tolist() == [[1.0, 1.0, 1.0]]


def test_rewards_and_values_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2\) and values \(1, 3\)"):
        vanilla_gae(torch.zeros(1, 2), torch.zeros(1, 3), 1.0, 1.0)


def test_group_normalisation_by_hand() -> None:
    """Rewards 1 and 0 have the unbiased deviation sqrt(1/2): the advantages are +-0.5 / 0.70710778."""
    expected = 0.5 / (math.sqrt(0.5) + 1e-6)
    normalized = group_normalize(torch.tensor([[1.0, 0.0], [5.0, 5.0]]), divide_by_std=True)
    assert normalized.flatten().tolist() == pytest.approx([expected, -expected, 0.0, 0.0], rel=1e-12)
    assert group_normalize(torch.tensor([[1.0, 0.0]]), divide_by_std=False).tolist() == [[0.5, -0.5]]


def test_group_normalisation_equals_the_standard_library() -> None:
    rewards = [0.3, -1.2, 2.0, 0.1, 0.1]
    mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
    normalized = group_normalize(torch.tensor([rewards], dtype=torch.float64), divide_by_std=True)
    assert normalized[0].tolist() == pytest.approx([(r - mean) / (deviation + 1e-6) for r in rewards], rel=1e-12)


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e6])
def test_equal_rewards_teach_nothing(reward: float) -> None:
    """Rounding of the mean must not be blown up by the small divisor."""
    assert group_normalize(torch.full((1, 7), reward), divide_by_std=True).abs().max() < 1e-3
    assert group_normalize(torch.full((2, 1), reward), divide_by_std=True).tolist() == [[0.0], [0.0]]


def test_whitening_uses_the_masked_values_and_changes_all() -> None:
    """Of 1, 3 (and a masked 100) the mean is 2 and the unbiased variance 2."""
    values = torch.tensor([1.0, 100.0, 3.0], dtype=torch.float64)
    moments = masked_moments(values, torch.tensor([1, 0, 1]))
    scale = math.sqrt(2 + 1e-8)
    assert whiten(values, moments).tolist() == pytest.approx([-1 / scale, 98 / scale, 1 / scale])
    assert whiten(values, moments, shift_mean=False).tolist() == pytest.approx(
        [2 - 1 / scale, 2 + 98 / scale, 2 + 1 / scale]
    )


def test_moments_of_ranks_add_up() -> None:
    values = torch.randn(10, generator=torch.Generator().manual_seed(0)).double() + 5
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1, 1])
    parts = masked_moments(values[:4], mask[:4]) + masked_moments(values[4:], mask[4:])
    kept = [v for v, m in zip(values.tolist(), mask.tolist(), strict=True) if m]
    expected = [(v - statistics.fmean(kept)) / math.sqrt(statistics.variance(kept) + 1e-8) for v in values.tolist()]
    assert whiten(values, parts).tolist() == pytest.approx(expected, rel=1e-9)
    assert masked_moments(torch.zeros(0), torch.zeros(0)).tolist() == [0.0, 0.0, 0.0]


def test_a_single_value_whitens_to_zero_and_none_is_an_error() -> None:
    assert whiten(torch.tensor([4.0]), masked_moments(torch.tensor([4.0]), torch.ones(1))).item() == 0.0
    with pytest.raises(ValueError, match="no token of this rollout is trained on any rank"):
        whiten(torch.tensor([4.0]), masked_moments(torch.tensor([4.0]), torch.zeros(1)))
