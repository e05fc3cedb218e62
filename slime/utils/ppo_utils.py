"""The import path under which custom losses find the formulas of `slime.losses`."""

import torch
import torch.distributed as dist
from torch import Tensor

from slime.losses.advantages import chunked_discounted_returns, chunked_gae, vanilla_gae
from slime.losses.kl import compute_approx_kl
from slime.losses.log_probs import log_probs_and_entropy

__all__ = [
    "calculate_log_probs_and_entropy",
    "chunked_discounted_returns",
    "chunked_gae",
    "compute_approx_kl",
    "vanilla_gae",
]


def calculate_log_probs_and_entropy(
    logits: Tensor,
    tokens: Tensor,
    tp_group: dist.ProcessGroup | None,
    with_entropy: bool = False,
    chunk_size: int = -1,
    log_prob_keep_mask: Tensor | None = None,
    with_entropy_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs [T, 1] of `tokens` [T] under `logits` [T, V_r], and entropy [T] or None.

    Args:
        logits: already divided by the temperature; the part of the vocabulary of this tensor-parallel rank.
        tokens: the token that each row predicts.
        tp_group: None (or a group, in a process without torch.distributed) means that logits hold the vocabulary.
        chunk_size: rows computed at a time; 0 or less: all.
        log_prob_keep_mask: [T, V_r] bool, see `slime.losses.log_probs`.

    No rows give log-probs and entropy of shape (0,).
    """
    group = tp_group if dist.is_initialized() else None
    if logits.shape[0] == 0:
        nothing = logits.float().sum(dim=-1)  # [0], and still part of the graph
        return nothing, nothing if with_entropy else None
    step = chunk_size if chunk_size > 0 else logits.shape[0]
    log_probs: list[Tensor] = []
    entropies: list[Tensor] = []
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        log_prob, entropy = log_probs_and_entropy(
            logits[rows],
            tokens[rows],
            with_entropy=with_entropy,
            with_entropy_grad=with_entropy_grad,
            keep_mask=None if log_prob_keep_mask is None else log_prob_keep_mask[rows],
            group=group,
        )
        log_probs.append(log_prob)
        if entropy is not None:
            entropies.append(entropy)
    return torch.cat(log_probs)[:, None], torch.cat(entropies) if with_entropy else None
