"""From per-token values to the sum that a step averages: the mean of each sample, or every token alike.

Letters: N response tokens on the flat axis, R_i of them of sample i; m the loss mask; G the number of rollouts in a
step (`global_batch_size`); M the micro-batches of a step on one rank; DP and CP the data- and context-parallel sizes.

Each micro-batch returns a *sum*, and the step divides once, so nothing depends on how samples were packed:

    default    sum_i (x_i m_i) / denom_i       the step divides by G: every rollout weighs the same
    per token  sum_i (x_i m_i)                 the step divides by the number of trained tokens of all ranks

denom_i is the number of trained tokens of the sample or, where one rollout became several samples, of all of them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Reducer = Callable[[Tensor], Tensor]


def sum_of_sample_mean(
    loss_masks: Sequence[Tensor],
    denominators: Sequence[float] | Tensor | None = None,
    *,
    calculate_per_token_loss: bool = False,
) -> Reducer:
    """A function from a flat tensor [N] to its 0-dim sum of sample means (or of tokens).

    Args:
        loss_masks: per sample [R_i]; 0 leaves a token out (a value there may even be infinite), fractions weigh it.
        denominators: per sample, trained tokens of its rollout; at least 1 is used. None: the sum of the sample's mask.
        calculate_per_token_loss: sum over tokens; the denominators are then the caller's business.

    Raises:
        ValueError: numbers of samples or tokens that do not fit each other.
    """
    if denominators is not None and len(denominators) != len(loss_masks):
        raise ValueError(f"{len(loss_masks)} loss masks but {len(denominators)} denominators.")
    weights = _flat_weights(loss_masks, None if calculate_per_token_loss else denominators, calculate_per_token_loss)

    def reduce(values: Tensor) -> Tensor:
        if values.shape != weights.shape:
            raise ValueError(f"Values of shape {tuple(values.shape)} do not fit {weights.numel()} masked tokens.")
        weights_here = weights.to(values.device)
        dtype = torch.promote_types(values.dtype, torch.float32)
        return torch.where(weights_here != 0, values.to(dtype) * weights_here.to(dtype), 0.0).sum()

    return reduce


def _flat_weights(
    loss_masks: Sequence[Tensor], denominators: Sequence[float] | Tensor | None, per_token: bool
) -> Tensor:
    """[N] float64 weight of each token in the sum."""
    if not loss_masks:
        return torch.zeros(0, dtype=torch.float64)
    weights = torch.cat([mask.double() for mask in loss_masks])
    if per_token:
        return weights
    if denominators is None:
        denominators = torch.stack([mask.sum() for mask in loss_masks])
    denoms = torch.as_tensor(denominators, dtype=torch.float64, device=weights.device).clamp(min=1)
    # no index by lengths: they would have to reach the device, and it would be waited for
    spread = [denom.expand(mask.numel()) for denom, mask in zip(denoms, loss_masks, strict=True)]
    return weights / torch.cat(spread)


def count_trained_tokens(loss_masks: Sequence[Tensor]) -> Tensor:
    """0-dim divisor of the per-token loss: sum_i max(sum m_i, 1), so a sample without trained tokens counts as one."""
    if not loss_masks:
        return torch.tensor(0)
    return torch.stack([mask.sum() for mask in loss_masks]).clamp(min=1).sum()


class ScaledLoss(NamedTuple):
    """What a Megatron loss function returns: the loss to back-propagate and the count that normalises it.

    Attributes:
        loss: 0-dim, with gradient.
        normalizer: 0-dim; Megatron sums it over micro-batches and ranks and divides the gradient by it where
            `calculate_per_token_loss` is set; 1 otherwise.
    """

    loss: Tensor
    normalizer: Tensor


def scale_for_megatron(
    loss: Tensor,
    *,
    calculate_per_token_loss: bool,
    num_microbatches: int,
    step_global_batch_size: int,
    dp_with_cp_size: int,
    cp_size: int,
    num_tokens: Tensor,
) -> ScaledLoss:
    """Undo the divisions that Megatron makes, so that the step's gradient is that of (1/G) sum of rollout means.

    Default: Megatron divides each micro-batch's loss by M and averages gradients over DP x CP ranks; so the sum of
    means is multiplied with M x DP x CP / G. Per token: Megatron sums gradients over ranks and divides by the sum of
    all normalizers; every CP rank reports the tokens of whole samples, so the loss is multiplied with CP.

    Args:
        loss: 0-dim sum from a `Reducer`.
        num_microbatches: M.
        step_global_batch_size: G, rollouts (not samples) of this step over all ranks.
        dp_with_cp_size: DP x CP.
        num_tokens: from `count_trained_tokens` over the whole (not context-sliced) masks of this micro-batch.
    """
    if calculate_per_token_loss:
        return ScaledLoss(loss * cp_size, num_tokens.to(device=loss.device, dtype=torch.int))
    scaled = loss * (num_microbatches * dp_with_cp_size / step_global_batch_size)
    return ScaledLoss(scaled, torch.ones((), dtype=torch.int, device=loss.device))
