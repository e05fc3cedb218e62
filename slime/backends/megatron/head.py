"""Log-probabilities of the response tokens from hidden states, without ever holding all logits in float32.

Letters: N response tokens, h hidden size, V rows of the vocabulary on this tensor-parallel rank, K of the N rows whose
softmax is kept, C rows of a chunk.

The head is a third of a small model's arithmetic, so its products are not computed twice if memory allows: the forward
pass writes the softmax of K rows over their logits, in the dtype of the parameters, and the backward pass writes the
gradient of the logits over that. Rows beyond the budget are computed again, chunk by chunk.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from slime.backends.megatron.products import product, product_into

DEFAULT_CHUNK_ROWS = 512
DEFAULT_KEEP_BYTES = 1 << 30
_CPU_BLOCK_BYTES = 4 << 20
"""Pointwise work on a CPU goes through blocks of rows that stay in its cache."""


@functools.cache
def default_keep_bytes(device: torch.device) -> int:
    """How much softmax (logits on a GPU) a training pass keeps: on a GPU a twenty-fourth of its memory, which holds
    16,384 rows of a vocabulary of 150,000 on an H200."""
    if device.type == "cpu":
        return DEFAULT_KEEP_BYTES
    return int(torch.cuda.get_device_properties(device).total_memory // 24)


@dataclass(frozen=True)
class HeadOptions:
    """How log-probabilities are taken.

    Attributes:
        temperature: logits are divided by it, as the engine did when it sampled.
        with_entropy: also give the entropy of each row.
        entropy_has_grad: the loss contains the entropy; its gradient needs exact logits, so nothing is kept.
        chunk_rows: C; 0 or less takes the default.
        keep_bytes: how much softmax to keep for the backward pass.
    """

    temperature: float = 1.0
    with_entropy: bool = False
    entropy_has_grad: bool = False
    chunk_rows: int = 0
    keep_bytes: int = DEFAULT_KEEP_BYTES


@dataclass(frozen=True)
class VocabShard:
    """The ids on this rank: [start, start + size). The ranks of `group` hold all of them; None: this rank does."""

    start: int
    size: int
    group: dist.ProcessGroup | None = None


def response_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard, options: HeadOptions
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target, and the entropy of its row.

    Args:
        hidden: [N, h], the rows that predict; the same on every rank of a split vocabulary.
        weight: [>= V, h]; rows from V on are padding and take no part.
        targets: [N] token ids.
        shard: which ids the rows of `weight` are.
        options: see there.

    Returns:
        log_probs [N] and entropy [N] or None, float32, nats. Under a split vocabulary the gradient of `hidden` is this
        rank's part of it, for the caller to sum.
    """
    log_probs, entropy = _ResponseLogProbs.apply(hidden, weight, targets, shard, options)
    return log_probs, entropy if options.with_entropy else None


class Rows(NamedTuple):
    """The rows of a head, before their logits are computed.

    Attributes:
        live: [V, h] weights of the ids on this rank.
        local: [N] column of each target, 0 where it lies on another rank.
        is_here: [N] bool, whether the target lies on this rank.
        kept: [K, V] for what the backward pass finds again.
        scratch: [at most C, V] for the logits of a chunk.
    """

    live: Tensor
    local: Tensor
    is_here: Tensor
    kept: Tensor
    scratch: Tensor


