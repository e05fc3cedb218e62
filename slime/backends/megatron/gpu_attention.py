"""Attention over packed rows on a GPU: torch's flash attention, and cuDNN for long sequences.

Letters: T rows of queries and S of keys, H query heads, G groups (key and value heads), d dimensions of a head, B
sequences.

Every kernel is a function (query [T, H, d], key [S, G, d], value [S, G, d], sequences, scale) -> [T, H, d].
"""

import functools
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sequences:
    """Which rows attend to which: one object a micro-batch, for all layers.

    Sequence i has the rows [boundaries[i], boundaries[i + 1]). It is causal, and its last query stands at its last key,
    so that a response can have the keys of its prompt before its own.

    Attributes:
        query_boundaries, key_boundaries: [B + 1] int32 on the device, from 0 to T and S.
        query_lengths, key_lengths: of each sequence.
        derived: what a kernel makes of it, kept for the next layer.
    """

    query_boundaries: Tensor
    key_boundaries: Tensor
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    derived: dict[Any, Any] = field(default_factory=dict, compare=False)

    @functools.cached_property
    def longest_query(self) -> int:
        return max(self.query_lengths, default=0)

    @functools.cached_property
    def longest_key(self) -> int:
        return max(self.key_lengths, default=0)

    @functools.cached_property
    def has_prefixes(self) -> bool:
        """Whether any sequence has more keys than queries."""
        return self.query_lengths != self.key_lengths


Attention = Callable[[Tensor, Tensor, Tensor, Sequences, float], Tensor]


def attention_named(name: str) -> Attention:
    """The kernel of `ATTENTIONS` with this name."""
    return ATTENTIONS[name]()


