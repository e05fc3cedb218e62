"""How packed rows are divided between the attention kernels of a GPU; on one, tests/gpu checks the numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slime.backends.megatron import gpu_attention
from slime.backends.megatron.gpu_attention import Sequences, attention_named, pieces_of


def _sequences(*lengths: int) -> Sequences:
    boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
    return Sequences(boundaries, boundaries, lengths, lengths)


def test_short_sequences_stay_together() -> None:
    sequences = _sequences(5, 4095, 7)
    (piece,) = pieces_of(sequences)
    assert (piece.start, piece.stop, piece.padded) == (0, 4107, 0)
    assert piece.sequences is sequences


def test_each_long_sequence_is_a_piece_and_the_others_lie_between() -> None:
    pieces = pieces_of(_sequences(5, 7, 5000, 4096, 3, 2))
    assert [piece[:3] for piece in pieces] == [(0, 12, 0), (12, 5012, 5120), (5012, 9108, 4096), (9108, 9113, 0)]
    among = [piece.sequences.query_boundaries.tolist() for piece in pieces if piece.sequences is not None]
    assert among == [[0, 5, 12], [0, 3, 5]]


def test_prefixes_keep_everything_together() -> None:
    boundaries, keys = torch.tensor([0, 5000, 5010]).int(), torch.tensor([0, 5000, 10010]).int()
    assert len(pieces_of(Sequences(boundaries, keys, (5000, 10), (5000, 5010)))) == 1


def _plain(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    parts = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def test_the_pieces_give_what_each_sequence_gives_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 70 rows as long, and a plain kernel in the place of flash attention, which no CPU has."""
    monkeypatch.setattr(gpu_attention, "_LONG", 70)
    monkeypatch.setattr(
        gpu_attention, "_flash", lambda q, k, v, sequences, scale: _plain(q, k, v, sequences.query_lengths, scale)
    )
    lengths = (5, 7, 100, 70, 3)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(sum(lengths), heads, 8, generator=generator) for heads in (4, 2, 2))
    inputs = [x.requires_grad_() for x in (query, key, value)]
    ours = attention_named("torch by length")(query, key, value, _sequences(*lengths), 0.3)
    plain = _plain(query, key, value, lengths, 0.3)
    torch.testing.assert_close(ours, plain)
    grad = torch.randn(ours.shape, generator=generator)
    for mine, theirs in zip(*(torch.autograd.grad(out, inputs, grad) for out in (ours, plain)), strict=True):
        torch.testing.assert_close(mine, theirs)
