"""Attention over packed rows on a CPU: blocks of queries, each against the keys it may see.

Letters: T rows, H query heads, G groups (key and value heads), r = H / G query heads of a group, d dimensions of a
head; Q queries and K keys of a block.

torch's CPU kernel is fast forward and slow backward (a quarter of a training step on short responses), so the backward
pass is written as matrix products here. A group whose prompt is shared is one block: its prompt and its responses
attend under one mask. Longer segments are cut into tiles of queries, which bounds memory and skips what is hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slime.data.packing import Segment

_GROUP_ROWS = 384
"""A prompt and its responses are one block up to this many rows; beyond, most of its square would be masked."""
_TILE_ROWS = 128


@dataclass(frozen=True)
class Block:
    """Queries that are computed together.

    Attributes:
        queries: their rows.
        keys: rows that any of them sees, as ranges one after the other.
        hidden: [Q, K] additive mask, 0 or -inf, in the dtype of the activations.
    """

    queries: slice
    keys: tuple[slice, ...]
    hidden: Tensor


def attention_blocks(segments: Sequence[Segment], dtype: torch.dtype) -> list[Block]:
    """Cut a packed row into blocks. Every row is a query of exactly one."""
    masks: dict[tuple[int, int], Tensor] = {}
    blocks: list[Block] = []
    for group in _groups(segments):
        first, last = group[0], group[-1]
        num_rows = last.q_start + last.q_len - first.q_start
        if len(group) > 1 and num_rows <= _GROUP_ROWS:
            rows = slice(first.q_start, first.q_start + num_rows)
            blocks.append(Block(rows, (rows,), _hidden(_group_mask(group), dtype)))
            continue
        for segment in group:
            blocks += _tiles(segment, dtype, masks)
    return blocks


def _groups(segments: Sequence[Segment]) -> list[list[Segment]]:
    """A prompt with the responses that follow it, or a segment alone."""
    groups: list[list[Segment]] = []
    for segment in segments:
        prompt = groups[-1][0] if groups else None
        if (
            segment.prefix_len
            and prompt
            and (segment.prefix_start, segment.prefix_len) == (prompt.q_start, prompt.q_len)
        ):
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return groups


def _group_mask(group: Sequence[Segment]) -> Tensor:
    """[rows, rows] bool: what each row of a prompt and its responses sees."""
    first, last = group[0], group[-1]
    num_rows = last.q_start + last.q_len - first.q_start
    sees = torch.zeros(num_rows, num_rows, dtype=torch.bool)
    for segment in group:
        start, stop = segment.q_start - first.q_start, segment.q_start - first.q_start + segment.q_len
        sees[start:stop, start:stop] = torch.ones(segment.q_len, segment.q_len, dtype=torch.bool).tril()
        sees[start:stop, : segment.prefix_len] = True
    return sees


def _tiles(segment: Segment, dtype: torch.dtype, masks: dict[tuple[int, int], Tensor]) -> list[Block]:
    """A segment in tiles of queries; each sees the prefix and the segment up to its own last row."""
    tiles = []
    prefix = slice(segment.prefix_start, segment.prefix_start + segment.prefix_len)
    for start in range(0, segment.q_len, _TILE_ROWS):
        stop = min(start + _TILE_ROWS, segment.q_len)
        num_queries, num_keys = stop - start, segment.prefix_len + stop
        if (num_queries, num_keys) not in masks:
            sees = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
            masks[num_queries, num_keys] = _hidden(sees, dtype)
        own = slice(segment.q_start, segment.q_start + stop)
        keys = (prefix, own) if segment.prefix_len else (own,)
        queries = slice(segment.q_start + start, segment.q_start + stop)
        tiles.append(Block(queries, keys, masks[num_queries, num_keys]))
    return tiles


def _hidden(sees: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, float("-inf"))


def attend(query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], scale: float) -> Tensor:
    """Softmax attention within each block.

    Args:
        query: [T, H, d].
        key, value: [T, G, d].
        blocks: from `attention_blocks`.
        scale: multiplies the scores.

    Returns:
        [T, H, d].
    """
    return _BlockAttention.apply(query, key, value, blocks, scale)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], scale: float) -> Tensor:
        groups = key.size(1)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        log_sums = []
        for block in blocks:
            q = _by_group(query[block.queries], groups)
            k, v = (_rows(x, block.keys).transpose(0, 1) for x in (key, value))
            mask = block.hidden.repeat(q.size(1) // block.hidden.size(0), 1)
            part, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[None], k[None], v[None], attn_mask=mask[None, None], scale=scale
            )
            out[block.queries] = _by_row(part[0], query.size(1))
            log_sums.append(log_sum[0])
        ctx.save_for_backward(query, key, value, out, *log_sums)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *log_sums = ctx.saved_tensors
        groups, dtype = key.size(1), query.dtype
        grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        grad_key, grad_value = (torch.zeros(x.shape, dtype=torch.float32) for x in (key, value))
        # sum over keys of p * (gradient of p), per query and head
        inner = (grad.float() * out.float()).sum(-1, keepdim=True)
        for block, log_sum in zip(ctx.blocks, log_sums, strict=True):
            q, g = (_by_group(x[block.queries], groups) for x in (query, grad))
            k, v = (_rows(x, block.keys).transpose(0, 1) for x in (key, value))
            p = _probabilities(q, k, block.hidden, log_sum, ctx.scale)
            grad_p = _product_in_float32(g, v)
            grad_scores = grad_p.sub_(_by_group(inner[block.queries], groups)).mul_(p).mul_(ctx.scale).to(dtype)
            grad_query[block.queries] = _by_row(torch.bmm(grad_scores, k), query.size(1))
            _add_rows(grad_key, block.keys, torch.bmm(grad_scores.transpose(1, 2), q))
            _add_rows(grad_value, block.keys, torch.bmm(p.to(dtype).transpose(1, 2), g))
        return grad_query, grad_key.to(dtype), grad_value.to(dtype), None, None


def _probabilities(q: Tensor, k: Tensor, hidden: Tensor, log_sum: Tensor, scale: float) -> Tensor:
    """[G, r * Q, K] float32 softmax, from the logarithm of its denominators."""
    scores = _product_in_float32(q, k).mul_(scale).sub_(log_sum[..., None])
    scores.view(q.size(0), -1, *hidden.shape).add_(hidden)
    return scores.exp_()


def _product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """a [G, m, d] times b [G, n, d] transposed: [G, m, n] float32, from numbers that are exact in their dtype.

    From bfloat16, oneDNN multiplies them as such and sums in float32: nothing is lost, and it is 2.5 times as fast.
    torch has no such product on a CPU, but lets oneDNN round the factors of a float32 one, here to what they are.
    """
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    if a.dtype is torch.bfloat16:
        settings.fp32_precision = "bf16"
    try:
        return torch.bmm(a.float(), b.float().transpose(1, 2))
    finally:
        settings.fp32_precision = before


def _by_group(x: Tensor, groups: int) -> Tensor:
    """[Q, H, d] -> [G, r * Q, d]: the query heads of a group one under the other."""
    rows, heads, dim = x.shape
    return x.view(rows, groups, heads // groups, dim).permute(1, 2, 0, 3).reshape(groups, -1, dim)


def _by_row(x: Tensor, heads: int) -> Tensor:
    """[G, r * Q, d] -> [Q, H, d]."""
    groups, _, dim = x.shape
    return x.view(groups, heads // groups, -1, dim).permute(2, 0, 1, 3).flatten(1, 2)


def _rows(x: Tensor, ranges: Sequence[slice]) -> Tensor:
    return x[ranges[0]] if len(ranges) == 1 else torch.cat([x[rows] for rows in ranges])


def _add_rows(total: Tensor, ranges: Sequence[slice], part: Tensor) -> None:
    """Add [G, K, d] to the rows of [T, G, d] that the ranges name."""
    start = 0
    for rows in ranges:
        stop = start + rows.stop - rows.start
        total[rows] += part[:, start:stop].transpose(0, 1)
        start = stop
