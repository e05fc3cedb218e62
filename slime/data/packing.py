"""Packs the samples of one micro-batch into one row of tokens, computing a prompt that several samples share only once.

Letters: T tokens in the row (with padding), N response tokens of all samples, i a sample, P_i and R_i its prompt and
response lengths. The flat axis [N] always has the samples in the order given, whatever the order of the row.

Three samples; a and b answer the prompt "p q r", c another one. Not shared, each sequence is one segment, causal in
itself, and the row is what a packed-sequence kernel expects (cumulative total lengths):

    row        p q r a1 a2 | p q r b1 b2 b3 | s c1 | 0 0        T = 14, multiple_of = 2
    positions  0 1 2 3  4    0 1 2 3  4  5    0 1    0 1        the last segment is padding

Shared, each distinct prompt of a group is a segment, followed by the responses that see it as their prefix. The last
token of a response predicts nothing, so it has no place in the row:

    row        p q r | a1 | b1 b2 | s | 0                       T = 8
    positions  0 1 2   3    3  4    0   0
    prefix     -       pqr  pqr     -   -
    head_index: a1 a2 are predicted by rows 2 3, b1 b2 b3 by rows 2 4 5, c1 by row 6

Cost: a row costs its T tokens. `num_packed_tokens` gives T without building the row, so that the micro-batch plan
(`slime.data.schedule`) can fill a cap of tokens with what is really computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """Consecutive rows that attend causally to each other, and wholly to an earlier segment: their prefix.

    Attributes:
        q_start: first row.
        q_len: number of rows, at least 1.
        prefix_start: first row of the prefix; 0 where there is none.
        prefix_len: rows of the prefix; 0 for a sequence of its own. The prefix lies wholly before `q_start`.
    """

    q_start: int
    q_len: int
    prefix_start: int = 0
    prefix_len: int = 0


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch as one row.

    Attributes:
        input_ids: [T] token ids; padding is 0.
        position_ids: [T] position of each token in its own sequence (a response goes on after its prompt).
        segments: cover the row without gap or overlap, in order; the last one is padding if `num_padding` > 0.
        head_index: [N] the row whose hidden state predicts each response token.
        targets: [N] the response tokens.
        response_lengths: R_i of each sample, in the order given; they sum to N.
        total_lengths: P_i + R_i of each sample, in the order given.
        num_padding: rows at the end of the row that belong to no sample.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: tuple[Segment, ...]
    head_index: Tensor
    targets: Tensor
    response_lengths: tuple[int, ...]
    total_lengths: tuple[int, ...]
    num_padding: int

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.input_ids.numel()

    @property
    def num_response_tokens(self) -> int:
        """N."""
        return self.targets.numel()

    @property
    def has_shared_prompts(self) -> bool:
        """Whether any segment has a prefix. If not, plain causal attention per segment is all there is."""
        return any(segment.prefix_len for segment in self.segments)

    @property
    def cu_seqlens(self) -> list[int]:
        """Boundaries of the segments, from 0 to T: the cumulative query lengths of a variable-length kernel."""
        return [segment.q_start for segment in self.segments] + [self.num_tokens]

    @property
    def response_slices(self) -> list[slice]:
        """The part of the flat axis [N] that belongs to each sample."""
        return response_slices(self.response_lengths)

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch with its tensors on another device."""
        return PackedBatch(
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            segments=self.segments,
            head_index=self.head_index.to(device),
            targets=self.targets.to(device),
            response_lengths=self.response_lengths,
            total_lengths=self.total_lengths,
            num_padding=self.num_padding,
        )