def rows_of(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard, *, keep_bytes: int, chunk_rows: int
) -> Rows:
    """See there."""
    live = weight[: shard.size]
    local = targets - shard.start
    is_here = (local >= 0) & (local < shard.size)
    num_rows = hidden.size(0)
    num_kept = min(num_rows, keep_bytes // (live.size(0) * live.element_size()))
    kept = hidden.new_empty(num_kept, shard.size)
    scratch = hidden.new_empty(min(num_rows - num_kept, chunk_rows), shard.size)
    return Rows(live, local.masked_fill(~is_here, 0), is_here, kept, scratch)


class _ResponseLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard, options: HeadOptions
    ) -> tuple[Tensor, Tensor]:
        keeps = any(ctx.needs_input_grad[:2]) and not options.entropy_has_grad
        live, local, is_here, softmax, scratch = rows_of(
            hidden, weight, targets, shard,
            keep_bytes=options.keep_bytes if keeps else 0, chunk_rows=_chunk_rows(options),
        )  # fmt: skip
        num_rows, num_kept = hidden.size(0), softmax.size(0)

        # per row: log of the sum of exponentials, logit of the target, mean logit under the softmax
        stats = torch.zeros(3, num_rows, device=hidden.device)
        for rows in _chunks(num_rows, num_kept, options):
            is_kept = rows.stop <= num_kept
            logits = softmax[rows] if is_kept else scratch[: rows.stop - rows.start]
            product_into(logits, hidden[rows], live)
            for block in _blocks(logits):
                part = slice(rows.start + block.start, rows.start + block.stop)
                _softmax_in_place(logits[block], local[part], stats[:, part], is_kept, options)
        local_log_z = stats[0].clone()
        log_z, target_logit, mean_logit = over_the_vocabulary(stats, is_here, shard)
        log_probs, entropy = target_logit - log_z, log_z - mean_logit
        ctx.save_for_backward(hidden, weight, local, is_here, log_probs, log_z, local_log_z, mean_logit)
        ctx.softmax, ctx.shard, ctx.options = softmax, shard, options
        if not options.entropy_has_grad:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, local, is_here, log_probs, log_z, local_log_z, mean_logit = ctx.saved_tensors
        options, softmax = ctx.options, ctx.softmax
        if softmax is None:
            raise RuntimeError("The kept softmax was overwritten by its gradient: this head goes backward only once.")
        ctx.softmax = None
        live = weight[: ctx.shard.size]
        num_rows, num_kept = hidden.size(0), softmax.size(0)
        grad = grad_log_probs / options.temperature
        at_target = torch.where(is_here, grad * -torch.expm1(log_probs), 0.0)
        grad_hidden = torch.empty_like(hidden)

        share = (local_log_z - log_z).exp_()  # of the whole vocabulary's mass that lies on this rank
        for block in _blocks(softmax):
            values = softmax[block].float().mul_(-(grad * share)[block, None])
            _write_targets(values, local[block], is_here[block], at_target[block])
            softmax[block] = values
        product_into(grad_hidden[:num_kept], softmax, live.t())
        needs_weight = ctx.needs_input_grad[1]
        grad_weight = product(softmax.t(), hidden[:num_kept].t()) if needs_weight else None
        del softmax

        for rows in _chunks(num_rows, num_kept, options):
            if rows.stop <= num_kept:
                continue
            logits = product(hidden[rows], live)
            for block in _blocks(logits):
                part = slice(rows.start + block.start, rows.start + block.stop)
                values = logits[block].float().div_(options.temperature)
                probabilities = (values - log_z[part, None]).exp_()
                if options.entropy_has_grad:
                    # d entropy / d logit = -p (logit - mean logit)
                    weight_of_entropy = (grad_entropy[part] / options.temperature)[:, None]
                    from_entropy = values.sub_(mean_logit[part, None]).mul_(probabilities).mul_(-weight_of_entropy)
                    from_target = grad[part] * is_here[part]
                    values = from_entropy.sub_(probabilities.mul_(grad[part, None]))
                    values.scatter_add_(1, local[part, None], from_target[:, None])
                else:
                    values = probabilities.mul_(-grad[part, None])
                    _write_targets(values, local[part], is_here[part], at_target[part])
                logits[block] = values
            product_into(grad_hidden[rows], logits, live.t())
            if grad_weight is not None:
                grad_weight = grad_weight.float().add_(
                    product(logits.t(), hidden[rows].t())
                )  # chunks add up in float32
        return grad_hidden, None if grad_weight is None else padded_like(grad_weight, weight), None, None, None


def _chunk_rows(options: HeadOptions) -> int:
    return options.chunk_rows if options.chunk_rows > 0 else DEFAULT_CHUNK_ROWS


def _chunks(num_rows: int, num_kept: int, options: HeadOptions) -> list[slice]:
    """Rows [0, num_rows) in chunks that do not cross `num_kept`."""
    size = _chunk_rows(options)
    return [
        slice(start, min(start + size, end))
        for begin, end in ((0, num_kept), (num_kept, num_rows))
        for start in range(begin, end, size)
    ]


def _blocks(logits: Tensor) -> list[slice]:
    num_rows, num_columns = logits.shape
    size = num_rows if logits.is_cuda else _CPU_BLOCK_BYTES // (4 * max(num_columns, 1))
    size = max(size, 1)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _softmax_in_place(logits: Tensor, local: Tensor, stats: Tensor, is_kept: bool, options: HeadOptions) -> None:
    """Fill `stats` [3, rows] from raw logits [rows, V], and put their softmax in their place if it is kept."""
    values = logits.float()
    if options.temperature != 1.0:
        values.div_(options.temperature)
    stats[1] = values.gather(1, local[:, None]).squeeze(1)
    top = values.amax(1, keepdim=True)
    values.sub_(top)
    exponentials = values.exp() if options.with_entropy else values.exp_()
    sums = exponentials.sum(1)
    stats[0] = sums.log() + top.squeeze(1)
    if options.with_entropy:
        stats[2] = torch.linalg.vecdot(exponentials, values) / sums + top.squeeze(1)
    if is_kept:
        torch.mul(exponentials, sums.reciprocal_()[:, None], out=logits)


def over_the_vocabulary(stats: Tensor, is_here: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor]:
    """log_z, target logit and mean logit of whole rows from those of each rank's part."""
    log_z, target_logit, mean_logit = stats
    if shard.group is None or shard.group.size() == 1:
        return log_z, target_logit, mean_logit
    top = log_z.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=shard.group)
    mass = (log_z - top).exp_()
    sums = torch.stack([mass, target_logit * is_here, mass * mean_logit])
    dist.all_reduce(sums, group=shard.group)
    return sums[0].log() + top, sums[1], sums[2] / sums[0]


def _write_targets(values: Tensor, local: Tensor, is_here: Tensor, at_target: Tensor) -> None:
    """Set the target's column of each row whose target lies on this rank.

    From the log-probability and not from the kept softmax: near 1, that has no digits left of 1 - p in bfloat16.
    """
    columns = local[:, None]
    values.scatter_(1, columns, torch.where(is_here[:, None], at_target[:, None], values.gather(1, columns)))


def padded_like(grad: Tensor, weight: Tensor) -> Tensor:
    if grad.size(0) < weight.size(0):
        grad = torch.cat([grad, grad.new_zeros(weight.size(0) - grad.size(0), grad.size(1))])
    return grad.to(weight.dtype)
