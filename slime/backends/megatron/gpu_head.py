"""The head on a GPU: log-probabilities and entropies from logits that are only ever held in the parameters' dtype.

Letters: N response tokens, h hidden size, V rows of the vocabulary on this tensor-parallel rank, K of the N rows whose
logits are kept for the backward pass, C rows of a chunk.

As `head.py`, with two differences. One kernel reads a row of logits once and gives all that the forward pass wants of
it, another writes the gradient in their place. And what is kept are the logits themselves, from which the gradient of
the entropy follows too. Nothing here waits for the device.
"""

from typing import Any

import torch
from torch import Tensor

from slime.backends.megatron.head import HeadOptions, VocabShard, over_the_vocabulary, padded_like, rows_of
from slime.backends.megatron.triton_kernels import logit_stats, logits_to_gradients

DEFAULT_CHUNK_ROWS = 4096
"""Large enough for matrix products at full speed: 1.2 GB of bf16 logits of a vocabulary of 150,000."""


def response_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard, options: HeadOptions
) -> tuple[Tensor, Tensor | None]:
    """As `head.response_log_probs`."""
    log_probs, entropy = _ResponseLogProbs.apply(hidden, weight, targets, shard, options)
    return log_probs, entropy if options.with_entropy else None


class _ResponseLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard, options: HeadOptions
    ) -> tuple[Tensor, Tensor]:
        live, local, is_here, kept, scratch = rows_of(
            hidden, weight, targets, shard,
            keep_bytes=options.keep_bytes if any(ctx.needs_input_grad[:2]) else 0, chunk_rows=_chunk_rows(options),
        )  # fmt: skip
        num_rows, num_kept = hidden.size(0), kept.size(0)

        stats = torch.empty(3, num_rows, device=hidden.device)
        for rows in _chunks(num_rows, num_kept, options):
            logits = kept if rows.stop <= num_kept else scratch[: rows.stop - rows.start]
            torch.mm(hidden[rows], live.t(), out=logits)
            logit_stats(logits, local[rows], stats[:, rows], options.temperature)
        log_z, target_logit, mean_logit = over_the_vocabulary(stats, is_here, shard)
        log_probs, entropy = target_logit - log_z, log_z - mean_logit
        ctx.save_for_backward(hidden, weight, local, is_here, log_probs, log_z, mean_logit)
        ctx.kept, ctx.shard, ctx.options = kept, shard, options
        if not options.entropy_has_grad:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, local, is_here, log_probs, log_z, mean_logit = ctx.saved_tensors
        options, kept = ctx.options, ctx.kept
        if kept is None:
            raise RuntimeError("The kept logits were overwritten by their gradient: this head goes backward only once.")
        ctx.kept = None
        grad_log_probs, grad_entropy = grad_log_probs.contiguous(), grad_entropy.contiguous()  # as kernels read them
        live = weight[: ctx.shard.size]
        num_rows, num_kept = hidden.size(0), kept.size(0)
        # From the log-probability: 1 - p has no digits left where p is nearly 1.
        at_target = grad_log_probs * -torch.expm1(log_probs)
        grad_hidden = torch.empty_like(hidden)
        grad_weight: Tensor | None = None
        for rows in _chunks(num_rows, num_kept, options):
            logits = kept if rows.stop <= num_kept else hidden[rows] @ live.t()
            logits_to_gradients(
                logits, local[rows], is_here[rows], log_z[rows], mean_logit[rows], at_target[rows],
                grad_log_probs[rows], grad_entropy[rows] if options.entropy_has_grad else None, options.temperature,
            )  # fmt: skip
            torch.mm(logits, live, out=grad_hidden[rows])
            if ctx.needs_input_grad[1]:
                part = logits.t() @ hidden[rows]
                grad_weight = part if grad_weight is None else grad_weight.float().add_(part)  # chunks sum in float32
            del logits
        if grad_weight is None:
            if not ctx.needs_input_grad[1]:
                return grad_hidden, None, None, None, None
            grad_weight = torch.zeros_like(live)
        return grad_hidden, padded_like(grad_weight, weight), None, None, None


def _chunk_rows(options: HeadOptions) -> int:
    return options.chunk_rows if options.chunk_rows > 0 else DEFAULT_CHUNK_ROWS


def _chunks(num_rows: int, num_kept: int, options: HeadOptions) -> list[slice]:
    """The kept rows at once, the others in chunks."""
    size = _chunk_rows(options)
    whole = [slice(0, num_kept)] if num_kept else []
    return whole + [slice(start, min(start + size, num_rows)) for start in range(num_kept, num_rows, size)]
