"""Which tokens of a sequence a context-parallel rank holds, as arithmetic on ints, and the slices and gathers by it.

Letters: L tokens of a sample, P of them prompt and R response; cp ranks, r one of them. A sequence is cut into 2 cp
chunks of ceil(L / 2 cp) tokens (padded at the end), and rank r holds chunks r and 2 cp - 1 - r, which gives every rank
the same work under a causal mask:

    L = 8, cp = 2     tokens 0 1 | 2 3 | 4 5 | 6 7      rank 0: 0 1 6 7     rank 1: 2 3 4 5

Everything is the identity for cp = 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor

from slime.losses.aggregation import Reducer, sum_of_sample_mean

Range = tuple[int, int]
PadFunction = Callable[[Tensor, int], Tensor]
T = TypeVar("T")


def chunk_ranges(total_length: int, cp_rank: int, cp_size: int) -> tuple[int, tuple[Range, Range]]:
    """Chunk size and the [start, end) of the two chunks of a rank, in tokens of the padded sequence."""
    chunk_size = -(-total_length // (2 * cp_size))
    mirror = 2 * cp_size - 1 - cp_rank
    return chunk_size, (
        (cp_rank * chunk_size, (cp_rank + 1) * chunk_size),
        (mirror * chunk_size, (mirror + 1) * chunk_size),
    )


def logits_and_tokens_ranges(
    total_length: int, response_length: int, cp_rank: int, cp_size: int
) -> tuple[int, tuple[Range, Range], tuple[Range, Range], tuple[Range, Range]]:
    """Which rows of a rank's chunks predict response tokens.

    Returns:
        chunk size; the two chunks; per chunk the [start, end) of sequence positions whose logits predict a response
        token, (0, 0) if none; and of the tokens they predict (one further each), (0, 0) if none.
    """
    chunk_size, chunks = chunk_ranges(total_length, cp_rank, cp_size)
    prompt_length = total_length - response_length
    logits: list[Range] = []
    tokens: list[Range] = []
    for chunk_start, chunk_end in chunks:
        start, end = max(chunk_start, prompt_length - 1), min(chunk_end, total_length - 1)
        is_empty = start >= end
        logits.append((0, 0) if is_empty else (start, end))
        tokens.append((0, 0) if is_empty else (start + 1, end + 1))
    return chunk_size, chunks, (logits[0], logits[1]), (tokens[0], tokens[1])


def response_ranges(total_length: int, response_length: int, cp_rank: int, cp_size: int) -> tuple[Range, Range]:
    """[start, end) within the response (0 is its first token) of what a rank holds, for each of its two chunks."""
    prompt_length = total_length - response_length
    _, _, _, (first, second) = logits_and_tokens_ranges(total_length, response_length, cp_rank, cp_size)
    ranges = [(start - prompt_length, end - prompt_length) if end > start else (0, 0) for start, end in (first, second)]
    return ranges[0], ranges[1]


@dataclass(frozen=True)
class ContextParallel:
    """This process's place in context parallelism; the default is none.

    Attributes:
        rank: r, from 0.
        size: cp.
        group: where the cp ranks meet; needed by `gather_response` only.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def slice_sequence(self, tokens: Tensor, pad_value: float | PadFunction) -> Tensor:
        """The rank's 2 chunks of a sequence [L, ...] padded to 2 cp chunks: [2 * chunk_size, ...].

        Args:
            tokens: [L, ...].
            pad_value: what the padding holds, or a function (tokens, number of rows to add) -> padded tokens.
        """
        if self.size == 1:
            return tokens
        chunk_size, chunks = chunk_ranges(tokens.shape[0], self.rank, self.size)
        padding = 2 * self.size * chunk_size - tokens.shape[0]
        if callable(pad_value):
            tokens = pad_value(tokens, padding)
        else:
            tokens = torch.nn.functional.pad(tokens, (0, 0) * (tokens.dim() - 1) + (0, padding), value=pad_value)
        return torch.cat([tokens[start:end] for start, end in chunks])

    @overload
    def slice_response(self, values: Tensor, total_length: int, response_length: int) -> Tensor: ...

    @overload
    def slice_response(self, values: list[T], total_length: int, response_length: int) -> list[T]: ...

    def slice_response(self, values: Any, total_length: int, response_length: int) -> Any:
        """The rank's part of one value per response token: [R] (tensor or list) -> [R_local]."""
        if len(values) != response_length:
            raise ValueError(f"{len(values)} values do not fit a response of {response_length} tokens.")
        if self.size == 1:
            return values
        parts = [
            values[start:end] for start, end in response_ranges(total_length, response_length, self.rank, self.size)
        ]
        return torch.cat(parts) if isinstance(values, Tensor) else parts[0] + parts[1]

    def local_response_length(self, total_length: int, response_length: int) -> int:
        """R_local: response tokens of a sample that this rank holds."""
        ranges = response_ranges(total_length, response_length, self.rank, self.size)
        return sum(end - start for start, end in ranges)

    def gather_response(self, local: Tensor, total_length: int, response_length: int) -> Tensor:
        """The whole response [R, ...] from each rank's part [R_local, ...]; gradients flow back to every part."""
        if self.size == 1:
            return local
        if self.group is None:
            raise ValueError(f"Rank {self.rank} of {self.size} context-parallel ranks has no group to gather over.")
        full = local.new_zeros(response_length, *local.shape[1:])
        row = 0
        pieces: list[Tensor] = []
        at = 0
        for start, end in response_ranges(total_length, response_length, self.rank, self.size):
            # an empty part joins too: every rank must take part in the backward pass
            pieces += [full[at:start], local[row : row + end - start]]
            row += end - start
            at = max(at, end)
        pieces.append(full[at:])
        gathered: Tensor = _SumOverRanks.apply(torch.cat(pieces), self.group)  # type: ignore[no-untyped-call]
        return gathered

    def get_sum_of_sample_mean(
        self,
        total_lengths: Sequence[int],
        response_lengths: Sequence[int],
        loss_masks: Sequence[Tensor],
        sample_denoms: Sequence[float] | Tensor | None = None,
        calculate_per_token_loss: bool = False,
    ) -> Reducer:
        """`sum_of_sample_mean` for this rank's flat tokens: masks are sliced, denominators stay those of the whole.

        Args:
            total_lengths: L of each sample.
            response_lengths: R of each sample.
            loss_masks: per sample [R], of the whole response.
            sample_denoms: trained tokens of each sample's rollout; None: of the sample.
        """
        if sample_denoms is None and loss_masks:
            sample_denoms = torch.stack([mask.sum() for mask in loss_masks])
        lengths = zip(loss_masks, total_lengths, response_lengths, strict=True)
        local_masks = [self.slice_response(mask, total, response) for mask, total, response in lengths]
        return sum_of_sample_mean(local_masks, sample_denoms, calculate_per_token_loss=calculate_per_token_loss)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduce of the gradients, for a loss that is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:
        grad = grad_outputs[0].contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
