"""Attention over packed rows on a GPU: the kernels that are at hand, by name.

Letters: T rows of queries and S of keys, H query heads, G groups (key and value heads), d dimensions of a head, B
sequences.

Every kernel is a function (query [T, H, d], key [S, G, d], value [S, G, d], sequences, scale) -> [T, H, d].
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


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
    """The kernel of `ATTENTIONS` with this name.

    Raises:
        RuntimeError: it needs something that is not installed here.
    """
    return ATTENTIONS[name]()


# --- torch's own ------------------------------------------------------------------------------------------------------


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


def _torch_varlen() -> Attention:
    return _flash


def _flash(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float) -> Tensor:
    out: Tensor = _FlashAttention.apply(query, key, value, sequences, scale)
    return out


_LONG = 4096
"""Rows from which on a sequence of its own keeps the device busy."""


class Piece(NamedTuple):
    """Consecutive rows that one kernel computes.

    Attributes:
        padded: the size that a single long sequence is padded to; 0 for the sequences of `sequences`.
    """

    start: int
    stop: int
    padded: int
    sequences: Sequences | None


def pieces_of(sequences: Sequences) -> list[Piece]:
    """Long sequences one by one, and the others between them together; with prefixes, all together."""
    if sequences.has_prefixes or sequences.longest_query < _LONG:
        return [Piece(0, sum(sequences.query_lengths), 0, sequences)]
    pieces: list[Piece] = []
    row = first = 0
    lengths = sequences.query_lengths
    for i, length in enumerate(lengths):
        is_end = i + 1 == len(lengths) or lengths[i + 1] >= _LONG
        if length >= _LONG:
            pieces.append(Piece(row, row + length, _rounded_up(length), None))
            first = i + 1
        elif is_end:
            boundaries = sequences.query_boundaries[first : i + 2] - sequences.query_boundaries[first]
            among = lengths[first : i + 1]
            part = Sequences(boundaries, boundaries, among, among)
            pieces.append(Piece(row + length - sum(among), row + length, 0, part))
        row += length
    return pieces


def _torch_by_length() -> Attention:
    """cuDNN, as torch calls it, for each long sequence; flash attention for all others together.

    cuDNN is nearly twice as fast from some thousand rows on, but torch offers it only for whole batches.
    """
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]

    def attend_alone(query: Tensor, key: Tensor, value: Tensor, padded: int, scale: float) -> Tensor:
        length = query.size(0)
        # hidden from every row that counts, as it comes after them
        inputs = (F.pad(x, (0, 0, 0, 0, 0, padded - length)) if padded > length else x for x in (query, key, value))
        q, k, v = (x.transpose(0, 1)[None] for x in inputs)
        with sdpa_kernel(backends, set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)[:length]

    def attend(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float) -> Tensor:
        if "pieces" not in sequences.derived:
            sequences.derived["pieces"] = pieces_of(sequences)
        parts = []
        for piece in sequences.derived["pieces"]:
            q, k, v = (
                (query, key, value)
                if piece.sequences is sequences
                else (x[piece.start : piece.stop] for x in (query, key, value))
            )
            alone = piece.sequences is None
            parts.append(
                attend_alone(q, k, v, piece.padded, scale) if alone else _flash(q, k, v, piece.sequences, scale)
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return attend


# --- cuDNN through its own front end ---------------------------------------------------------------------------------


class _Size(NamedTuple):
    """What a graph of cuDNN is compiled for."""

    dtype: torch.dtype
    batch: int
    heads: int
    groups: int
    dim: int
    longest_query: int
    longest_key: int
    scale: float
    has_prefixes: bool
    is_deterministic: bool


class _CudnnPlans:
    """cuDNN's compiled graphs, one a size; sizes are rounded up so that few are needed.

    Boundaries tell cuDNN where rows lie, and lengths how many count, so sequences that only fill up a rounded number
    are empty ones.
    """

    def __init__(self) -> None:
        self.cudnn = importlib.import_module("cudnn")
        self._handles: dict[int, Any] = {}
        self._forward: dict[_Size, tuple[Any, int]] = {}
        self._backward: dict[_Size, tuple[Any, int]] = {}

    def handle(self, device: torch.device) -> Any:
        """This device's, on its current stream."""
        index = device.index or 0
        if index not in self._handles:
            self._handles[index] = self.cudnn.create_handle()
        handle = self._handles[index]
        self.cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
        return handle

    def forward(self, size: _Size, handle: Any) -> tuple[Any, int]:
        """Graph and bytes of workspace."""
        if size not in self._forward:
            self._forward[size] = self._build(size, handle, _forward_nodes)
        return self._forward[size]

    def backward(self, size: _Size, handle: Any) -> tuple[Any, int]:
        if size not in self._backward:
            self._backward[size] = self._build(size, handle, _backward_nodes)
        return self._backward[size]

    def _build(self, size: _Size, handle: Any, nodes: Callable[..., None]) -> tuple[Any, int]:
        cudnn = self.cudnn
        kinds = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}
        graph = cudnn.pygraph(
            io_data_type=kinds[size.dtype],
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=handle,
        )
        nodes(cudnn, graph, size)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        return graph, max(int(graph.get_workspace_size()), 1)


