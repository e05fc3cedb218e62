"""Importance weights and the critic's loss by hand."""

import pytest
import torch

from slime.losses.corrections import icepop_weights, truncated_importance_weights
from slime.losses.value import clipped_value_loss


def ratios(*values: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(values, dtype=torch.float64).log().requires_grad_(), torch.zeros(len(values))


def test_truncation_clamps_and_icepop_drops() -> None:
    weights, raw = truncated_importance_weights(*ratios(0.25, 1, 5), clip_range=(0.5, 2.0))
    assert weights.tolist() == pytest.approx([0.5, 1, 2])
    assert raw.tolist() == pytest.approx([0.25, 1, 5])
    weights, raw = icepop_weights(*ratios(0.25, 1, 5), clip_range=(0.5, 2.0))
    assert weights.tolist() == pytest.approx([0, 1, 0])
    assert raw.tolist() == pytest.approx([0.25, 1, 5])


def test_weights_are_constants() -> None:
    for weigh in (truncated_importance_weights, icepop_weights):
        assert not any(result.requires_grad for result in weigh(*ratios(1.5), clip_range=(0, 2)))


def test_an_infinite_ratio_has_a_finite_weight() -> None:
    far = torch.tensor([1000.0]), torch.tensor([0.0])
    assert truncated_importance_weights(*far, clip_range=(0, 2))[0].item() == 2.0
    assert icepop_weights(*far, clip_range=(0, 2))[0].item() == 0.0


def test_a_value_that_moved_past_the_clip_has_no_gradient() -> None:
    """Old value 0, return 1, clip 0.2. At 0.5 the clipped error (0.8)^2 is the larger; at 0.1 both are (0.9)^2."""
    values = torch.tensor([0.5, 0.1], requires_grad=True)
    loss, is_clipped = clipped_value_loss(values, torch.zeros(2), torch.ones(2), clip_distance=0.2)
    assert loss.tolist() == pytest.approx([0.64, 0.81])
    assert is_clipped.tolist() == [True, False]
    loss.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([0.0, -1.8])


def test_a_value_that_moved_away_from_its_return_is_not_spared() -> None:
    """Old value 0, return 1, value -3: the unclipped error 16 counts."""
    loss, is_clipped = clipped_value_loss(torch.tensor([-3.0]), torch.zeros(1), torch.ones(1), clip_distance=0.2)
    assert loss.item() == 16.0
    assert not is_clipped.item()
