"""The import path under which custom losses find context-parallel slices; the code is in `slime.data.context_parallel`.

Signatures here have no place for this process's rank, so the trainer says it once with `set_context_parallel`.
"""

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

from slime.data.context_parallel import ContextParallel, PadFunction, Range, logits_and_tokens_ranges
from slime.losses.aggregation import Reducer

Values = TypeVar("Values", Tensor, list[float])

_context_parallel = ContextParallel()


def set_context_parallel(context_parallel: ContextParallel) -> None:
    """Say which context-parallel rank this process is."""
    global _context_parallel
    _context_parallel = context_parallel


def get_context_parallel() -> ContextParallel:
    """This process's place; no context parallelism until it is set."""
    return _context_parallel


def get_logits_and_tokens_offset_with_cp(
    total_length: int, response_length: int
) -> tuple[int, tuple[Range, Range], tuple[Range, Range], tuple[Range, Range]]:
    """Chunk size; this rank's chunks; the ranges of logits and of tokens of the response in them ((0, 0) if none)."""
    return logits_and_tokens_ranges(total_length, response_length, _context_parallel.rank, _context_parallel.size)


def slice_with_cp(tokens: Tensor, pad_value: float | PadFunction) -> Tensor:
    """This rank's chunks of a whole sequence."""
    return _context_parallel.slice_sequence(tokens, pad_value)


def slice_log_prob_with_cp(log_prob: Values, total_length: int, response_length: int) -> Values:
    """This rank's part of one value per response token."""
    result: Values = _context_parallel.slice_response(log_prob, total_length, response_length)
    return result


def all_gather_with_cp(tensor: Tensor, total_length: int, response_length: int) -> Tensor:
    """The whole response from each rank's part."""
    return _context_parallel.gather_response(tensor, total_length, response_length)


def get_sum_of_sample_mean(
    total_lengths: Sequence[int],
    response_lengths: Sequence[int],
    loss_masks: Sequence[Tensor],
    sample_denoms: Sequence[float] | Tensor | None = None,
    calculate_per_token_loss: bool = False,
) -> Reducer:
    """A function from this rank's flat tokens to their sum of sample means (or of tokens)."""
    return _context_parallel.get_sum_of_sample_mean(
        total_lengths, response_lengths, loss_masks, sample_denoms, calculate_per_token_loss
    )