_QUERY, _KEY, _VALUE, _OUT, _STATS, _LENGTHS_Q, _LENGTHS_K, _AT_Q, _AT_K, _AT_STATS = range(1, 11)
_GRAD_OUT, _GRAD_QUERY, _GRAD_KEY, _GRAD_VALUE = range(11, 15)
"""Names (uids) of the tensors of a graph. _AT_*: element at which each sequence begins."""


def _described(cudnn: Any, graph: Any, size: _Size) -> dict[int, Any]:
    """Queries, keys, values, lengths and places of a graph."""
    batch, dim = size.batch, size.dim
    integer = dict(data_type=cudnn.data_type.INT32)
    tensors = {
        uid: graph.tensor(dim=[batch, 1, 1, 1], stride=[1, 1, 1, 1], uid=uid, **integer)
        for uid in (_LENGTHS_Q, _LENGTHS_K)
    }
    for uid in (_AT_Q, _AT_K):
        tensors[uid] = graph.tensor(
            dim=[batch + 1, 1, 1, 1], stride=[1, 1, 1, 1], uid=uid, data_type=cudnn.data_type.INT64
        )
    for uid, count, length, at in (
        (_QUERY, size.heads, size.longest_query, _AT_Q),
        (_KEY, size.groups, size.longest_key, _AT_K),
        (_VALUE, size.groups, size.longest_key, _AT_K),
    ):
        tensors[uid] = graph.tensor(
            dim=[batch, count, length, dim], stride=_packed(count, length, dim), uid=uid, ragged_offset=tensors[at]
        )
    return tensors


def _packed(heads: int, length: int, dim: int) -> list[int]:
    """Strides of [B, heads, length, d] in rows [T, heads, d]."""
    return [length * heads * dim, dim, heads * dim, 1]


def _causal(cudnn: Any, tensors: dict[int, Any], size: _Size) -> dict[str, Any]:
    """The mask. Where there are as many keys as queries both alignments say the same, and the top left is fast."""
    alignment = cudnn.diagonal_alignment
    return dict(
        attn_scale=size.scale, use_padding_mask=True, seq_len_q=tensors[_LENGTHS_Q], seq_len_kv=tensors[_LENGTHS_K],
        diagonal_alignment=alignment.BOTTOM_RIGHT if size.has_prefixes else alignment.TOP_LEFT,
        diagonal_band_right_bound=0,
    )  # fmt: skip


def _forward_nodes(cudnn: Any, graph: Any, size: _Size) -> None:
    batch, heads, dim, longest_query = size.batch, size.heads, size.dim, size.longest_query
    tensors = _described(cudnn, graph, size)
    out, stats = graph.sdpa(
        name="attention", q=tensors[_QUERY], k=tensors[_KEY], v=tensors[_VALUE],
        generate_stats=True, **_causal(cudnn, tensors, size),
    )  # fmt: skip
    out.set_output(True).set_uid(_OUT).set_dim([batch, heads, longest_query, dim])
    out.set_stride(_packed(heads, longest_query, dim)).set_ragged_offset(tensors[_AT_Q])
    stats.set_output(True).set_uid(_STATS).set_data_type(cudnn.data_type.FLOAT)
    stats.set_dim([batch, heads, longest_query, 1]).set_stride([heads * longest_query, longest_query, 1, 1])


