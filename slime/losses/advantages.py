"""From rewards to advantages: group normalisation, discounted returns, GAE, whitening.

Letters: B sequences padded on the right to T tokens; r rewards and V values per token (V after the end is 0); G groups
of n samples that answer the same prompt. Rewards, values, returns and advantages share the unit of the reward.
"""

import math

import torch
from torch import Tensor


def group_normalize(rewards: Tensor, *, divide_by_std: bool) -> Tensor:
    """GRPO's advantage: reward minus its group's mean, over its unbiased deviation + 1e-6 (arXiv:2402.03300, 4.1.2).

    Args:
        rewards: [G, n].
        divide_by_std: False is Dr. GRPO's choice (arXiv:2503.20783).

    Returns:
        [G, n] in float64 (a float32 mean of equal rewards is off by an ulp, which the 1e-6 would blow up). A group of
        equal rewards, or of one, gives 0.
    """
    centered = rewards.double() - rewards.double().mean(dim=-1, keepdim=True)
    if not divide_by_std:
        return centered
    variance = centered.square().sum(dim=-1, keepdim=True) / max(rewards.shape[-1] - 1, 1)
    return centered / (variance.sqrt() + 1e-6)


def discounted_returns(rewards: Tensor, discount: float) -> Tensor:
    """y_t = r_t + discount * y_(t+1), from right to left: [B, T] -> [B, T]. One step a token; see the chunked form."""
    returns = torch.zeros_like(rewards)
    running = rewards.new_zeros(rewards.shape[0])
    for t in reversed(range(rewards.shape[1])):
        running = rewards[:, t] + discount * running
        returns[:, t] = running
    return returns


def chunked_discounted_returns(rewards: Tensor, discount: float, chunk_size: int = 128) -> Tensor:
    """The same as `discounted_returns`, with T / chunk_size steps in sequence instead of T.

    Within a chunk the sum is a product with the [C, C] matrix discount^(s - t) for s >= t; from chunk to chunk only the
    first element is carried, weighted with the powers of the discount.

    Args:
        rewards: [B, T].
        discount: 0 gives the rewards themselves.
        chunk_size: C.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    batch_size, num_tokens = rewards.shape
    if batch_size == 0 or num_tokens == 0:
        return rewards.clone()
    num_chunks = -(-num_tokens // chunk_size)
    padded = torch.nn.functional.pad(rewards, (0, num_chunks * chunk_size - num_tokens))
    steps = torch.arange(chunk_size, device=rewards.device)
    distance = steps[None, :] - steps[:, None]  # [t, s]: how far s lies after t
    base = torch.tensor(discount, dtype=rewards.dtype, device=rewards.device)
    weights = torch.where(distance >= 0, base ** distance.clamp(min=0), 0.0)  # 0 ** 0 is 1
    local = torch.einsum("bcs,ts->bct", padded.view(batch_size, num_chunks, chunk_size), weights)
    carry_weights = base ** (chunk_size - steps)
    returns = torch.empty_like(local)
    carry = rewards.new_zeros(batch_size)
    for chunk in reversed(range(num_chunks)):
        returns[:, chunk] = local[:, chunk] + carry[:, None] * carry_weights
        carry = returns[:, chunk, 0]
    return returns.view(batch_size, -1)[:, :num_tokens]


def vanilla_gae(rewards: Tensor, values: Tensor, gamma: float, lambd: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation, token by token (arXiv:1506.02438, eq. 16).

    delta_t = r_t + gamma V_(t+1) - V_t;  A_t = delta_t + gamma lambd A_(t+1);  return_t = A_t + V_t.

    Args:
        rewards: [B, T]; 0 in the padding.
        values: [B, T]; 0 in the padding.

    Returns:
        advantages [B, T] and returns [B, T].
    """
    advantages = discounted_returns(_td_errors(rewards, values, gamma), gamma * lambd)
    return advantages, advantages + values


def chunked_gae(
    rewards: Tensor, values: Tensor, gamma: float, lambd: float, chunk_size: int = 128
) -> tuple[Tensor, Tensor]:
    """The same as `vanilla_gae`, in T / chunk_size sequential steps."""
    advantages = chunked_discounted_returns(_td_errors(rewards, values, gamma), gamma * lambd, chunk_size)
    return advantages, advantages + values


def _td_errors(rewards: Tensor, values: Tensor, gamma: float) -> Tensor:
    if rewards.shape != values.shape:
        raise ValueError(f"Rewards {tuple(rewards.shape)} and values {tuple(values.shape)} must have one shape.")
    next_values = torch.nn.functional.pad(values, (0, 1))[:, 1:]
    return rewards + gamma * next_values - values


def masked_moments(values: Tensor, mask: Tensor) -> Tensor:
    """[sum, sum of squares, count] of the masked values, float64; those of several ranks may be added."""
    weights = mask.to(device=values.device, dtype=torch.float64)
    x = torch.where(weights != 0, values.double(), 0.0)
    return torch.stack([(x * weights).sum(), (x * x * weights).sum(), weights.sum()])


def whiten(values: Tensor, moments: Tensor, *, shift_mean: bool = True, epsilon: float = 1e-8) -> Tensor:
    """(values - mean) / sqrt(variance + epsilon), for all values, with the statistics of `masked_moments`.

    The variance is unbiased from two values on. With `shift_mean` False the mean is added back.

    Raises:
        ValueError: a count of 0, which has no mean.
    """
    total, total_squares, count = (float(moment) for moment in moments)
    if count <= 0:
        raise ValueError(
            "Advantages cannot be whitened: no token of this rollout is trained on any rank (all loss masks are 0). "
            "Look at what sets loss_mask or remove_sample."
        )
    mean = total / count
    variance = max(total_squares / count - mean * mean, 0.0)
    if count >= 2:
        variance *= count / (count - 1)
    whitened = (values - mean) / math.sqrt(variance + epsilon)
    return whitened if shift_mean else whitened + mean
