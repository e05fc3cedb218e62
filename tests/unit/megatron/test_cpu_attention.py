"""Attention in blocks is attention of each sequence for itself, whatever is shared and however it is cut."""

import pytest
import torch
from torch import Tensor

from slime.backends.megatron import cpu_attention
from slime.backends.megatron.cpu_attention import attend, attention_blocks
from slime.data.packing import Segment

HEADS, GROUPS, DIM = 6, 2, 8
ROWS: dict[str, list[Segment]] = {
    "sequences alone": [Segment(0, 5), Segment(5, 1), Segment(6, 9)],
    "a shared prompt": [Segment(0, 4), Segment(4, 3, 0, 4), Segment(7, 1, 0, 4), Segment(8, 6, 0, 4)],
    "both, and padding": [
        Segment(0, 3), Segment(3, 2, 0, 3), Segment(5, 7), Segment(12, 2), Segment(14, 4, 12, 2), Segment(18, 3),
    ],
    "a prefix further away": [Segment(0, 4), Segment(4, 3), Segment(7, 5, 0, 4)],
}  # fmt: skip


def _plain(query: Tensor, key: Tensor, value: Tensor, segments: list[Segment], scale: float) -> Tensor:
    """One segment at a time, one query at a time, over the keys it may see."""
    key, value = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (key, value))
    rows = []
    for segment in segments:
        for i in range(segment.q_len):
            sees = [*range(segment.prefix_start, segment.prefix_start + segment.prefix_len)]
            sees += range(segment.q_start, segment.q_start + i + 1)
            scores = torch.einsum("hd,khd->hk", query[segment.q_start + i], key[sees]) * scale
            rows.append(torch.einsum("hk,khd->hd", scores.softmax(-1), value[sees]))
    return torch.stack(rows)


@pytest.mark.parametrize("sizes", [(384, 256), (0, 2)], ids=["whole groups", "small tiles"])
@pytest.mark.parametrize("row", ROWS)
def test_blocks_equal_one_query_at_a_time(row: str, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "_GROUP_ROWS", sizes[0])
    monkeypatch.setattr(cpu_attention, "_TILE_ROWS", sizes[1])
    segments, scale = ROWS[row], 0.4
    generator = torch.Generator().manual_seed(0)
    num_rows = segments[-1].q_start + segments[-1].q_len
    query, key, value = (
        torch.randn(num_rows, heads, DIM, generator=generator, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS)
    )
    blocks = attention_blocks(segments, torch.float32)
    assert sorted(i for block in blocks for i in range(block.queries.start, block.queries.stop)) == [*range(num_rows)]
    ours, plain = attend(query, key, value, blocks, scale), _plain(query, key, value, segments, scale)
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-6)
    grad = torch.randn(ours.shape, generator=generator)
    for mine, theirs in zip(
        *(torch.autograd.grad(out, (query, key, value), grad) for out in (ours, plain)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-5)


def test_bfloat16_is_as_near_to_float32_as_torchs_own_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(40, heads, DIM, generator=generator) for heads in (HEADS, GROUPS, GROUPS)]
    grad = torch.randn(40, HEADS, DIM, generator=generator)

    def torchs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(
            0, 1
        )

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, attention_blocks([Segment(0, 40)], query.dtype), DIM**-0.5)

    def results(function: object, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in exact]
        out = function(*inputs)  # type: ignore[operator]
        return [out, *torch.autograd.grad(out, inputs, grad.to(dtype))]

    truths = results(torchs, torch.float32)
    for mine, theirs, truth in zip(results(ours, torch.bfloat16), results(torchs, torch.bfloat16), truths, strict=True):
        assert (mine.float() - truth).norm() < 1.3 * (theirs.float() - truth).norm()