def _backward_nodes(cudnn: Any, graph: Any, size: _Size) -> None:
    batch, heads, groups, dim = size.batch, size.heads, size.groups, size.dim
    longest_query, longest_key = size.longest_query, size.longest_key
    tensors = _described(cudnn, graph, size)
    rows = dict(
        dim=[batch, heads, longest_query, dim],
        stride=_packed(heads, longest_query, dim),
        ragged_offset=tensors[_AT_Q],
    )
    out, grad_out = graph.tensor(uid=_OUT, **rows), graph.tensor(uid=_GRAD_OUT, **rows)
    stats = graph.tensor(
        dim=[batch, heads, longest_query, 1], stride=[heads * longest_query, longest_query, 1, 1], uid=_STATS,
        data_type=cudnn.data_type.FLOAT,
    )  # fmt: skip
    gradients = graph.sdpa_backward(
        name="attention_backward", q=tensors[_QUERY], k=tensors[_KEY], v=tensors[_VALUE],
        o=out, dO=grad_out, stats=stats, use_deterministic_algorithm=size.is_deterministic,
        **_causal(cudnn, tensors, size),
    )  # fmt: skip
    for gradient, uid, count, length, at in zip(
        gradients, (_GRAD_QUERY, _GRAD_KEY, _GRAD_VALUE), (heads, groups, groups),
        (longest_query, longest_key, longest_key), (_AT_Q, _AT_K, _AT_K), strict=True,
    ):  # fmt: skip
        gradient.set_output(True).set_uid(uid).set_dim([batch, count, length, dim])
        gradient.set_stride(_packed(count, length, dim)).set_ragged_offset(tensors[at])


def _rounded_up(value: int) -> int:
    """To a multiple of an eighth of the power of two below it, at least 64: at most a seventh more, few sizes."""
    step = max(64, 1 << max(value.bit_length() - 4, 0))
    return -(-value // step) * step


@functools.cache
def _cudnn_plans() -> _CudnnPlans:
    return _CudnnPlans()


class _CudnnAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float) -> Tensor:
        plans = _cudnn_plans()
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        heads, groups, dim = query.size(1), key.size(1), query.size(2)
        batch = 1 << max(sequences.query_boundaries.numel() - 2, 0).bit_length()
        size = _Size(
            query.dtype, batch, heads, groups, dim, _rounded_up(sequences.longest_query),
            _rounded_up(sequences.longest_key), scale, sequences.has_prefixes,
            torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        places = _places(sequences, size)
        out = torch.empty_like(query)
        stats = query.new_empty(batch, heads, size.longest_query, dtype=torch.float32)
        handle = plans.handle(query.device)
        graph, workspace_bytes = plans.forward(size, handle)
        pack = _variant_pack(query, key, value, out, stats, places)
        graph.execute(pack, query.new_empty(workspace_bytes, dtype=torch.uint8), handle=handle)
        ctx.save_for_backward(query, key, value, out, stats)
        ctx.size, ctx.places = size, places
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, stats = ctx.saved_tensors
        plans = _cudnn_plans()
        gradients = [torch.empty_like(x) for x in (query, key, value)]
        handle = plans.handle(query.device)
        graph, workspace_bytes = plans.backward(ctx.size, handle)
        pack = _variant_pack(query, key, value, out, stats, ctx.places) | {_GRAD_OUT: grad.contiguous()}
        pack |= dict(zip((_GRAD_QUERY, _GRAD_KEY, _GRAD_VALUE), gradients, strict=True))
        graph.execute(pack, query.new_empty(workspace_bytes, dtype=torch.uint8), handle=handle)
        return *gradients, None, None


def _places(sequences: Sequences, size: _Size) -> tuple[Tensor, ...]:
    """Lengths [batch] int32, and elements at which sequences begin [batch + 1] int64, of queries and of keys; sequences
    that are added to fill up the batch are empty."""
    wanted = (size.batch, size.heads * size.dim, size.groups * size.dim)
    if wanted not in sequences.derived:
        places = []
        for boundaries, row_size in zip(
            (sequences.query_boundaries, sequences.key_boundaries), wanted[1:], strict=True
        ):
            if missing := size.batch + 1 - boundaries.numel():
                boundaries = torch.cat([boundaries, boundaries[-1:].expand(missing)])
            places += [boundaries.diff().int(), boundaries.long() * row_size]
        sequences.derived[wanted] = tuple(places)
    found: tuple[Tensor, ...] = sequences.derived[wanted]
    return found


def _variant_pack(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, stats: Tensor, places: tuple[Tensor, ...]
) -> dict[int, Tensor]:
    lengths_q, at_q, lengths_k, at_k = places
    return {
        _QUERY: query, _KEY: key, _VALUE: value, _OUT: out, _STATS: stats, _LENGTHS_Q: lengths_q,
        _LENGTHS_K: lengths_k, _AT_Q: at_q, _AT_K: at_k,
    }  # fmt: skip


def _cudnn_frontend() -> Attention:
    _cudnn_plans()

    def attend(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float) -> Tensor:
        out: Tensor = _CudnnAttention.apply(query, key, value, sequences, scale)
        return out

    return attend


ATTENTIONS: dict[str, Callable[[], Attention]] = {
    "torch by length": _torch_by_length,
    "torch varlen": _torch_varlen,
    "cuDNN front end": _cudnn_frontend,
}
"""Name -> what makes the function."""