def pack(
    tokens: Sequence[Tensor],
    response_lengths: Sequence[int],
    group_indices: Sequence[int | None] | None = None,
    *,
    share_prompts: bool,
    multiple_of: int = 1,
) -> PackedBatch:
    """Pack sequences into one row.

    Args:
        tokens: per sample, [P_i + R_i] token ids, prompt first.
        response_lengths: R_i; 0 is allowed (such a sample has no place on the flat axis, and none in a shared row).
        group_indices: the prompt group of each sample. Samples share a prompt if they have the same group index
            (not None) and the same prompt tokens. None: nothing is shared.
        share_prompts: False keeps every sequence whole.
        multiple_of: the row is padded with token 0 to a multiple of this (at least one multiple if there is nothing).

    Raises:
        ValueError: lengths that do not fit each other, or a response without a prompt token that could predict it.
    """
    _check_lengths(tokens, response_lengths, group_indices)
    if multiple_of < 1:
        raise ValueError(f"A row cannot be padded to a multiple of {multiple_of}; give 1 for no padding.")
    pieces: list[Tensor] = []
    positions: list[tuple[int, int]] = []  # first position and length of each segment
    segments: list[Segment] = []
    row = 0

    def append(piece: Tensor, first_position: int = 0, prefix_start: int = 0, prefix_len: int = 0) -> int:
        """Put a segment at the end of the row (an empty one leaves no trace) and return its first row."""
        nonlocal row
        start, length = row, piece.numel()
        if length:
            pieces.append(piece)
            positions.append((first_position, length))
            segments.append(Segment(start, length, prefix_start, prefix_len))
            row += length
        return start

    keys = prompt_keys(tokens, response_lengths, group_indices) if share_prompts else list(range(len(tokens)))
    head_rows: dict[int, list[tuple[int, int]]] = {}  # per sample, the (start, end) ranges of rows that predict it
    for members in _members_by_key(keys):
        if share_prompts:
            members = [i for i in members if response_lengths[i] > 0]
        if len(members) <= 1:
            for i in members:
                num_response = response_lengths[i]
                start = append(tokens[i][:-1] if share_prompts else tokens[i])
                first = start + tokens[i].numel() - num_response - 1
                head_rows[i] = [(first, first + num_response)]
            continue
        num_prompt = tokens[members[0]].numel() - response_lengths[members[0]]
        prompt_start = append(tokens[members[0]][:num_prompt])
        for i in members:
            start = append(tokens[i][num_prompt:-1], num_prompt, prompt_start, num_prompt)
            last_prompt_row = prompt_start + num_prompt - 1
            head_rows[i] = [(last_prompt_row, last_prompt_row + 1), (start, start + response_lengths[i] - 1)]

    device = tokens[0].device if tokens else torch.device("cpu")
    num_padding = _round_up(max(row, 1), multiple_of) - row
    append(torch.zeros(num_padding, dtype=torch.long, device=device))
    head_ranges = [bounds for i in range(len(tokens)) if response_lengths[i] > 0 for bounds in head_rows[i]]
    targets = [tokens[i][tokens[i].numel() - num :] for i, num in enumerate(response_lengths) if num > 0]
    return PackedBatch(
        input_ids=torch.cat(pieces).long(),
        position_ids=_ranges([(first, first + length) for first, length in positions], device),
        segments=tuple(segments),
        head_index=_ranges(head_ranges, device),
        targets=torch.cat(targets).long() if targets else torch.zeros(0, dtype=torch.long, device=device),
        response_lengths=tuple(response_lengths),
        total_lengths=tuple(t.numel() for t in tokens),
        num_padding=num_padding,
    )


def prompt_keys(
    tokens: Sequence[Tensor], response_lengths: Sequence[int], group_indices: Sequence[int | None] | None
) -> list[int]:
    """One number per sample; equal for samples whose prompt is computed once when they meet in a row.

    They have the same group index (not None) and the same prompt tokens. (The group must be the same too because equal
    placeholder tokens may stand for different images.)
    """
    if group_indices is None:
        return list(range(len(tokens)))
    keys: list[int] = []
    seen: dict[int, list[tuple[Tensor, int]]] = {}  # group index -> its distinct prompts with their keys
    for i, (ids, group_index) in enumerate(zip(tokens, group_indices, strict=True)):
        if group_index is None:
            keys.append(i)
            continue
        prompt = ids[: ids.numel() - response_lengths[i]]
        prompts = seen.setdefault(group_index, [])
        key = next((key for other, key in prompts if torch.equal(prompt, other)), None)
        if key is None:
            key = i
            prompts.append((prompt, key))
        keys.append(key)
    return keys


