"""Log-probabilities of chosen tokens and the entropy of their distributions, from logits.

Letters: N rows (one per token to be predicted), V vocabulary size, V_r the part of the vocabulary that this rank holds
under tensor parallelism (V without it). All probabilities are natural-log: log-probs and entropies are in nats.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def log_probs_and_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    with_entropy_grad: bool = True,
    keep_mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log p(target) and, if asked, H(p), for p = softmax(logits / temperature), one row per predicted token.

    The backward pass keeps one [N, V_r] tensor (the probabilities) per call, so memory is bounded by calling this on
    chunks of rows.

    Args:
        logits: [N, V_r], of any floating dtype; computed in float32 at least. Under tensor parallelism each rank of
            `group` holds an equal, consecutive part of the vocabulary, in rank order.
        targets: [N] token ids of the whole vocabulary.
        temperature: the sampling temperature of the rollout, so that both sides speak of the same distribution.
        with_entropy: whether to compute the entropy.
        with_entropy_grad: whether the entropy carries a gradient.
        keep_mask: [N, V_r] bool, False where the rollout's nucleus excluded a token. The log-prob is then that of the
            renormalised nucleus (the target counts as kept, always); the entropy is of the whole distribution.
        group: the tensor-parallel group, or None where logits hold the whole vocabulary.

    Returns:
        log-probs [N], and entropy [N] or None; float32, or float64 for float64 logits.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    first_id = dist.get_rank(group) * logits.shape[-1] if group is not None else 0
    if keep_mask is None:
        log_probs, entropy = _apply(logits, targets, first_id, with_entropy, group)
    else:
        local_targets, is_local = _local_targets(targets, first_id, logits.shape[-1])
        keeps_target = torch.zeros_like(keep_mask).scatter_(1, local_targets[:, None], is_local[:, None])
        nucleus = logits.masked_fill(~(keep_mask | keeps_target), float("-inf"))
        log_probs, _ = _apply(nucleus, targets, first_id, False, group)
        entropy = _apply(logits, targets, first_id, True, group)[1] if with_entropy else None
    if entropy is not None and not with_entropy_grad:
        entropy = entropy.detach()
    return log_probs, entropy


def nucleus_keep_mask(kept_token_ids: Tensor, offsets: Tensor, vocab_size: int, *, first_token_id: int = 0) -> Tensor:
    """[R, V_r] bool mask of the tokens that top-p sampling kept at each response token.

    Args:
        kept_token_ids: [K] token ids of all positions, one after another.
        offsets: [R + 1]; position t kept `kept_token_ids[offsets[t] : offsets[t + 1]]`. An empty span keeps nothing
            here, so that only the target remains (`log_probs_and_entropy` always keeps it).
        vocab_size: V_r, number of token ids of this rank.
        first_token_id: the first token id of this rank.
    """
    num_rows = offsets.numel() - 1
    counts = (offsets[1:] - offsets[:-1]).long()
    if num_rows < 0 or int(offsets[0]) != 0 or int(offsets[-1]) != kept_token_ids.numel() or bool((counts < 0).any()):
        raise ValueError(
            f"The offsets of kept tokens must rise from 0 to the number of ids ({kept_token_ids.numel()}), "
            f"got {offsets.tolist()[:8]}{'...' if num_rows > 8 else ''}."
        )
    rows = torch.repeat_interleave(torch.arange(num_rows, device=kept_token_ids.device), counts)
    local_ids = kept_token_ids.long() - first_token_id
    is_local = (local_ids >= 0) & (local_ids < vocab_size)
    mask = torch.zeros(num_rows, vocab_size, dtype=torch.bool, device=kept_token_ids.device)
    mask[rows[is_local], local_ids[is_local]] = True
    return mask


def _apply(
    logits: Tensor, targets: Tensor, first_id: int, with_entropy: bool, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor | None]:
    outputs: tuple[Tensor, Tensor | None] = _LogProbsAndEntropy.apply(  # type: ignore[no-untyped-call]
        logits, targets, first_id, with_entropy, group
    )
    return outputs


class _LogProbsAndEntropy(torch.autograd.Function):
    """log p(target) and H(p), keeping only p and H for the backward pass.

    d log p(target) / d logits = onehot(target) - p;  d H / d logits = -p (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, first_id: int, with_entropy: bool, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor | None]:
        num_rows, num_local = logits.shape
        if num_rows == 0:
            ctx.save_for_backward(logits, targets, None, None)
            return logits.new_zeros(0), logits.new_zeros(0) if with_entropy else None
        largest = logits.amax(dim=-1, keepdim=True)
        if group is not None:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        shifted = logits - largest
        local_targets, is_local = _local_targets(targets, first_id, num_local)
        target_logits = shifted.gather(1, local_targets[:, None])[:, 0].masked_fill(~is_local, 0.0)
        probs = shifted.exp() if with_entropy else shifted.exp_()
        sums = [probs.sum(dim=-1), target_logits]
        if with_entropy:
            shifted.clamp_(min=torch.finfo(shifted.dtype).min)  # -inf of an impossible token: 0 * -inf must be 0
            sums.append(torch.linalg.vecdot(probs, shifted))
        totals = torch.stack(sums)
        if group is not None:
            dist.all_reduce(totals, group=group)
        normalizer = totals[0]
        probs /= normalizer[:, None]
        log_probs = totals[1] - normalizer.log()
        entropy = normalizer.log() - totals[2] / normalizer if with_entropy else None
        ctx.save_for_backward(probs, local_targets, is_local, entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None, None, None]:
        grad_log_probs, grad_entropy = grad_outputs
        probs, local_targets, is_local, entropy = ctx.saved_tensors
        if probs.shape[0] == 0:
            return torch.zeros_like(probs), None, None, None, None
        grad = probs * -grad_log_probs[:, None]
        grad.scatter_add_(1, local_targets[:, None], (grad_log_probs * is_local)[:, None])
        if entropy is not None and grad_entropy is not None:
            grad -= (torch.xlogy(probs, probs) + probs * entropy[:, None]) * grad_entropy[:, None]
        return grad, None, None, None, None


def _local_targets(targets: Tensor, first_id: int, num_local: int) -> tuple[Tensor, Tensor]:
    """Targets as columns of this rank (0 where they belong to another rank), and which are this rank's."""
    local = targets - first_id
    is_local = (local >= 0) & (local < num_local)
    return local.masked_fill(~is_local, 0), is_local