class _FlashAttention(torch.autograd.Function):
    """The kernel behind torch.nn.attention.varlen, which takes fewer key heads in every version of torch.

    (As an operator with a Python body that one costs the host a fifth of a millisecond a layer.)
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float) -> Tensor:
        s = sequences
        out, log_sums, *random_state, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, s.query_boundaries, s.key_boundaries, s.longest_query, s.longest_key, 0.0, True, False,
            scale=scale,
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, out, log_sums, *random_state)
        ctx.sequences, ctx.scale = sequences, scale
        assert isinstance(out, Tensor)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, log_sums, *random_state = ctx.saved_tensors
        s = ctx.sequences
        gradients = torch.ops.aten._flash_attention_backward(
            grad, query, key, value, out, log_sums, s.query_boundaries, s.key_boundaries, s.longest_query,
            s.longest_key, 0.0, True, *random_state, scale=ctx.scale,
        )  # fmt: skip
        return *gradients, None, None


def _flash(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float) -> Tensor:
    out: Tensor = _FlashAttention.apply(query, key, value, sequences, scale)
    return out


_LONG = 4096
"""Rows from which on a sequence of its own keeps the device busy."""


class Piece(NamedTuple):
    """Consecutive sequences that one kernel computes.

    Attributes:
        rows, keys: theirs, of T and of S.
        padded: the size that a single long sequence is padded to; 0 where there are several, or short ones.
        sequences: what flash attention is told of them.
    """

    rows: slice
    keys: slice
    padded: int
    sequences: Sequences


def pieces_of(sequences: Sequences) -> list[Piece]:
    """Long sequences one by one, and the others between them together."""
    lengths = list(zip(sequences.query_lengths, sequences.key_lengths, strict=True))
    alone = [queries >= _LONG and keys <= 2 * queries for queries, keys in lengths]
    pieces: list[Piece] = []
    first = row = key = 0
    for i in range(len(lengths)):
        if not (alone[i] or i + 1 == len(lengths) or alone[i + 1]):
            continue
        among = slice(first, i + 1)
        part = _part(sequences, among)
        rows, keys = sum(part.query_lengths), sum(part.key_lengths)
        padded = _rounded_up(keys) if alone[i] else 0
        pieces.append(Piece(slice(row, row + rows), slice(key, key + keys), padded, part))
        first, row, key = i + 1, row + rows, key + keys
    return pieces


def _part(sequences: Sequences, which: slice) -> Sequences:
    bounds = slice(which.start, which.stop + 1)
    queries = sequences.query_boundaries[bounds] - sequences.query_boundaries[which.start]
    keys = sequences.key_boundaries[bounds] - sequences.key_boundaries[which.start]
    return Sequences(queries, keys, sequences.query_lengths[which], sequences.key_lengths[which])


def _rounded_up(value: int) -> int:
    """To a multiple of an eighth of the power of two below it: at most an eighth more, eight sizes an octave.

    cuDNN builds a plan for each size, which takes it some tenths of a second.
    """
    step = max(64, 1 << max(value.bit_length() - 4, 0))
    return -(-value // step) * step


class _LongSequences:
    """cuDNN's kernel, as torch calls it, for one sequence.

    torch and cuDNN decide by device, version, head size, strides and length whether it runs. So each size is tried,
    backward too, before its first use; the first that fails is logged, and cuDNN is not asked again.
    """

    def __init__(self) -> None:
        self.is_refused = False
        self._tried: set[tuple[Any, ...]] = set()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, padded: int, scale: float) -> Tensor | None:
        """None: cuDNN does not do it.

        The mask of torch has as many queries as keys. So a prefix gets queries, whose outputs nobody wants; and the
        rows that fill up the size come after all that count, and are hidden from them.
        """
        length = key.size(0)
        prefix = length - query.size(0)
        inputs = _padded(query, prefix, padded - length), *(_padded(x, 0, padded - length) for x in (key, value))
        q, k, v = (x[None].transpose(1, 2) for x in inputs)
        with_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        size = (with_gradient, q.dtype, *(number for x in (q, k, v) for number in (*x.shape, *x.stride())))
        if size not in self._tried and not self.is_refused:
            self._try(q, k, v, scale, with_gradient)
            self._tried.add(size)
        if self.is_refused:
            return None
        # not out[0]: the gradient of an index is a copy into zeros
        return _by_cudnn(q, k, v, scale).transpose(1, 2).squeeze(0)[prefix:length]

    def _try(self, query: Tensor, key: Tensor, value: Tensor, scale: float, with_gradient: bool) -> None:
        rows, start = query.size(2), time.perf_counter()
        q, k, v = (x.detach().requires_grad_(with_gradient) for x in (query, key, value))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")  # torch gives its reasons as warnings
            try:
                out = _by_cudnn(q, k, v, scale)
                if with_gradient:
                    torch.autograd.grad(out, (q, k, v), out.detach())
            except RuntimeError as error:
                if not any(words in str(error).lower() for words in _REFUSALS):
                    raise
                self.is_refused = True
                reasons = _reasons(error, said)
        if self.is_refused:
            logger.warning("cuDNN does not run attention over %d rows: %s Flash attention does instead.", rows, reasons)
        else:
            what = "forward and backward" if with_gradient else "forward"
            seconds = time.perf_counter() - start
            logger.info("Attention over %d rows: cuDNN, %s (%.2f s to try it, once).", rows, what, seconds)


def _padded(x: Tensor, before: int, after: int) -> Tensor:
    """With rows of zeros."""
    return F.pad(x, (0, 0, 0, 0, before, after)) if before or after else x


_REFUSALS = ("no available kernel", "no viable backend", "cudnn")
"""What errors say where torch's conditions are not met, and where cuDNN has no plan (with its name, or its file's)."""


def _reasons(error: RuntimeError, said: Sequence[warnings.WarningMessage]) -> str:
    """The error, and what torch says of cuDNN (it says it last, after its other kernels)."""
    words = [str(one.message).partition(" (Triggered internally")[0] for one in said]
    about = next((i for i, text in enumerate(words) if "cudnn" in text.lower()), len(words))
    return " ".join([str(error).strip(), *words[about:]])


def _by_cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """query: [1, H, L, d]; key, value: [1, G, L, d]; causal."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


def _by_length() -> Attention:
    """cuDNN for each long sequence; flash attention for all others together.

    cuDNN is nearly twice as fast from some thousand rows on, but torch offers it only for whole batches.
    """
    long_sequences = _LongSequences()

    def attend(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float) -> Tensor:
        if "pieces" not in sequences.derived:
            sequences.derived["pieces"] = pieces_of(sequences)
        pieces: list[Piece] = sequences.derived["pieces"]
        if long_sequences.is_refused or not any(piece.padded for piece in pieces):
            return _flash(query, key, value, sequences, scale)
        parts = []
        for piece in pieces:
            q, k, v = query[piece.rows], key[piece.keys], value[piece.keys]
            part = long_sequences.attend(q, k, v, piece.padded, scale) if piece.padded else None
            parts.append(_flash(q, k, v, piece.sequences, scale) if part is None else part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return attend


ATTENTIONS: dict[str, Callable[[], Attention]] = {
    "flash attention, cuDNN for long sequences": _by_length,
    "flash attention": lambda: _flash,
}
"""Name -> what makes the function; the preferred one first."""