def num_packed_tokens(
    total_lengths: Sequence[int], response_lengths: Sequence[int] | None = None, keys: Sequence[int] | None = None
) -> int:
    """Rows that `pack` needs for these samples before padding.

    Args:
        total_lengths: P_i + R_i.
        response_lengths: R_i; not needed if nothing is shared.
        keys: from `prompt_keys`, for a row with shared prompts; None for one without.
    """
    if keys is None:
        return sum(total_lengths)
    if response_lengths is None:
        raise ValueError("The size of a row with shared prompts depends on the response lengths: pass them.")
    counted: set[int] = set()
    num_tokens = 0
    for total, response, key in zip(total_lengths, response_lengths, keys, strict=True):
        if response == 0:
            continue
        num_tokens += response - 1 + (0 if key in counted else total - response)
        counted.add(key)
    return num_tokens


def response_slices(response_lengths: Sequence[int]) -> list[slice]:
    """The part of the flat axis [N] that belongs to each sample."""
    slices: list[slice] = []
    start = 0
    for length in response_lengths:
        slices.append(slice(start, start + length))
        start += length
    return slices


def split_by_sample(flat: Tensor, response_lengths: Sequence[int]) -> list[Tensor]:
    """[N, ...] to one [R_i, ...] view per sample."""
    if flat.shape[0] != sum(response_lengths):
        raise ValueError(
            f"A flat tensor of {flat.shape[0]} rows cannot be split into responses of {sum(response_lengths)} tokens "
            f"in all ({len(response_lengths)} samples)."
        )
    return list(torch.split(flat, list(response_lengths)))


def concat_responses(per_sample: Sequence[Tensor], response_lengths: Sequence[int] | None = None) -> Tensor:
    """One [R_i] tensor per sample to a flat [N]; checks the lengths where they are given."""
    if response_lengths is not None:
        seen = [t.shape[0] for t in per_sample]
        if seen != list(response_lengths):
            raise ValueError(f"Tensors of lengths {seen} do not fit responses of lengths {list(response_lengths)}.")
    return torch.cat(list(per_sample)) if per_sample else torch.zeros(0)


def _check_lengths(
    tokens: Sequence[Tensor], response_lengths: Sequence[int], group_indices: Sequence[int | None] | None
) -> None:
    if len(tokens) != len(response_lengths):
        raise ValueError(f"{len(tokens)} token sequences but {len(response_lengths)} response lengths.")
    if group_indices is not None and len(group_indices) != len(tokens):
        raise ValueError(f"{len(tokens)} token sequences but {len(group_indices)} group indices.")
    for i, (ids, num_response) in enumerate(zip(tokens, response_lengths, strict=True)):
        if ids.dim() != 1:
            raise ValueError(f"Sample {i}: tokens must be one-dimensional, got shape {tuple(ids.shape)}.")
        if num_response < 0 or (num_response > 0 and num_response >= ids.numel()):
            raise ValueError(
                f"Sample {i}: a response of {num_response} tokens in a sequence of {ids.numel()} leaves no prompt "
                "token to predict the first response token; `tokens` must be the prompt followed by the response."
            )


def _members_by_key(keys: Sequence[int]) -> list[list[int]]:
    """Sample positions of each key, in order of first appearance."""
    members: dict[int, list[int]] = {}
    for i, key in enumerate(keys):
        members.setdefault(key, []).append(i)
    return list(members.values())


def _ranges(bounds: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Concatenation of arange(start, end)."""
    if not bounds:
        return torch.zeros(0, dtype=torch.long, device=device)
    return torch.cat([torch.arange(start, end, device=device) for start, end in bounds])


def _round_up(value: int, multiple_of: int) -> int:
    return (value + multiple_of - 1) // multiple_of * multiple_of
