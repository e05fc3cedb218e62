"""What every layer must know of a packed row: which rows attend to which, and the rotary angles of each.

Letters: T rows of the packed micro-batch, d rotary dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from slime.backends.megatron.cpu_attention import Block, attention_blocks
from slime.backends.megatron.gpu_attention import Sequences
from slime.backends.megatron.transfers import sent, sent_together
from slime.data.packing import PackedBatch, Segment


class TakenKeys(NamedTuple):
    """Rows that hold the keys of all segments one after the other (its prefix, its own rows): S of T.

    Attributes:
        index: [S] rows.
        starts: [T + 1] int32, and places: [S] int32: where in `index` row t stands, from starts[t] to starts[t + 1].
    """

    index: Tensor
    starts: Tensor
    places: Tensor


@dataclass
class PackedSegments(PackedSeqParams):
    """Megatron hands this object to every attention layer.

    Megatron would derive positions from `cu_seqlens`, which cannot say that a response goes on after a prompt that
    lies elsewhere in the row. So positions travel as angles, and `VarlenAttention` applies them.
    """

    segments: tuple[Segment, ...] = ()
    cos: Tensor | None = None
    """[T, 1, d/2]."""
    sin: Tensor | None = None
    sequences: Sequences | None = None
    """On a GPU: the same for its attention kernels."""
    taken_keys: TakenKeys | None = None
    """On a GPU: the keys of all segments one after the other; None if no segment has a prefix."""
    blocks: list[Block] = field(default_factory=list)
    """On a CPU: the same, as blocks of queries and keys."""


def packed_segments(batch: PackedBatch, inverse_frequencies: Tensor, dtype: torch.dtype) -> PackedSegments:
    """Describe a micro-batch to the attention layers.

    Args:
        batch: on the device of the model.
        inverse_frequencies: [d/2] float32, radians per position.
        dtype: that cosines are rounded to; angles are taken in float32.
    """
    angles = torch.outer(batch.position_ids.float(), inverse_frequencies)[:, None, :]
    key_lengths = tuple(segment.prefix_len + segment.q_len for segment in batch.segments)
    query_lengths = tuple(segment.q_len for segment in batch.segments)
    device = batch.input_ids.device
    has_prefixes = batch.has_shared_prompts
    boundaries = _cumulative(query_lengths, device)
    key_boundaries = _cumulative(key_lengths, device) if has_prefixes else boundaries
    sequences = Sequences(boundaries, key_boundaries, query_lengths, key_lengths)
    return PackedSegments(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=key_boundaries,
        max_seqlen_q=sequences.longest_query,
        max_seqlen_kv=sequences.longest_key,
        sequences=sequences,
        segments=batch.segments,
        cos=angles.cos().to(dtype),
        sin=angles.sin().to(dtype),
        taken_keys=taken_keys(batch, device) if has_prefixes and device.type != "cpu" else None,
        blocks=attention_blocks(batch.segments, dtype) if device.type == "cpu" else [],
    )


def _cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    return sent(torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32), device)


def taken_keys(batch: PackedBatch, device: torch.device) -> TakenKeys:
    """The keys of a row with shared prompts, on `device`."""
    pieces = []
    for segment in batch.segments:
        pieces.append(torch.arange(segment.prefix_start, segment.prefix_start + segment.prefix_len))
        pieces.append(torch.arange(segment.q_start, segment.q_start + segment.q_len))
    index = torch.cat(pieces)
    counts = torch.bincount(index, minlength=batch.num_tokens)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    return TakenKeys(sent(index, device), *sent_together([starts.int(), index.argsort(stable=True).int()], device))
