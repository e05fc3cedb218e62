"""Estimates of the KL divergence between two policies from the log-probs of sampled tokens.

Letters: x a token sampled from the policy p; q the policy it is compared with; d = log p(x) - log q(x), in nats.
Source: J. Schulman, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html, 2020).
"""

import torch
from torch import Tensor

KL_LOSS_TYPES = ("k1", "k2", "k3", "low_var_kl")


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    kl_loss_type: str,
    importance_ratio: Tensor | None = None,
) -> Tensor:
    """Per-token estimate of KL(p || q) in nats, in float32 (float64 stays).

    Args:
        log_probs: log p(x), any shape.
        log_probs_base: log q(x), same shape.
        kl_loss_type: `k1`: d (unbiased, may be negative); `k2`: d^2 / 2 (its gradient is unbiased for tokens sampled
            from p); `k3`: exp(-d) - 1 + d (unbiased and never negative); `low_var_kl`: k3 clamped to [-10, 10].
        importance_ratio: p(x) / mu(x) for tokens sampled from another policy mu; multiplies the estimate (before the
            clamp) and makes the expectation that under p (DeepSeek-V3.2, arXiv:2512.02556, "unbiased KL estimate").

    Raises:
        ValueError: an unknown `kl_loss_type`.
    """
    dtype = torch.promote_types(torch.promote_types(log_probs.dtype, log_probs_base.dtype), torch.float32)
    difference = log_probs.to(dtype) - log_probs_base.to(dtype)
    if kl_loss_type == "k1":
        kl = difference
    elif kl_loss_type == "k2":
        kl = difference**2 / 2
    elif kl_loss_type in ("k3", "low_var_kl"):
        kl = torch.exp(-difference) - 1 + difference
    else:
        raise ValueError(f"Unknown KL estimator {kl_loss_type!r}: choose one of {', '.join(KL_LOSS_TYPES)}.")
    if importance_ratio is not None:
        kl = importance_ratio * kl
    return kl.clamp(-10.0, 10.0) if kl_loss_type == "low_var_kl" else kl
