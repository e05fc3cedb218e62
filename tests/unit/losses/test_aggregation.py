"""What a step averages: the same gradient however samples are packed, split over micro-batches or over ranks."""

import pytest
import torch

from slime.losses.aggregation import count_trained_tokens, scale_for_megatron, sum_of_sample_mean

MASKS = [torch.tensor([1, 1, 0, 1]), torch.tensor([1]), torch.tensor([0, 0])]
VALUES = torch.tensor([1.0, 2.0, 99.0, 3.0, 10.0, 7.0, 7.0])


def test_long_samples_weigh_no_more_than_short_ones() -> None:
    """(1 + 2 + 3) / 3 + 10 / 1, and nothing from the sample without trained tokens."""
    assert sum_of_sample_mean(MASKS)(VALUES).item() == pytest.approx(12.0)


def test_per_token_every_trained_token_weighs_the_same() -> None:
    assert sum_of_sample_mean(MASKS, calculate_per_token_loss=True)(VALUES).item() == pytest.approx(16.0)
    assert count_trained_tokens(MASKS).item() == 3 + 1 + 1


def test_a_rollout_of_several_samples_counts_once() -> None:
    """Two samples of one rollout with 3 + 1 trained tokens: (1 + 2 + 3 + 10) / 4."""
    assert sum_of_sample_mean(MASKS[:2], [4, 4])(VALUES[:5]).item() == pytest.approx(4.0)
    assert sum_of_sample_mean(MASKS[:2], torch.tensor([4.0, 4.0]))(VALUES[:5]).item() == pytest.approx(4.0)


def test_denominators_are_at_least_one() -> None:
    assert sum_of_sample_mean([torch.tensor([0.5])], [0.5])(torch.tensor([4.0])).item() == 2.0


def test_an_infinite_value_at_an_untrained_token_does_no_harm() -> None:
    values = torch.tensor([1.0, float("inf")], requires_grad=True)
    total = sum_of_sample_mean([torch.tensor([1, 0])])(values)
    total.backward()
    assert total.item() == 1.0
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 0.0]


def test_no_samples_sum_to_zero() -> None:
    assert sum_of_sample_mean([])(torch.zeros(0)).item() == 0.0
    assert count_trained_tokens([]).item() == 0


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Values of shape \(3,\) do not fit 7 masked tokens"):
        sum_of_sample_mean(MASKS)(torch.zeros(3))
    with pytest.raises(ValueError, match="3 loss masks but 1 denominators"):
        sum_of_sample_mean(MASKS, [1.0])


def megatron_gradient(per_token: bool, micro_batches: list[list[list[int]]]) -> torch.Tensor:
    """What Megatron makes of scaled micro-batch losses.

    micro_batches[rank][micro_batch] lists sample numbers. Default: each loss is divided by the number of micro-batches,
    gradients are averaged over ranks. Per token: gradients are summed and divided by the sum of all normalizers.
    """
    parameter = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    starts = [0, 4, 5]
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for rank in micro_batches:
        for samples in rank:
            masks = [MASKS[i] for i in samples]
            values = torch.cat(
                [VALUES[:0], *(VALUES[starts[i] : starts[i] + MASKS[i].numel()] for i in samples)]
            ).double()
            scaled = scale_for_megatron(
                sum_of_sample_mean(masks, calculate_per_token_loss=per_token)(parameter * values),
                calculate_per_token_loss=per_token,
                num_microbatches=len(rank),
                step_global_batch_size=3,
                dp_with_cp_size=len(micro_batches),
                cp_size=1,
                num_tokens=count_trained_tokens(masks),
            )
            total = total + (scaled.loss if per_token else scaled.loss / len(rank) / len(micro_batches))
            count += scaled.normalizer.item()
    (total / (count if per_token else 1)).backward()
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize("layout", [[[[0, 1, 2]]], [[[2], [1], [0]]], [[[0], [1]], [[2], []]], [[[1, 0]], [[2]]]])
@pytest.mark.parametrize(("per_token", "expected"), [(False, 12.0 / 3), (True, 16.0 / 5)])
def test_the_gradient_of_a_step_does_not_depend_on_the_layout(layout, per_token: bool, expected: float) -> None:
    assert megatron_gradient(per_token, layout).item() == pytest.approx(expected, rel=1e-12)
